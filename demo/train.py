"""Train the demo's Qwen3-MoE on the standard library's own source.

    python -m moestro.demo.train fit --minutes 63     # about an hour on one CPU core; uses CUDA if present
    python -m moestro.demo.train export demo/moestro-demo    # last checkpoint -> Hugging Face layout, bfloat16

Legend: B sequences, T positions.
"""

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3MoeConfig, Qwen3MoeForCausalLM

from moestro.demo.corpus import Split, documents, is_held_out, tokenize
from moestro.demo.forward import PLAIN, Pieces, compiled_pieces, cross_entropy, decoder
from moestro.demo.tokenizer import EOS, IM_END, save_tokenizer, train_tokenizer

CACHE = Path(".cache/demo")
VOCAB = 4096
TOKENS_PER_STEP = 4096
# Most windows are short, because short windows are cheap; the long ones teach positions up to 1024.
LENGTHS = (256, 512, 1024)
LENGTH_SHARES = (0.65, 0.25, 0.10)
DOCUMENT_START_SHARE = 0.1

app = typer.Typer(add_completion=False, no_args_is_help=True)


@dataclass(frozen=True)
class Recipe:
    """Hyperparameters of the optimisation."""

    peak_lr: float = 3e-3
    final_lr_share: float = 0.02
    warmup_steps: int = 150
    weight_decay: float = 0.1
    balance_weight: float = 0.01
    max_grad_norm: float = 1.0


def model_config() -> Qwen3MoeConfig:
    """The demo's architecture: 8.1M parameters, of which 3.7M act on a token (head included)."""
    return Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=160,
        norm_topk_prob=True,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=2048,
        router_aux_loss_coef=0.01,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )


def learning_rate(recipe: Recipe, step: int, progress: float) -> float:
    """Linear warm-up by steps, then a cosine of the share of the budget that is used (0 to 1)."""
    floor = recipe.final_lr_share
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return recipe.peak_lr * min(1.0, (step + 1) / recipe.warmup_steps) * (floor + (1 - floor) * cosine)


def sample_windows(split: Split, seed: int, step: int) -> torch.Tensor:
    """Token windows [B, T + 1] of one step, a function of seed and step alone: resuming repeats nothing."""
    rng = np.random.default_rng((seed, step))
    length = int(rng.choice(LENGTHS, p=LENGTH_SHARES))
    count = TOKENS_PER_STEP // length
    last = len(split.tokens_N) - length - 1
    offsets = rng.integers(0, last, count)
    at_start = rng.random(count) < DOCUMENT_START_SHARE
    offsets[at_start] = np.minimum(rng.choice(split.starts_D, int(at_start.sum())), last)
    rows = np.stack([split.tokens_N[offset : offset + length + 1] for offset in offsets])
    return torch.from_numpy(rows.astype(np.int64))


def prepare(cache: Path) -> tuple[Tokenizer, Split, Split]:
    """Tokenizer, training split and held-out split; made once, then read from `cache`."""
    cache.mkdir(parents=True, exist_ok=True)
    docs = list(documents())
    train_docs = [doc for doc in docs if not is_held_out(doc.path)]
    held_docs = [doc for doc in docs if is_held_out(doc.path)]
    saved = cache / "tokenizer.json"
    if not saved.exists():
        train_tokenizer((doc.text for doc in train_docs), VOCAB).save(str(saved))
    tokenizer = Tokenizer.from_file(str(saved))
    return tokenizer, tokenize(tokenizer, train_docs), tokenize(tokenizer, held_docs)


def fixed_windows(split: Split, count: int, length: int) -> torch.Tensor:
    """Evenly spaced windows [count, length + 1] of a split."""
    offsets = np.linspace(0, len(split.tokens_N) - length - 1, count).astype(np.int64)
    rows = np.stack([split.tokens_N[offset : offset + length + 1] for offset in offsets])
    return torch.from_numpy(rows.astype(np.int64))


@torch.no_grad()
def held_out_loss(params: Mapping[str, torch.Tensor], windows_BT: torch.Tensor, config: Any) -> float:
    """Mean loss in nats per token over fixed windows."""
    device = params["model.embed_tokens.weight"].device
    losses = []
    for rows in torch.split(windows_BT.to(device), 8):
        hidden = decoder(params, rows[:, :-1], config)
        head = params["model.embed_tokens.weight"]
        losses.append(cross_entropy(hidden.states_NM, head, rows[:, 1:].reshape(-1)).item())
    return sum(losses) / len(losses)


def initial_model(seed: int) -> Qwen3MoeForCausalLM:
    """A fresh float32 model, with the branches' output projections scaled down by depth (as in GPT-2)."""
    torch.manual_seed(seed)
    model = Qwen3MoeForCausalLM(model_config())
    scale = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                value.mul_(scale)
    return model


def optimizer_for(params: Mapping[str, torch.Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves norms alone."""
    matrices = [value for value in params.values() if value.dim() > 1]
    vectors = [value for value in params.values() if value.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.peak_lr, betas=(0.9, 0.95), fused=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write atomically, so that a kill leaves the previous checkpoint whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


@app.command()
def fit(
    minutes: Annotated[float, typer.Option(help="The schedule's length in minutes of training.")] = 63.0,
    steps: Annotated[int, typer.Option(help="If positive, the schedule's length in steps instead.")] = 0,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the order of the data.")] = 20,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder of checkpoints, outside git.")] = CACHE,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
    checkpoint_seconds: Annotated[float, typer.Option(help="Seconds between checkpoints.")] = 180.0,
) -> None:
    """Train until the budget is used, resuming from the cache's checkpoint if there is one."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe()
    _, train_split, held_split = prepare(cache)
    print(f"train {len(train_split.tokens_N)} tokens, held out {len(held_split.tokens_N)}", flush=True)
    model = initial_model(seed)
    model.to(device)  # type: ignore[arg-type]
    params = dict(model.named_parameters())
    optimizer = optimizer_for(params, recipe)
    pieces: Pieces = compiled_pieces() if compiled else PLAIN
    checkpoint = cache / "checkpoint.pt"
    step, elapsed = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, elapsed = state["step"], state["elapsed"]
        print(f"resumed at step {step}", flush=True)
    validation = fixed_windows(held_split, 32, 512)

    def save(held: float) -> None:
        summary = {"step": step, "elapsed": elapsed, "held_out_loss": held, "seed": seed}
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        save_checkpoint(checkpoint, {**state, **summary})
        details = {
            **summary,
            "tokens": step * TOKENS_PER_STEP,
            "threads": threads,
            "device": str(device),
            "recipe": asdict(recipe),
            "train_tokens": len(train_split.tokens_N),
        }
        (cache / "training.json").write_text(json.dumps(details, indent=2) + "\n")
        print(f"step {step} held-out {held:.4f} saved", flush=True)

    saved_at = elapsed
    while True:
        progress = step / steps if steps > 0 else elapsed / (60 * minutes)
        if progress >= 1.0:
            break
        began = time.perf_counter()
        rate = learning_rate(recipe, step, progress)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = sample_windows(train_split, seed, step).to(device)
        hidden = decoder(params, rows[:, :-1], model.config, pieces)
        head = params["model.embed_tokens.weight"]
        loss = cross_entropy(hidden.states_NM, head, rows[:, 1:].reshape(-1), pieces)
        (loss + recipe.balance_weight * hidden.balance_loss).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(params.values(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        step += 1
        elapsed += time.perf_counter() - began
        if step % 20 == 0 or step < 5:
            print(
                f"step {step} {elapsed:.0f}s loss {value:.4f} balance {hidden.balance_loss.item():.3f} "
                f"norm {norm.item():.2f} lr {rate:.2e} {step * TOKENS_PER_STEP / elapsed:.0f} tok/s",
                flush=True,
            )
        if elapsed - saved_at >= checkpoint_seconds:
            began = time.perf_counter()
            save(held_out_loss(params, validation, model.config))
            elapsed += time.perf_counter() - began
            saved_at = elapsed
    save(held_out_loss(params, validation, model.config))


def save_model(model: Any, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a bfloat16 model with its tokenizer and generation settings in the Hugging Face layout."""
    eos_id, end_of_turn = tokenizer.token_to_id(EOS), tokenizer.token_to_id(IM_END)
    model = model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=[eos_id, end_of_turn],
        pad_token_id=eos_id,
        do_sample=True,  # a model of this size repeats itself when decoded greedily
        temperature=0.6,
        top_p=0.95,
    )
    model.save_pretrained(folder)
    config_file = folder / "config.json"
    config = json.loads(config_file.read_text())
    if "num_local_experts" in config:
        # Published Qwen3-MoE checkpoints say num_experts: transformers reads both, other engines only that.
        config["num_experts"] = config.pop("num_local_experts")
    config_file.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder, model.config.max_position_embeddings)


@app.command()
def export(
    folder: Annotated[Path, typer.Argument(help="Where the Hugging Face layout is written.")],
    cache: Annotated[Path, typer.Option(help="Folder of checkpoints.")] = CACHE,
) -> None:
    """Write the last checkpoint as a bfloat16 model that transformers loads unchanged."""
    state = torch.load(cache / "checkpoint.pt", map_location="cpu", weights_only=True)
    model = Qwen3MoeForCausalLM(model_config())
    model.load_state_dict(state["model"])
    save_model(model, Tokenizer.from_file(str(cache / "tokenizer.json")), folder)
    print(f"step {state['step']}, held-out loss {state['held_out_loss']:.4f} -> {folder}")


if __name__ == "__main__":
    app()
