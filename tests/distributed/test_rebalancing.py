"""Experts move while real processes serve: the same answers, nothing torn, whatever happens on the way."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.small_models import make_model, random_ids, save_model
from tests.distributed.processes import run_processes, start_process

from moestro.demo.paths import MODEL_DIR
from moestro.router.mesh import serve_store

RANKS = "tests.distributed.rebalancing_ranks"
SEED = 20261121


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_model(make_model("qwen3_moe", SEED), folder)
    return str(folder)


@pytest.mark.parametrize(
    ("size", "tp", "redundant", "transport"),
    [(2, 1, 0, "all_to_all"), (3, 1, 4, "fixed_capacity"), (4, 1, 8, None), (4, 2, 4, None)],
)
def test_answers_do_not_depend_on_where_experts_are_or_that_they_move(
    model: str, size: int, tp: int, redundant: int, transport: str | None
) -> None:
    prompts = [random_ids(5 + 3 * i, seed=SEED + i) for i in range(6)]
    kwargs = {"model": model, "prompts": prompts, "num_tokens": 30, "redundant": redundant, "tp": tp}
    moves = {"seeds": [SEED, SEED + 1], "transport": transport}
    ranks = run_processes(f"{RANKS}:serve_while_moving", size, {**kwargs, **moves})
    for of_rank in ranks:
        first, *others = of_rank["answers"]
        assert others == [first, first]
        assert of_rank["torn"] == []
        assert of_rank["slots"] == ranks[0]["slots"]
        assert of_rank["switched"] == 4, "two layers, twice"
        assert all(of_rank["load"])
    alone = run_processes(f"{RANKS}:serve_while_moving", 1, {**kwargs, "redundant": 0, "tp": 1, "seeds": []})[0]
    if tp == 1:
        spread_out = {n: answer for of_rank in ranks for n, answer in of_rank["answers"][0].items()}
        assert spread_out == alone["answers"][0]


def test_a_transport_that_cannot_serve_is_refused_and_not_replaced(model: str) -> None:
    for said in run_processes(f"{RANKS}:ask_for_deep_ep", 2, {"model": model}):
        assert said == "transport: deep_ep was asked for and cannot serve: deep_ep is not installed"


def test_replicated_experts_say_what_transformers_says_until_it_ends() -> None:
    """To the end-of-sequence token that the demo model was trained to give: a benchmark that ignores it hid corrupted
    answers from another project for weeks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    texts = ["def is_even(n):\n", "def square(x):\n", "class Error(Exception):\n", "def f(x):\n    return x\n"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    eos: list[int] = model.generation_config.eos_token_id
    expected = {}
    for n, prompt in enumerate(prompts):
        with torch.inference_mode():
            ids = model.generate(
                torch.tensor([prompt]), max_new_tokens=300, do_sample=False, pad_token_id=0, repetition_penalty=1.3
            )
        expected[str(n)] = ids[0, len(prompt) :].tolist()
    assert [answer[-1] in eos for answer in expected.values()] == [True, True, True, False], "other prompts are needed"
    kwargs = {"model": str(MODEL_DIR), "prompts": prompts, "eos": eos}
    ranks = run_processes(f"{RANKS}:to_the_end", 4, {**kwargs, "redundant": 8}, timeout_s=120)
    assert {n: answer for of_rank in ranks for n, answer in of_rank.items()} == expected


@pytest.mark.parametrize("kill_after", [0, 1])
def test_a_killed_rank_leaves_every_layer_old_or_new(model: str, kill_after: int) -> None:
    size = 3
    store, address = serve_store()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kwargs = {"model": model, "kill_after": kill_after}
        started = [
            start_process(f"{RANKS}:killed_while_moving", rank, size, address, folder, kwargs) for rank in range(size)
        ]
        try:
            deadline = time.monotonic() + 60
            codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in started]
        finally:
            for process in started:
                process.kill()
        logs = [(folder / f"{rank}.log").read_text() for rank in range(size)]
        assert codes == [0, 0, -9], logs
        for rank in range(size - 1):
            result = json.loads((folder / f"{rank}.json").read_text())
            assert result == {"torn": [], "moved": [True] * kill_after + [False] * (2 - kill_after)}
    del store


def test_a_move_that_cannot_be_loaded_is_given_up_and_the_next_one_works(model: str) -> None:
    for result in run_processes(f"{RANKS}:fail_to_load", 3, {"model": model}):
        assert result["same"]
        assert result["torn"] == []
        assert any("on rank 1" in reason for reason in result["reasons"])


def test_a_group_stops_at_once_in_the_middle_of_a_move(model: str) -> None:
    for result in run_processes(f"{RANKS}:stopped_while_moving", 2, {"model": model}):
        assert result["seconds"] < 5
        assert result["torn"] == []


def test_a_second_request_overtakes_the_first(model: str) -> None:
    for result in run_processes(f"{RANKS}:second_while_first", 2, {"model": model}):
        assert result == {"same": True, "torn": []}
