"""Our engine against ``transformers`` generate: same checkpoint, same prompts, same threads, interleaved rounds.

    python -m benchmarks.vs_transformers

Decode is measured after the first token on both sides: transformers is timed for one token and for all of them on the
same prompts and the difference taken, as its generate does not say when the first token came.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from benchmarks.checkpoints import checkpoint
from benchmarks.engines import run_batch
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from rich.console import Console
from rich.table import Table

from moestro.workers.loading import load_model
from moestro.workers.rank_setup import RankSpec, build_engine

PROMPT_TOKENS = 128
OUTPUT_TOKENS = 48
VOCABULARY = 8192


def peer_round(model: Any, prompts: torch.Tensor) -> tuple[float, float]:
    """(prefill seconds, decode tokens per second) of transformers."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(prompts)
    start = time.perf_counter()
    model.generate(prompts, attention_mask=mask, max_new_tokens=1, min_new_tokens=1, **options)
    prefill_s = time.perf_counter() - start
    start = time.perf_counter()
    model.generate(prompts, attention_mask=mask, max_new_tokens=OUTPUT_TOKENS, min_new_tokens=OUTPUT_TOKENS, **options)
    decode_s = time.perf_counter() - start - prefill_s
    return prefill_s, prompts.shape[0] * (OUTPUT_TOKENS - 1) / decode_s


def main(
    models: Annotated[str, typer.Option(help="Comma-separated names of benchmarks.checkpoints.")] = "tiny,mid",
    batches: Annotated[str, typer.Option(help="Comma-separated batch sizes.")] = "1,16",
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    seed: int = 0,
    folder: Annotated[Path, typer.Option(help="Where checkpoints are kept.")] = Path(".cache/checkpoints"),
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/vs_transformers.json"),
) -> None:
    """Decode and prefill of both engines; median and range over rounds."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    results = []
    for name in models.split(","):
        path = checkpoint(name, folder)
        peer = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, experts_implementation="grouped_mm")
        spec = RankSpec(model=str(path), kv_bytes=2**29, max_num_tokens=4096)
        engine = build_engine(spec, load_model(path), torch.device("cpu"))
        for batch in map(int, batches.split(",")):
            rows = []
            for number in range(-1, rounds):  # round -1 warms both sides up and is not counted
                generator = torch.Generator().manual_seed(seed * 1000 + number + 1)
                prompts = torch.randint(VOCABULARY, (batch, PROMPT_TOKENS), generator=generator)
                with torch.inference_mode():
                    peer_prefill_s, peer_decode = peer_round(peer, prompts)
                timing, _ = run_batch(engine, prompts.tolist(), OUTPUT_TOKENS)
                rows.append(
                    {
                        "ours_decode": timing.decode_tokens_per_s,
                        "peer_decode": peer_decode,
                        "decode_ratio": timing.decode_tokens_per_s / peer_decode,
                        "ours_prefill": batch * PROMPT_TOKENS / timing.prefill_s,
                        "peer_prefill": batch * PROMPT_TOKENS / peer_prefill_s,
                        "prefill_ratio": peer_prefill_s / timing.prefill_s,
                    }
                )
            results.append({"model": name, "batch": batch, "tokens_per_s": spread(rows[1:])})
        del peer, engine
    report(results)
    output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS, "threads": threads, "rounds": rounds}
    record = {"hardware": hardware_record(), "settings": settings | {"seed": seed}, "results": results}
    output.write_text(json.dumps(record, indent=2) + "\n")


def report(results: list[dict[str, Any]]) -> None:
    table = Table("model", "batch", "figure", "ours", "transformers", "ratio (range)", title="tokens per second")
    for result in results:
        figures = result["tokens_per_s"]
        for kind in ("decode", "prefill"):
            ratio = figures[f"{kind}_ratio"]
            table.add_row(
                result["model"],
                str(result["batch"]),
                kind,
                f"{figures[f'ours_{kind}']['median']:.0f}",
                f"{figures[f'peer_{kind}']['median']:.0f}",
                f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})",
            )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
