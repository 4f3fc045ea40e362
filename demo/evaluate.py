"""Measure the bundled demo model on held-out files and write `evaluation.json` and `experts.png`.

    python -m moestro.demo.evaluate

Legend: L layers, N tokens, k experts per token, E experts.
"""

import copy
import json
import math
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
import typer
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from moestro.demo import ngram
from moestro.demo.corpus import Document, Split, documents, is_held_out, tokenize
from moestro.demo.paths import DRAFT_DIR, MODEL_DIR
from moestro.demo.plot import plot_experts
from moestro.demo.scoring import agreement, score
from moestro.demo.specialisation import LayerReport, layer_report
from moestro.demo.syntax import CLASSES, UNKNOWN, token_classes

HERE = Path(__file__).resolve().parent
CACHE = Path(".cache/demo")
EXCERPT = HERE / "excerpt.txt"
EXCERPT_SOURCE = "wsgiref/util.py"
PROMPT_TOKENS = 64
# The third ends by itself; the last one falls into a loop, as greedy decoding of a small model often does.
PROMPTS = (
    "import os\nimport",
    "class Stack:\n    def __init__(self):\n        self",
    "if __name__ ==",
    "def __init__(self,",
)


def processor() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def quality(log_probs: npt.NDArray[np.float64], text_bytes: int) -> dict[str, float]:
    """Perplexity per token, and bits per byte of text, from natural-log probabilities."""
    nats = -float(log_probs.sum())
    return {
        "nats_per_token": nats / len(log_probs),
        "perplexity": math.exp(nats / len(log_probs)),
        "bits_per_byte": nats / math.log(2) / text_bytes,
    }


def held_out_labels(tokenizer: Tokenizer) -> npt.NDArray[np.int8]:
    """Syntactic class of each held-out token; the end-of-text tokens are `UNKNOWN`."""
    parts: list[npt.NDArray[np.int8]] = []
    for doc in documents():
        if is_held_out(doc.path):
            spans = tokenizer.encode(doc.text, add_special_tokens=False).offsets
            parts.append(token_classes(doc.text, spans))
            parts.append(np.asarray([UNKNOWN], dtype=np.int8))
    return np.concatenate(parts)


def rotated_experts(model: Any) -> Any:
    """A copy whose experts are moved one place round in every layer while the gates stay."""
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, value in moved.named_parameters():
            if ".mlp.experts." in name:
                value.copy_(value.roll(1, dims=0))
    return moved


def expert_reports(
    split: Split, labels_N: npt.NDArray[np.int8], chosen_LNk: npt.NDArray[np.int64], config: Any, seed: int
) -> list[LayerReport]:
    """Report per layer over the tokens whose class is known."""
    tokens, labels = split.tokens_N[:-1], labels_N[:-1]
    known = labels != UNKNOWN
    return [
        layer_report(
            tokens[known],
            labels[known],
            chosen_Nk[known],
            vocab=config.vocab_size,
            classes=len(CLASSES),
            experts=config.num_experts,
            seed=seed,
            draws=20,
        )
        for chosen_Nk in chosen_LNk
    ]


def load(folder: Path) -> Any:
    """A bundled model in bfloat16, ready for inference."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    return model.eval()


@torch.no_grad()
def completions(model: Any, tokenizer: Tokenizer) -> dict[str, str]:
    """Greedy continuations of the sample prompts."""
    texts = {}
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, add_special_tokens=False).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        texts[prompt] = tokenizer.decode(out[0, ids.shape[1] :].tolist())
    return texts


def excerpt_section(model: Any, baseline: ngram.KneserNey, tokenizer: Tokenizer) -> dict[str, Any]:
    """Both models on the one held-out file that is bundled, so that a test can check the numbers again."""
    text = EXCERPT.read_text()
    tokens = tokenize(tokenizer, [Document(EXCERPT_SOURCE, text)]).tokens_N
    return {
        "source": EXCERPT_SOURCE,
        "tokens": len(tokens),
        "model_perplexity": math.exp(-score(model, tokens).log_probs_N.mean()),
        "ngram_perplexity": math.exp(-baseline.log_probs(tokens)[1:].mean()),
    }


def draft_section(target: Any, tokenizer: Tokenizer, held: Split, seed: int) -> dict[str, Any]:
    """The draft's own quality, and its agreement with the target on held-out text and on sampled text."""
    draft = load(DRAFT_DIR)
    part = held.tokens_N[: 64 * 512].astype(np.int64)
    on_text = torch.from_numpy(part).view(-1, 512)
    torch.manual_seed(seed)
    prompts = torch.from_numpy(held.tokens_N[: 16 * 8192].astype(np.int64)).view(16, -1)[:, :PROMPT_TOKENS]
    # No token has id -1, so no sample stops early and all rows keep one length.
    written = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=128,
        do_sample=True,
        top_k=0,
        eos_token_id=-1,
    )
    log_probs = score(draft, held.tokens_N).log_probs_N
    return {
        "parameters": sum(p.numel() for p in draft.parameters()),
        **quality(log_probs, held.text_bytes),
        "agreement_on_held_out_text": asdict(agreement(target, draft, on_text)),
        "agreement_on_text_sampled_from_the_target": asdict(
            agreement(target, draft, written[:, :-1], first=PROMPT_TOKENS - 1)
        ),
    }


def evaluate(seed: int, order: int) -> dict[str, Any]:
    """Everything that goes into `evaluation.json`."""
    tokenizer = Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))
    docs = list(documents())
    held = tokenize(tokenizer, [doc for doc in docs if is_held_out(doc.path)])
    train = tokenize(tokenizer, [doc for doc in docs if not is_held_out(doc.path)])
    baseline = ngram.fit(train.tokens_N, order, tokenizer.get_vocab_size())
    baseline_scores = baseline.log_probs(held.tokens_N)[1:]

    model = load(MODEL_DIR)
    scores = score(model, held.tokens_N)
    assert scores.chosen_LNk is not None
    labels = held_out_labels(tokenizer)
    reports = expert_reports(held, labels, scores.chosen_LNk, model.config, seed)

    subset = held.tokens_N[:32769]
    intact = score(model, subset).log_probs_N
    moved = score(rotated_experts(model), subset).log_probs_N
    return {
        "hardware": {"processor": processor(), "threads": torch.get_num_threads(), "device": "cpu"},
        "software": {"python": sys.version.split()[0], "torch": torch.__version__, "dtype": "bfloat16"},
        "seed": seed,
        "data": {
            "train_tokens": len(train.tokens_N),
            "train_bytes": train.text_bytes,
            "held_out_tokens": len(held.tokens_N),
            "held_out_bytes": held.text_bytes,
            "held_out_files": len(held.starts_D),
        },
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            **quality(scores.log_probs_N, held.text_bytes),
        },
        "ngram": {
            "order": order,
            "smoothing": "modified Kneser-Ney",
            **quality(baseline_scores, held.text_bytes),
        },
        "excerpt": excerpt_section(model, baseline, tokenizer),
        "experts": {
            "classes": CLASSES,
            "class_share": np.bincount(labels[labels != UNKNOWN], minlength=len(CLASSES)).tolist(),
            "layers": [asdict(report) for report in reports],
            "rotation": {
                "tokens": len(intact),
                "perplexity_intact": math.exp(-intact.mean()),
                "perplexity_rotated": math.exp(-moved.mean()),
            },
        },
        "draft": draft_section(model, tokenizer, held, seed) if DRAFT_DIR.exists() else None,
        "completions": completions(model, tokenizer),
    }


def rounded(value: Any) -> Any:
    """Floats to five significant digits, for a readable file."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def record(cache: Path, name: str, previous: dict[str, Any]) -> Any:
    """The cache's record of a training run, or else what the previous evaluation says about it."""
    file = cache / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else previous.get(name)


def main(
    seed: Annotated[int, typer.Option(help="Seeds shuffles and samples.")] = 20,
    order: Annotated[int, typer.Option(help="Order of the n-gram baseline.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder with the records of the training runs.")] = CACHE,
    output: Annotated[Path, typer.Option(help="Folder of evaluation.json and experts.png.")] = HERE,
) -> None:
    """Evaluate the bundled model and its draft on the held-out files."""
    torch.set_num_threads(threads)
    target = output / "evaluation.json"
    previous = json.loads(target.read_text()) if target.exists() else {}
    result = evaluate(seed, order)
    for name in ("training", "distillation"):
        result[name] = record(cache, name, previous)
    layers = result["experts"]["layers"]
    plot_experts(layers, CLASSES, output / "experts.png")
    result = rounded(result)
    target.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: result[key] for key in ("model", "ngram", "draft", "completions")}, indent=1))


if __name__ == "__main__":
    typer.run(main)
