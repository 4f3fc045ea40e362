"""The GPU suite's own code, on the CPU: every part runs, failures are caught and kept, nothing is left out silently."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.gpu_suite import parity, sampling, speed
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, attempt, on_cuda_only
from benchmarks.gpu_suite.costs import expected_distinct, step_cost
from benchmarks.gpu_suite.driver import Outcome, in_process_of_its_own, in_this_process, run_suite
from benchmarks.gpu_suite.parts import PARTS
from benchmarks.gpu_suite.shapes import SHAPES
from benchmarks.small_models import make_model, save_model
from typer.testing import CliRunner

from moestro.workers.architectures import parse_config

ROOT = Path(__file__).resolve().parents[2]
SMALL = Settings("cpu", small=True, seed=0)


def read(path: Path) -> dict[str, object]:
    def refuse(text: str) -> float:
        raise AssertionError(f"{text} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def run(tmp_path, names, run_part, budget_s=60.0):
    output = tmp_path / "results" / "gpu.json"
    told: list[Outcome] = []
    passed = run_suite(names, SMALL, {"commit": "abc"}, output, budget_s=budget_s, run_part=run_part, tell=told.append)
    record = read(output)
    assert [outcome.part for outcome in told] == [part["part"] for part in record["parts"]]
    return passed, record


def test_every_part_passes_on_the_cpu(tmp_path):
    passed, record = run(tmp_path, list(PARTS), in_this_process, budget_s=280.0)
    assert passed, [part["reason"] for part in record["parts"]]
    assert record["status"] == "passed"
    assert record["commit"] == "abc"
    assert record["settings"] == {"device": "cpu", "small": True, "seed": 0}
    checks = {part["part"]: {check["name"]: check for check in part["checks"]} for part in record["parts"]}
    assert list(checks) == list(PARTS)
    assert checks["collectives"]["a group of one over a TCPStore"]["values"]["backend"] == "gloo"
    for name in ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "llama", "mistral", "qwen3"):
        for scenario in ("single", "batch"):
            assert checks["correctness"][f"{name} fp32 {scenario}"]["values"]["max_abs_error"] <= 2e-4
        assert checks["correctness"][f"{name} bf16"]["values"]["ratio"] <= 1.25
    omitted = [name for part in checks.values() for name, check in part.items() if check["status"] == "omitted"]
    assert omitted == [
        "qwen3_moe bf16: waits for the device",
        "sampling kernel",
        "ordered sum",
        "peer vllm",
        *(f"decode batch {batch}: kernels" for batch in speed.SMALL_WINDOWS.batches),
        *(f"decode batch {batch}: kernels" for batch in speed.SMALL.batches),
        *(f"decode batch {batch}: kernels" for batch in speed.SMALL.batches),
    ]
    assert checks["layers"]["experts, 3 tokens"]["values"]["times_faster_than"].keys() == {
        "torch._grouped_mm",
        "transformers",
    }
    for name in speed.SMALL.batches:
        assert checks["speed"][f"decode batch {name}"]["values"]["energy"]["not_measured"]
    assert checks["speed"]["decode batch 3, skewed"]["values"]["distinct_experts_seen"]["mean"] <= 6
    mixed = checks["speed"]["mixed load, 24 in and 24 out, 3 at a time"]["values"]
    assert mixed["ended"] > 0
    decode = checks["speed"]["decode batch 3"]["values"]
    assert decode["rounds"] == speed.SMALL.rounds
    assert decode["tokens_per_s"]["min"] <= decode["tokens_per_s"]["median"] <= decode["tokens_per_s"]["max"]
    first, last = decode["context_per_sequence"]["first"], decode["context_per_sequence"]["last"]
    assert last - first == pytest.approx(speed.SMALL.rounds * speed.SMALL.steps_per_round)
    assert speed.SMALL.prompt_tokens < first < last < speed.SMALL.max_context
    split = decode["split"]
    assert sum(value for key, value in split.items() if key.startswith("host_")) <= split["step_s"] * 1.5


def test_a_part_that_fails_does_not_lose_the_others(tmp_path):
    def part(name, settings, limit_s):
        if name == "sampling":
            return Outcome(name, "failed", 1.0, [{"name": "first", "status": "passed"}], "exit status -11: ...")
        return Outcome(name, "passed", 1.0, [{"name": "one", "status": "passed"}])

    passed, record = run(tmp_path, ["roofs", "sampling", "speed"], part)
    assert not passed
    assert record["status"] == "failed"
    assert [(p["part"], p["status"], len(p["checks"])) for p in record["parts"]] == [
        ("roofs", "passed", 1),
        ("sampling", "failed", 1),
        ("speed", "passed", 1),
    ]


def test_the_record_is_written_after_each_part(tmp_path):
    seen = []

    def part(name, settings, limit_s):
        record = read(tmp_path / "results" / "gpu.json")
        seen.append((record["status"], len(record["parts"])))
        return Outcome(name, "passed", 1.0, [{"name": "one", "status": "passed"}])

    assert run(tmp_path, ["roofs", "sampling"], part)[0]
    assert seen == [("running", 0), ("running", 1)]


def test_a_part_without_time_is_skipped_with_its_reason_and_fails_the_suite(tmp_path):
    passed, record = run(tmp_path, ["roofs"], in_this_process, budget_s=1.0)
    assert not passed
    assert record["parts"][0]["status"] == "skipped"
    assert "budget of 1 s" in record["parts"][0]["reason"]


def test_a_process_that_hangs_is_ended_and_a_missing_device_is_a_failure():
    hung = in_process_of_its_own("speed", SMALL, 0.3)
    assert hung.status == "failed"
    assert hung.reason.startswith("ended after 0 s")
    if not torch.cuda.is_available():
        missing = in_process_of_its_own("environment", Settings("cuda"), 60)
        assert missing.status == "failed"
        assert "no CUDA device" in missing.checks[0]["reason"]
        assert [check["status"] for check in missing.checks] == ["failed", "passed"]


def test_a_part_that_dies_says_why():
    died = in_process_of_its_own("roofs", Settings("abacus"), 60)  # type: ignore[arg-type]
    assert died.status == "failed"
    assert died.checks == []
    assert died.reason.startswith("exit status 1:")
    assert "abacus" in died.reason


def test_checks_record_what_went_wrong():
    def unmet():
        raise Unmet("too far", error=float("nan"))

    assert attempt("a", unmet).record() == {
        "name": "a",
        "status": "failed",
        "values": {"error": "nan"},
        "reason": "too far",
    }
    broken = attempt("b", lambda: {"x": [1, 2][5]})
    assert broken.status == "failed"
    assert broken.reason.startswith("IndexError: list index out of range (")
    assert on_cuda_only("c", SMALL, unmet) == Check(
        "c", "omitted", {}, "needs CUDA, and the suite was asked to run on cpu"
    )
    assert on_cuda_only("c", Settings("cuda"), unmet).status == "failed"


def test_parity_fails_for_other_weights(tmp_path, monkeypatch):
    folder = save_model(make_model("qwen3_moe", 0), tmp_path / "ours")
    other = save_model(make_model("qwen3_moe", 1), tmp_path / "other")
    load = parity.load_oracle
    device = torch.device("cpu")
    parity.check_fp32(folder, parity.SCENARIOS[0], 4, device)
    monkeypatch.setattr(parity, "load_oracle", lambda _, dtype, device: load(other, dtype, device))
    with pytest.raises(Unmet, match="greedy tokens are not the oracle's") as failure:
        parity.check_fp32(folder, parity.SCENARIOS[0], 4, device)
    assert failure.value.values["max_abs_error"] > parity.TOLERANCE


def test_parity_fails_for_an_error_that_changes_no_token(tmp_path, monkeypatch):
    folder = save_model(make_model("llama", 0), tmp_path)
    exact = parity.oracle_logits
    monkeypatch.setattr(parity, "oracle_logits", lambda *args: exact(*args) + 3e-4)
    with pytest.raises(Unmet, match="above 2e-04"):
        parity.check_fp32(folder, parity.SCENARIOS[0], 4, torch.device("cpu"))


def test_sampling_fails_when_the_device_draws_otherwise(monkeypatch):
    draw = sampling.sample
    calls = []

    def alternating(logits_RV, rows):
        calls.append(1)
        return draw(logits_RV.roll(len(calls) % 2, 1), rows)

    monkeypatch.setattr(sampling, "sample", alternating)
    with pytest.raises(Unmet, match="8 of 8 rows differ"):
        sampling.check_tokens("greedy", 1003, 8, 0, torch.device("cpu"))


@pytest.mark.parametrize(
    ("batch", "distinct", "tokens_per_s"), [(1, 8, 695), (8, 51.6, 1291), (64, 125.9, 4173), (256, 128, 12769)]
)
def test_costs_reproduce_the_published_roof(batch, distinct, tokens_per_s):
    """Decode of Qwen3-30B-A3B in bf16 at a context of 1k on 4.3 TB/s, as worked out elsewhere by hand."""
    config = parse_config(speed.QWEN3_30B_A3B)
    cost = step_cost(config, num_tokens=batch, context_tokens=1024 * batch, logit_rows=batch)
    assert expected_distinct(128, 8, batch) == pytest.approx(distinct, abs=0.06)
    assert batch / cost.roof_s(4.3e12, 790e12) == pytest.approx(tokens_per_s, rel=1e-3)


def test_the_measured_model_has_the_size_of_its_name():
    config = parse_config(speed.QWEN3_30B_A3B)
    everything = step_cost(config, num_tokens=0, context_tokens=0, logit_rows=0, distinct_experts=128)
    one = step_cost(config, num_tokens=1, context_tokens=0, logit_rows=1)
    embedding = config.vocab_size * config.hidden_size
    assert everything.num_bytes / 2 + embedding == pytest.approx(30.5e9, rel=0.01)
    assert one.flop / 2 + embedding == pytest.approx(3.3e9, rel=0.03)


def test_a_layer_with_a_window_reads_no_more_than_it():
    shape = SHAPES["gpt-oss-20b"]
    whole, windowed = parse_config(shape.raw), shape.config
    assert windowed.windows == (128, None)
    costs = [step_cost(c, num_tokens=4, context_tokens=4 * 1024, logit_rows=4) for c in (whole, windowed)]
    saved = 12 * 2 * 8 * 64 * 2 * 4 * (1024 - 128)
    assert costs[0].num_bytes - costs[1].num_bytes == saved


def test_a_measured_batch_fits_its_context():
    for plan in (speed.FULL, speed.SMALL, speed.MIXTRAL, speed.GPT_OSS, speed.SMALL_WINDOWS):
        ahead = -(-max(plan.batches) * plan.prompt_tokens // (plan.max_num_tokens - max(plan.batches))) + 1
        steps = plan.warm_up_steps + plan.rounds * plan.steps_per_round + 1 + plan.split_steps + 2
        assert plan.prompt_tokens + ahead + steps < plan.max_context
        assert all(number * tokens <= plan.max_num_tokens for number, tokens in plan.prefills)


def test_the_command_line_refuses_what_it_cannot_do():
    from benchmarks.gpu_suite.__main__ import main
    from typer import Typer

    app = Typer()
    app.command()(main)
    for arguments, message in ((["--parts", "warp"], "warp"), (["--device", "cpu"], "--small")):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2
        assert message in result.output


BLOCKED = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("ray", "pydantic", "pydantic_core", "grpc", "google"):
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocker())
import benchmarks.gpu_suite.__main__, benchmarks.gpu_suite.part
from benchmarks.gpu_suite.parts import PARTS
assert "torch" not in sys.modules
for part in PARTS.values():
    part.load()
assert "moestro.workers.engine" in sys.modules
print("imported", len(PARTS))
"""


def test_nothing_imports_ray_or_pydantic_or_grpc_or_protobuf():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == f"imported {len(PARTS)}", done.stderr[-2000:]
