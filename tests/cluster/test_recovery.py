"""Ranks that are killed and stopped under streams, in one cluster of three of them, through the public client: every
answer is as without. The tests share the cluster and run in this order."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from tests.cluster.servers import Server, serving, until

from moestro.cluster.client import Client, Completion
from moestro.cluster.client_results import GroupStatus

NUM_TOKENS = 300
OPTIONS: list[dict[str, object]] = [
    {"temperature": 0.0},
    {"seed": 5},
    {"seed": 6, "n": 2, "logprobs": 2, "frequency_penalty": 0.5},
    {"temperature": 0.0, "logprobs": 1},
    {"seed": 7, "repetition_penalty": 1.2},
    {"seed": 8, "top_k": 20, "prompt_logprobs": 1},
]


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, "--dp", 3, "--port", 0) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def expected(client: Client) -> list[Completion]:
    """Every answer by itself, with nothing amiss."""
    return [answer(client, number) for number in range(len(OPTIONS))]


def answer(client: Client, number: int) -> Completion:
    return client.generate(f"x{number} = ", max_tokens=NUM_TOKENS, ignore_eos=True, **OPTIONS[number])  # type: ignore[arg-type]


def group_of(client: Client) -> GroupStatus:
    (group,) = client.status().groups
    return group


def states(client: Client) -> list[str]:
    return [rank.state for rank in group_of(client).ranks]


def is_whole(client: Client) -> bool:
    group = group_of(client)
    return group.activity == "" and [rank.state for rank in group.ranks] == ["serving"] * 3


def disturbed(client: Client, expected: list[Completion], fault: object) -> list[Completion]:
    """All answers at once, with a fault in the middle; each as it was without."""
    with ThreadPoolExecutor(len(OPTIONS)) as pool:
        asked: list[Future[Completion]] = [pool.submit(answer, client, number) for number in range(len(OPTIONS))]
        until(lambda: sum(rank.num_running for rank in group_of(client).ranks) >= len(OPTIONS))
        assert callable(fault)
        fault()
        answers = [each.result(60) for each in asked]
    for mine, undisturbed in zip(answers, expected, strict=True):
        assert mine.choices == undisturbed.choices
        assert mine.prompt_logprobs == undisturbed.prompt_logprobs
    return answers


def test_a_killed_rank_costs_no_answer_and_comes_back(
    server: Server, client: Client, expected: list[Completion]
) -> None:
    until(lambda: is_whole(client), 40.0)
    epoch = group_of(client).epoch
    answers = disturbed(client, expected, lambda: server.find("ray::Rank")[1].kill())
    assert sum(each.usage.migrations for each in answers) > 0
    until(lambda: is_whole(client), 40.0)
    assert group_of(client).epoch >= epoch + 2
    assert group_of(client).spare_ranks == 2


def test_a_rank_killed_while_the_group_sleeps_is_noticed_as_soon(server: Server, client: Client) -> None:
    time.sleep(0.3)
    server.find("ray::Rank")[0].kill()
    began = time.monotonic()
    until(lambda: "serving" in states(client) and states(client) != ["serving"] * 3, 2.0, every_s=0.01)
    print(f"noticed after {time.monotonic() - began:.3f} s")
    assert client.generate("x", max_tokens=4).choices[0].token_ids
    until(lambda: is_whole(client), 40.0)


def test_a_stopped_rank_is_fenced_off_and_replaced(server: Server, client: Client, expected: list[Completion]) -> None:
    stopped = server.find("ray::Rank")[2]
    disturbed(client, expected, lambda: stopped.send_signal(signal.SIGSTOP))
    assert not stopped.is_running() or stopped.status() == psutil.STATUS_ZOMBIE
    until(lambda: is_whole(client), 40.0)


def test_a_group_that_is_killed_as_a_whole_is_replaced_and_its_streams_go_on(
    server: Server, client: Client, expected: list[Completion]
) -> None:
    def kill_all() -> None:
        for rank in server.find("ray::Rank"):
            rank.kill()

    disturbed(client, expected, kill_all)
    until(lambda: is_whole(client), 40.0)
