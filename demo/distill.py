"""Distil the trained MoE into a small dense draft for speculative decoding.

    python -m moestro.demo.distill --minutes 9

The draft learns the target's whole next-token distribution (forward KL at temperature 1) on training text, on
which its acceptance in speculative sampling depends.

Legend: B sequences, T positions, N tokens, M hidden width, V vocabulary.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F  # noqa: N812
import typer
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeForCausalLM

from moestro.demo.forward import PLAIN, Pieces, compiled_pieces, decoder
from moestro.demo.paths import DRAFT_DIR
from moestro.demo.train import (
    CACHE,
    VOCAB,
    Recipe,
    fixed_windows,
    learning_rate,
    model_config,
    optimizer_for,
    prepare,
    sample_windows,
    save_model,
)

EMBEDDING = "model.embed_tokens.weight"

app = typer.Typer(add_completion=False)


def draft_config() -> Qwen3Config:
    """A dense model of about a tenth of the target's size; half of it is the shared-vocabulary embedding."""
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=2048,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )


def divergence_chunk(student_NV: Tensor, teacher_NV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Summed KL(teacher || student) of a chunk, and the gradient of `scale` times it for the student."""
    student = student_NV.float().log_softmax(dim=-1)
    teacher = teacher_NV.float().log_softmax(dim=-1)
    p = teacher.exp()
    loss = (p * (teacher - student)).sum()
    return loss, ((student.exp() - p) * scale).to(torch.bfloat16)


class _FusedDivergence(torch.autograd.Function):
    """Mean KL of two tied-embedding heads, formed chunk by chunk so that no N x V logits are held."""

    CHUNK = 512

    @staticmethod
    def forward(
        ctx: Any,
        states_NM: Tensor,
        head_VM: Tensor,
        teacher: tuple[Tensor, Tensor],
        chunk: Callable[..., Any],
    ) -> Tensor:
        teacher_states, teacher_head = teacher
        n = len(states_NM)
        grad_states = torch.empty_like(states_NM)
        grad_head = torch.zeros(head_VM.shape, dtype=torch.float32, device=head_VM.device)
        total = torch.zeros((), dtype=torch.float32, device=head_VM.device)
        for start in range(0, n, _FusedDivergence.CHUNK):
            part = slice(start, start + _FusedDivergence.CHUNK)
            student_logits = F.linear(states_NM[part], head_VM)
            teacher_logits = F.linear(teacher_states[part], teacher_head)
            loss, grad = chunk(student_logits, teacher_logits, 1 / n)
            total += loss
            grad_states[part] = grad @ head_VM
            grad_head += grad.T @ states_NM[part]
        ctx.save_for_backward(grad_states, grad_head)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grads[0].to(grad_states.dtype), grad_head * grads[0], None, None


def divergence(
    states_NM: Tensor,
    head_VM: Tensor,
    teacher: tuple[Tensor, Tensor],
    chunk: Callable[..., Any] = divergence_chunk,
) -> Tensor:
    """Mean KL(teacher || student) in nats; `teacher` holds the target's final states and head in bfloat16."""
    return _FusedDivergence.apply(states_NM, head_VM.to(torch.bfloat16), teacher, chunk)  # type: ignore[no-untyped-call,no-any-return]


def projected_embedding(teacher_VM: Tensor, width: int, spread: float) -> Tensor:
    """The target's embedding on its leading principal directions, with standard deviation `spread`.

    A start from the target's own geometry saves the draft from learning 4096 vectors from nothing.
    """
    _, _, directions = torch.linalg.svd(teacher_VM, full_matrices=False)
    projected_VM: Tensor = teacher_VM @ directions[:width].T
    scaled_VM: Tensor = projected_VM * (spread / projected_VM.std())
    return scaled_VM


@app.command()
def fit(
    minutes: Annotated[float, typer.Option(help="The schedule's length in minutes of training.")] = 9.0,
    seed: Annotated[int, typer.Option(help="Seeds the weights and the order of the data.")] = 21,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    cache: Annotated[Path, typer.Option(help="Folder with the target's checkpoint.")] = CACHE,
    folder: Annotated[Path, typer.Option(help="Where the draft is written.")] = DRAFT_DIR,
    projected: Annotated[bool, typer.Option(help="Start from the target's embedding.")] = True,
    compiled: Annotated[bool, typer.Option(help="Use torch.compile.")] = True,
) -> None:
    """Distil until the budget is used, then write the draft in the Hugging Face layout."""
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    recipe = Recipe(peak_lr=4e-3, warmup_steps=60, weight_decay=0.05)
    tokenizer, train_split, held_split = prepare(cache)
    target = Qwen3MoeForCausalLM(model_config())
    target.load_state_dict(torch.load(cache / "checkpoint.pt", map_location="cpu", weights_only=True)["model"])
    target.to(device)  # type: ignore[arg-type]
    # The target as it will be served: rounded to bfloat16.
    target_params = {name: p.detach().bfloat16().float() for name, p in target.named_parameters()}
    teacher_head = target_params[EMBEDDING].bfloat16()

    torch.manual_seed(seed)
    draft = Qwen3ForCausalLM(draft_config())
    draft.to(device)  # type: ignore[arg-type]
    params = dict(draft.named_parameters())
    if projected:
        with torch.no_grad():
            params[EMBEDDING].copy_(projected_embedding(target_params[EMBEDDING], params[EMBEDDING].shape[1], 0.05))
    optimizer = optimizer_for(params, recipe)
    pieces: Pieces = compiled_pieces() if compiled else PLAIN
    chunk = torch.compile(divergence_chunk, dynamic=False) if compiled else divergence_chunk
    validation = fixed_windows(held_split, 16, 512).to(device)

    def measure(ids_BT: Tensor, with_pieces: Pieces, with_chunk: Callable[..., Any]) -> Tensor:
        with torch.no_grad():
            teacher_states = decoder(target_params, ids_BT, target.config, with_pieces).states_NM
        states = decoder(params, ids_BT, draft.config, with_pieces).states_NM
        return divergence(states, params[EMBEDDING], (teacher_states, teacher_head), with_chunk)

    step, elapsed = 0, 0.0
    while elapsed < 60 * minutes:
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, elapsed / (60 * minutes))
        loss = measure(sample_windows(train_split, seed, step)[:, :-1].to(device), pieces, chunk)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(params.values(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        elapsed += time.perf_counter() - began
        if step % 20 == 0:
            print(f"step {step} {elapsed:.0f}s divergence {loss.item():.4f}", flush=True)
    with torch.no_grad():
        held = measure(validation[:, :-1], PLAIN, divergence_chunk).item()
    print(f"held-out divergence {held:.4f} nats after {step} steps", flush=True)
    save_model(draft, tokenizer, folder)
    record = {"step": step, "elapsed": elapsed, "held_out_divergence": held, "seed": seed}
    (cache / "distillation.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    app()
