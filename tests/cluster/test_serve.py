"""``moestro serve`` from start to stop: one cluster of two data-parallel ranks, through the public client.

The tests share the cluster and run in this order; the last one stops it. What happens when ranks are lost is in
`test_recovery`.
"""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import transformers
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.cluster.servers import Server, run, serving, until
from tests.model.oracle import reference_greedy

from moestro.cluster.client import Client
from moestro.cluster.client_results import RankStatus
from moestro.cluster.serving.ports import check_port
from moestro.protos.errors import ContextOverflow, UnknownModel
from moestro.router.random_placement import random_placement
from moestro.workers.checkpoint import open_checkpoint
from moestro.workers.rebalancing.setup import ExpertsSpec, start_placements

PROMPT = [5, 17, 200, 33, 71, 9]
HEALTH = health_pb2.HealthCheckResponse


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Server]:
    with serving(checkpoint, "--dp", 2, "--port", 0) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


def ranks(client: Client) -> list[RankStatus]:
    return [rank for group in client.status().groups for rank in group.ranks]


def is_idle(client: Client) -> bool:
    status = client.status()
    loads = [rank for group in status.groups for rank in group.ranks]
    return status.open_streams == 0 and not any(r.num_running + r.num_waiting + r.kv_blocks_used for r in loads)


def health(address: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        return int(stub.Check(health_pb2.HealthCheckRequest(service=""), timeout=10).status)


def test_says_how_to_call_it_and_nothing_else(server: Server) -> None:
    assert server.output == []
    assert server.lines[0] == f"ready  tiny on {server.address}, 1 group of dp 2 x tp 1"
    assert server.address.startswith("127.0.0.1:")
    assert not server.address.endswith(":0")
    assert len(server.lines) == 5


def test_greedy_is_what_transformers_says(client: Client, checkpoint: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    expected = reference_greedy(model, PROMPT, 48)
    for _ in range(2):  # each goes to the other rank
        answer = client.generate(PROMPT, max_tokens=48, temperature=0.0, ignore_eos=True)
        assert list(answer.choices[0].token_ids) == expected


def test_a_stream_is_numbered_and_adds_up(client: Client) -> None:
    options = {"max_tokens": 24, "temperature": 0.0, "ignore_eos": True}
    events = list(client.stream("def f(", **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert len(events) >= 24
    whole = client.generate("def f(", **options)
    assert [i for e in events for d in e.deltas for i in d.token_ids] == list(whole.choices[0].token_ids)
    assert "".join(event.text for event in events) == whole.text
    assert events[-1].usage is not None
    assert events[-1].usage.output_tokens == 24


def test_seeds_choices_and_logprobs(client: Client) -> None:
    one = client.generate("x = ", max_tokens=12, seed=11, n=3, logprobs=2)
    again = client.generate("x = ", max_tokens=12, seed=11, n=3, logprobs=2)
    ids = [choice.token_ids for choice in one.choices]
    assert ids == [choice.token_ids for choice in again.choices]
    assert len({tuple(each) for each in ids}) == 3
    for choice in one.choices:
        assert len(choice.logprobs) == len(choice.token_ids)
        for position in choice.logprobs:
            assert len(position.top) == 2
            assert position.top[0].logprob >= position.top[1].logprob


def test_chat_tokenize_models_and_info(client: Client) -> None:
    assert client.chat("hello", max_tokens=8, temperature=0.0).choices[0].token_ids
    ids = client.tokenize("def hello(name):")
    assert client.detokenize(ids) == "def hello(name):"
    (model,) = client.models()
    assert (model.name, model.architecture, model.max_context) == ("tiny", "Qwen3MoeForCausalLM", 4096)
    assert model.has_chat_template
    assert client.info().max_open_requests == 4096


def test_status_names_groups_and_ranks(client: Client, server: Server) -> None:
    until(lambda: is_idle(client))
    (group,) = client.status().groups
    assert (group.name, group.dp, group.tp, group.epoch) == ("group-0", 2, 1, 1)
    assert [rank.name for rank in group.ranks] == ["group-0 rank 0", "group-0 rank 1"]
    assert [rank.state for rank in group.ranks] == ["serving", "serving"]
    assert all(rank.num_steps > 0 for rank in group.ranks)
    assert health(server.address) == HEALTH.SERVING


def test_resident_memory_stays_near_weights_and_pool(client: Client, checkpoint: Path) -> None:
    kept = (checkpoint / "model.safetensors").stat().st_size + 8 * 2**20
    for rank in ranks(client):
        assert rank.resident_bytes <= 1.3 * kept + 600e6


def test_leaving_a_stream_frees_its_blocks(client: Client) -> None:
    stream = client.stream("for i in", max_tokens=3000, ignore_eos=True)
    for _ in range(3):
        next(stream)
    assert any(rank.num_running for rank in ranks(client))
    stream.close()
    until(lambda: is_idle(client), 5.0)


def test_many_at_once_answer_as_one_by_one(client: Client) -> None:
    prompts = [[i + 3, 2 * i + 5, 40 + i] for i in range(8)]

    def answer(prompt: list[int]) -> tuple[int, ...]:
        return tuple(client.generate(prompt, max_tokens=32, seed=prompt[0], ignore_eos=True).choices[0].token_ids)

    alone = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, prompts)) == alone
    until(lambda: is_idle(client))


def test_refusals_reach_the_caller_and_leave_nothing(client: Client) -> None:
    with pytest.raises(TimeoutError):
        client.generate("x", max_tokens=4000, ignore_eos=True, timeout_s=0.3)
    with pytest.raises(UnknownModel, match="'other' is not served here; served: tiny"):
        client.generate("x", model="other")
    with pytest.raises(ContextOverflow, match="4096"):
        client.generate([1] * 4096, max_tokens=8)
    until(lambda: is_idle(client), 5.0)


def test_a_second_server_on_the_port_is_refused(server: Server, client: Client, checkpoint: Path) -> None:
    port = server.address.rpartition(":")[2]
    for more in ((), ("--gateways", 2)):  # several gateways share a port among themselves, not with strangers
        second = run(server.home, "serve", checkpoint, "--port", port, *more)
        assert second.returncode == 1
        assert second.stdout == ""
        assert second.stderr.startswith(f"error: server.port: cannot listen on 127.0.0.1 port {port}: Address already")
        assert second.stderr.count("\n") == 1
    assert client.generate("x", max_tokens=2).choices[0].token_ids


def test_the_command_line_against_it(server: Server) -> None:
    said = run(server.home, "generate", "x = ", "--address", server.address, "--max-tokens", 5, "--temperature", 0)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.endswith("\n")
    shown = run(server.home, "status", "--address", server.address, "--json")
    assert [group["name"] for group in json.loads(shown.stdout)["groups"]] == ["group-0"]


def test_answers_are_the_same_while_experts_move(server: Server) -> None:
    arguments = ["--requests", 4, "--perturbation", "crowd", "--perturbation", "rebalanced", "--json"]
    said = run(server.home, "verify", "--address", server.address, *arguments)
    assert said.returncode == 0, said.stdout + said.stderr
    rows = {row["perturbation"]: row for row in json.loads(said.stdout)["perturbations"]}
    assert rows["rebalanced"]["applies"], rows
    assert rows["rebalanced"]["equal"]
    assert rows["rebalanced"]["tokens"] > 0


def test_experts_are_shown_moved_and_saved(server: Server, client: Client, checkpoint: Path, tmp_path: Path) -> None:
    address = ["--address", server.address]
    moved = run(server.home, "experts", "move", "--random", 5, "--no-rebalance", *address)
    assert moved.returncode == 0, moved.stderr
    config = open_checkpoint(checkpoint).config
    wanted = [random_placement(config.num_experts, 2, -(-config.num_experts // 2), f"5 {layer}").slots
              for layer in range(config.num_moe_layers)]  # fmt: skip
    until(lambda: [layer.slots for layer in client.experts()[0].report.layers] == wanted)
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    answer = client.generate(PROMPT, max_tokens=24, temperature=0.0, ignore_eos=True)
    assert list(answer.choices[0].token_ids) == reference_greedy(model, PROMPT, 24)
    file = tmp_path / "placement.json"
    assert run(server.home, "experts", "save", file, *address).returncode == 0
    spec = ExpertsSpec(placement_file=str(file))
    assert [placement.slots for placement in start_placements(spec, config, 2)] == wanted
    shown = run(server.home, "experts", *address)
    assert "balance" in shown.stdout, shown.stderr
    assert "operator" in shown.stdout


def test_the_dashboard_shows_names_a_person_understands(server: Server) -> None:
    token = (server.home / ".ray" / "auth_token").read_text().strip()
    actors = json.dumps(_ask(f"{server.dashboard}/api/v0/actors?detail=1", token))
    for name in ("group-0 rank 0", "group-0 rank 1", "moestro#Gateway", "moestro#Group", "moestro#Directory"):
        assert name in actors, name
    groups = json.dumps(_ask(f"{server.dashboard}/api/v0/placement_groups", token))
    assert "moestro#Group" in groups
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        _ask(f"{server.dashboard}/api/v0/actors", "not the token")


def _ask(url: str, token: str) -> object:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def test_our_log_lines_are_in_rays_logs(server: Server) -> None:
    logs = "\n".join(path.read_text() for path in server.home.glob("ray/session_2*/logs/worker-*.err"))
    assert "INFO moestro.cluster.ranks.process: group-0 rank 1 is ready at 127.0.0.1:" in logs


def test_sigterm_lets_a_stream_finish_and_leaves_nothing(server: Server) -> None:
    watched: list[int] = []
    watching = threading.Thread(target=_watch_health, args=(server.address, watched))
    watching.start()
    with server.client() as client, ThreadPoolExecutor(1) as pool:
        stream = client.stream("x = 1", max_tokens=300, ignore_eos=True)
        next(stream)
        rest = pool.submit(lambda: list(stream))
        took_s = server.stop(signal.SIGTERM)
        events = rest.result(10)
    assert events[-1].usage is not None
    assert events[-1].usage.output_tokens == 300
    assert server.process.returncode == 0
    assert server.left_behind() == []
    watching.join(10)
    assert watched == [HEALTH.SERVING, HEALTH.NOT_SERVING]
    assert took_s < 20
    assert server.lines[5:] == ["stopped"]  # nothing of Ray's own
    assert server.output == []
    host, _, port = server.address.rpartition(":")
    check_port(host, int(port))


def _watch_health(address: str, seen: list[int]) -> None:
    """Every status until the server goes."""
    with grpc.insecure_channel(address) as channel:
        try:
            for response in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=60):
                seen.append(response.status)
        except grpc.RpcError:
            pass
