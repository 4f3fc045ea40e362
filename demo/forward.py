"""A compact training forward for Qwen3-MoE and dense Qwen3 over the parameters of the transformers model.

The parameters are those of `Qwen3MoeForCausalLM` or `Qwen3ForCausalLM`, by their names, so what is trained is
what `save_pretrained` writes. Only the order of work differs: tokens are sorted by expert once per layer,
each expert is one matrix product, and the vocabulary projection is fused with its loss.

Legend: B sequences, T positions, N = B * T tokens, A = N * top_k assignments, H query heads, K KV heads,
D head width, M hidden width, F expert width, E experts, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Params = Mapping[str, Tensor]

# Up to this length one bmm, one softmax and one bmm beat the CPU's blockwise attention kernel.
MATERIALIZED_ATTENTION = 512


class Shape(NamedTuple):
    """Sizes of one attention call, and the epsilon of its norms."""

    B: int
    T: int
    H: int
    K: int
    D: int
    eps: float


@dataclass(frozen=True)
class Hidden:
    """Output of the decoder stack: final normed states, and the gate's choices of each sparse layer."""

    states_NM: Tensor
    balance_loss: Tensor
    chosen_LNk: list[Tensor]


def rope_table(length: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine tables [T, 1, D] in the half-rotated layout of transformers."""
    inverse_D = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles_TD = torch.outer(torch.arange(length, dtype=torch.float32), inverse_D).repeat(1, 2)
    return angles_TD.cos()[:, None], angles_TD.sin()[:, None]


def _rotate(x_BTHD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    low, high = x_BTHD.chunk(2, dim=-1)
    return x_BTHD * cos_TD + torch.cat((-high, low), dim=-1) * sin_TD


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in float32 of the last axis, returned in bfloat16."""
    x = x.float()
    scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)
    return (x * scale * weight).to(torch.bfloat16)


def _attention(w: Params, x_NM: Tensor, cos: Tensor, sin: Tensor, shape: Shape) -> Tensor:
    """Residual stream in, residual stream plus causal self-attention out."""
    B, T, H, K, D, eps = shape
    h_NM = _norm(x_NM, w["input_layernorm.weight"], eps)
    weight = torch.cat([w[f"self_attn.{name}_proj.weight"] for name in "qkv"]).to(torch.bfloat16)
    q, k, v = torch.split(F.linear(h_NM, weight).view(B, T, H + 2 * K, D), [H, K, K], dim=2)
    q = _rotate(_norm(q, w["self_attn.q_norm.weight"], eps), cos, sin).transpose(1, 2)
    k = _rotate(_norm(k, w["self_attn.k_norm.weight"], eps), cos, sin).transpose(1, 2)
    k = k.repeat_interleave(H // K, dim=1)
    v = v.transpose(1, 2).repeat_interleave(H // K, dim=1)
    if T <= MATERIALIZED_ATTENTION and x_NM.device.type == "cpu":
        mask_TT = torch.full((T, T), float("-inf"), device=x_NM.device).triu(1)
        scores = (q @ k.transpose(-1, -2)).float() * D**-0.5 + mask_TT
        out = scores.softmax(dim=-1).to(torch.bfloat16) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    flat = out.transpose(1, 2).reshape(B * T, H * D)
    return x_NM + F.linear(flat, w["self_attn.o_proj.weight"].to(torch.bfloat16))


def _gate(w: Params, x_NM: Tensor, eps: float, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    h_NM = _norm(x_NM, w["post_attention_layernorm.weight"], eps)
    logits_NE = F.linear(h_NM, w["mlp.gate.weight"].to(torch.bfloat16)).float()
    probs_NE = logits_NE.softmax(dim=-1)
    weight_Nk, chosen_Nk = probs_NE.topk(top_k, dim=-1)
    weight_Nk = weight_Nk / weight_Nk.sum(dim=-1, keepdim=True)
    return h_NM, probs_NE.mean(dim=0), weight_Nk, chosen_Nk


def _swiglu(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return F.silu(gate) * up


def _mix(x_NM: Tensor, out_AM: Tensor, weight_Nk: Tensor) -> Tensor:
    """Add the top_k expert outputs of each token, in a fixed order, to the residual stream."""
    out_NkM = out_AM.view(*weight_Nk.shape, x_NM.shape[-1]).float()
    return x_NM + (out_NkM * weight_Nk[..., None]).sum(dim=1)


class _Permute(torch.autograd.Function):
    """Rows of `x` in the order `index`, whose gradient is again a gather: `inverse` undoes `index`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return x.index_select(0, index // copies if copies > 1 else index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse,) = ctx.saved_tensors
        grad = grads[0].index_select(0, inverse)
        if ctx.copies > 1:
            grad = grad.view(-1, ctx.copies, grad.shape[-1]).sum(dim=1)
        return grad, None, None, None


def _experts(w: Params, x_NM: Tensor, config: Any, pieces: "Pieces") -> tuple[Tensor, Tensor, Tensor]:
    E, top_k = config.num_experts, config.num_experts_per_tok
    h_NM, mean_prob_E, weight_Nk, chosen_Nk = pieces.gate(w, x_NM, config.rms_norm_eps, top_k)
    flat_A = chosen_Nk.reshape(-1)
    order_A = flat_A.argsort(stable=True)
    inverse_A = torch.empty_like(order_A)
    inverse_A[order_A] = torch.arange(len(order_A), device=order_A.device)
    counts_E = torch.bincount(flat_A, minlength=E)
    sorted_AM = _Permute.apply(h_NM, order_A, inverse_A, top_k)  # type: ignore[no-untyped-call]
    gate_up = w["mlp.experts.gate_up_proj"].to(torch.bfloat16).unbind()
    down = w["mlp.experts.down_proj"].to(torch.bfloat16).unbind()
    counts = counts_E.tolist()
    ups = [F.linear(row, gate_up[e]) for e, row in enumerate(torch.split(sorted_AM, counts))]
    acts_AF = pieces.swiglu(torch.cat(ups))
    outs = [F.linear(row, down[e]) for e, row in enumerate(torch.split(acts_AF, counts))]
    out_AM = _Permute.apply(torch.cat(outs), inverse_A, order_A, 1)  # type: ignore[no-untyped-call]
    # Switch Transformer's load-balancing loss (Fedus et al. 2021, eq. 4), for top_k choices: 1 when balanced.
    share_E = counts_E / len(flat_A)
    return pieces.mix(x_NM, out_AM, weight_Nk), E * (share_E * mean_prob_E).sum(), chosen_Nk


def _dense(w: Params, x_NM: Tensor, eps: float) -> Tensor:
    h_NM = _norm(x_NM, w["post_attention_layernorm.weight"], eps)
    both = torch.cat((w["mlp.gate_proj.weight"], w["mlp.up_proj.weight"])).to(torch.bfloat16)
    return x_NM + F.linear(_swiglu(F.linear(h_NM, both)), w["mlp.down_proj.weight"].to(torch.bfloat16))


def _loss_chunk(logits_NV: Tensor, target_N: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Summed loss of a chunk, and the gradient of `scale` times that sum with respect to the logits."""
    logits = logits_NV.float()
    logprobs = logits - logits.logsumexp(dim=-1, keepdim=True)
    hit_NV = torch.arange(logits.shape[-1], device=logits.device) == target_N[:, None]
    loss = -torch.where(hit_NV, logprobs, 0.0).sum()
    return loss, ((logprobs.exp() - hit_NV.float()) * scale).to(torch.bfloat16)


@dataclass(frozen=True)
class Pieces:
    """The elementwise-heavy parts of the forward, as plain or as compiled functions."""

    attention: Callable[..., Tensor] = _attention
    gate: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]] = _gate
    swiglu: Callable[..., Tensor] = _swiglu
    mix: Callable[..., Tensor] = _mix
    dense: Callable[..., Tensor] = _dense
    loss_chunk: Callable[..., tuple[Tensor, Tensor]] = _loss_chunk


def compiled_pieces() -> Pieces:
    """The same parts through torch.compile, which fuses their elementwise work (about 2x on one CPU core)."""
    names = [field.name for field in fields(Pieces)]
    return Pieces(**{name: torch.compile(getattr(Pieces, name), dynamic=False) for name in names})


PLAIN = Pieces()


def decoder(params: Params, ids_BT: Tensor, config: Any, pieces: Pieces = PLAIN) -> Hidden:
    """Run the decoder stack on whole sequences from position 0.

    Master weights stay float32; matrix products run in bfloat16, the residual stream in float32.

    Args:
        params: float32 master parameters by their transformers names.
        ids_BT: token ids.
        config: the transformers configuration of the model.
        pieces: plain or compiled parts.
    """
    B, T = ids_BT.shape
    shape = Shape(B, T, config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.rms_norm_eps)
    cos, sin = rope_table(T, config.head_dim, config.rope_parameters["rope_theta"])
    cos, sin = cos.to(ids_BT.device, torch.bfloat16), sin.to(ids_BT.device, torch.bfloat16)
    x_NM = F.embedding(ids_BT.reshape(-1), params["model.embed_tokens.weight"])
    balance = x_NM.new_zeros(())
    chosen = []
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        w = {name.removeprefix(prefix): p for name, p in params.items() if name.startswith(prefix)}
        x_NM = pieces.attention(w, x_NM, cos, sin, shape)
        if "mlp.gate.weight" in w:
            x_NM, loss, chosen_Nk = _experts(w, x_NM, config, pieces)
            balance = balance + loss / config.num_hidden_layers
            chosen.append(chosen_Nk)
        else:
            x_NM = pieces.dense(w, x_NM, config.rms_norm_eps)
    return Hidden(_norm(x_NM, params["model.norm.weight"], config.rms_norm_eps), balance, chosen)


class _FusedCrossEntropy(torch.autograd.Function):
    """Mean next-token loss of a linear head, whose gradient is formed chunk by chunk in the forward pass.

    The N x V logits are never held whole: at V = 4096 they would be most of the step's memory traffic.
    """

    CHUNK = 512

    @staticmethod
    def forward(
        ctx: Any, states_NM: Tensor, head_VM: Tensor, targets_N: Tensor, loss_chunk: Callable[..., Any]
    ) -> Tensor:
        n = len(targets_N)
        grad_states = torch.empty_like(states_NM)
        grad_head = torch.zeros(head_VM.shape, dtype=torch.float32, device=head_VM.device)
        total = torch.zeros((), dtype=torch.float32, device=head_VM.device)
        for start in range(0, n, _FusedCrossEntropy.CHUNK):
            part = slice(start, start + _FusedCrossEntropy.CHUNK)
            loss, grad = loss_chunk(F.linear(states_NM[part], head_VM), targets_N[part], 1 / n)
            total += loss
            grad_states[part] = grad @ head_VM
            grad_head += grad.T @ states_NM[part]
        ctx.save_for_backward(grad_states, grad_head)
        return total / n

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grads[0].to(grad_states.dtype), grad_head * grads[0], None, None


def cross_entropy(states_NM: Tensor, head_VM: Tensor, targets_N: Tensor, pieces: Pieces = PLAIN) -> Tensor:
    """Mean next-token cross-entropy in nats, without holding the logits."""
    head = head_VM.to(torch.bfloat16)
    return _FusedCrossEntropy.apply(states_NM, head, targets_N, pieces.loss_chunk)  # type: ignore[no-untyped-call,no-any-return]
