"""What invariance costs: the engine against itself with the fastest kernels regardless of the batch.

    python -m benchmarks.invariance

Same weights, same scheduler, same prompts; both engines in one process, rounds interleaved and in alternating order.
Ratios are taken round by round.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.checkpoints import checkpoint
from benchmarks.engines import Timing, run_batch
from benchmarks.hardware import hardware_record
from benchmarks.noninvariant import noninvariant
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.kernels.plain import PlainBackend
from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

OUTPUT_TOKENS = 48
VOCABULARY = 8192


def figures(invariant: Timing, fastest: Timing, prompt_tokens: int) -> dict[str, float]:
    """Tokens per second of both, and the invariant engine's share of the other's."""
    return {
        "invariant_decode": invariant.decode_tokens_per_s,
        "fastest_decode": fastest.decode_tokens_per_s,
        "decode_ratio": invariant.decode_tokens_per_s / fastest.decode_tokens_per_s,
        "invariant_prefill": prompt_tokens / invariant.prefill_s,
        "fastest_prefill": prompt_tokens / fastest.prefill_s,
        "prefill_ratio": fastest.prefill_s / invariant.prefill_s,
    }


def main(
    models: Annotated[str, typer.Option(help="Comma-separated names of benchmarks.checkpoints.")] = "tiny,mid",
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 128,
    rounds: Annotated[int, typer.Option(min=1)] = 9,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path(".cache/checkpoints"),
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/invariance.json"),
) -> None:
    """Decode and prefill with and without invariance; median and range over rounds."""
    torch.set_num_threads(threads)
    results = []
    for name in models.split(","):
        path = checkpoint(name, folder)
        spec = RankSpec(model=str(path), kv_bytes=2**29, max_num_tokens=4096)
        models = load_model(path), noninvariant(load_model(path, backend=PlainBackend()))
        engines = [build_engine(spec, model, torch.device("cpu")) for model in models]
        for batch in map(int, batches.split(",")):
            rows = []
            for number in range(-1, rounds):  # round -1 warms both up and is not counted
                generator = torch.Generator().manual_seed(seed * 1000 + number + 1)
                prompts = torch.randint(VOCABULARY, (batch, prompt), generator=generator).tolist()
                timings: dict[int, Timing] = {}
                for index in (0, 1) if number % 2 else (1, 0):
                    timings[index], _ = run_batch(engines[index], prompts, OUTPUT_TOKENS)
                rows.append(figures(timings[0], timings[1], batch * prompt))
            results.append({"model": name, "batch": batch, "tokens_per_s": spread(rows[1:])})
        del engines, models
    report(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompt_tokens": prompt, "output_tokens": OUTPUT_TOKENS, "threads": threads, "rounds": rounds}
    record = {"hardware": hardware_record(), "settings": settings | {"seed": seed}, "results": results}
    output.write_text(json.dumps(record, indent=2) + "\n")


def report(results: list[dict[str, Any]]) -> None:
    table = Table("model", "batch", "figure", "invariant", "fastest", "ratio (range)", title="tokens per second")
    for result in results:
        spreads = result["tokens_per_s"]
        for kind in ("decode", "prefill"):
            ratio = spreads[f"{kind}_ratio"]
            table.add_row(
                result["model"],
                str(result["batch"]),
                kind,
                f"{spreads[f'invariant_{kind}']['median']:.0f}",
                f"{spreads[f'fastest_{kind}']['median']:.0f}",
                f"{ratio['median']:.3f} ({ratio['min']:.3f} to {ratio['max']:.3f})",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
