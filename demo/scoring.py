"""Run a bundled model over text with transformers and record what the evaluation needs.

Legend: B windows, T positions, N tokens, L layers, k experts per token, V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch


@dataclass(frozen=True)
class Scores:
    """Natural-log probability of tokens 1..N-1, and the experts chosen at tokens 0..N-2 per layer."""

    log_probs_N: npt.NDArray[np.float64]
    chosen_LNk: npt.NDArray[np.int64] | None


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Triples (start, end, first new position): each position is new once, with `window - stride` context."""
    start = 0
    while True:
        end = min(start + window, length)
        yield start, end, start if start == 0 else start + window - stride
        if end == length:
            return
        start += stride


@torch.no_grad()
def score(model: Any, tokens_N: npt.NDArray[np.integer], window: int = 1024, stride: int = 512) -> Scores:
    """Score each token with at least `window - stride` tokens of context (where the text has them)."""
    ids = torch.from_numpy(tokens_N.astype(np.int64)).to(model.device)
    sparse = hasattr(model.config, "num_experts")
    log_probs: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    for start, end, new in windows(len(ids) - 1, window, stride):
        extra = {"output_router_logits": True} if sparse else {}
        out = model(ids[None, start:end], use_cache=False, **extra)
        logits = out.logits[0, new - start :].float()
        targets = ids[new + 1 : end + 1]
        log_probs.append(logits.log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].double().cpu())
        if sparse:
            top_k = model.config.num_experts_per_tok
            layers = [router[new - start :].float().topk(top_k).indices for router in out.router_logits]
            chosen.append(torch.stack(layers).cpu())
    experts = torch.cat(chosen, dim=1).numpy() if sparse else None
    return Scores(torch.cat(log_probs).numpy(), experts)


@dataclass(frozen=True)
class Agreement:
    """How well a draft predicts its target on the same contexts, at temperature 1.

    Attributes:
        greedy_match: share of positions where both have the same most likely token.
        acceptance: mean of sum_v min(p, q), the chance that speculative sampling accepts a drafted token
            (Leviathan et al. 2023, corollary 3.6).
    """

    positions: int
    greedy_match: float
    acceptance: float


@torch.no_grad()
def agreement(target: Any, draft: Any, ids_BT: torch.Tensor, first: int = 0) -> Agreement:
    """Compare two models on windows, over positions `first` and later of each window."""
    match, accepted, count = 0.0, 0.0, 0
    for rows in torch.split(ids_BT, 4):
        p = target(rows, use_cache=False).logits[:, first:].float().softmax(dim=-1)
        q = draft(rows, use_cache=False).logits[:, first:].float().softmax(dim=-1)
        match += (p.argmax(dim=-1) == q.argmax(dim=-1)).sum().item()
        accepted += torch.minimum(p, q).sum().item()
        count += p.shape[0] * p.shape[1]
    return Agreement(count, match / count, accepted / count)
