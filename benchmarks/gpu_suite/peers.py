"""The same mixture by others: transformers' experts module, and vLLM's fused kernel where it can be imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from torch import Tensor

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
VLLM_FOLDER = "MOESTRO_VLLM"
"""The environment variable that names a folder with vLLM in it; see ``vllm_parts.md``."""


def peers(gate_up: Sequence[Tensor], down: Sequence[Tensor], top_k: int) -> dict[str, list[Mix] | str]:
    """By name: one mixture for each copy of the weights, gate_up_E2IM and down_EMI, or why there is none."""
    found: dict[str, list[Mix] | str] = {}
    for name, make in (("transformers", _transformers), ("vllm", _vllm)):
        try:
            found[name] = [make(*weights, top_k) for weights in zip(gate_up, down, strict=True)]
        except Exception as error:  # whatever keeps a peer from being there is its reason
            found[name] = f"{type(error).__name__}: {error}"
    return found


def _transformers(gate_up_E2IM: Tensor, down_EMI: Tensor, top_k: int) -> Mix:
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    num_experts, model_width, width = down_EMI.shape
    config = Qwen3MoeConfig(
        hidden_size=model_width,
        moe_intermediate_size=width,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        experts = Qwen3MoeExperts(config)
    experts.gate_up_proj = torch.nn.Parameter(gate_up_E2IM, requires_grad=False)
    experts.down_proj = torch.nn.Parameter(down_EMI, requires_grad=False)
    return lambda x_TM, ids_TK, weights_TK: experts(x_TM, ids_TK, weights_TK.to(x_TM.dtype))


def _vllm(gate_up_E2IM: Tensor, down_EMI: Tensor, top_k: int) -> Mix:
    if folder := os.environ.get(VLLM_FOLDER):
        sys.path.insert(0, folder)
    from vllm.model_executor.layers.fused_moe import fused_experts

    return lambda x_TM, ids_TK, weights_TK: fused_experts(
        x_TM, gate_up_E2IM, down_EMI, weights_TK.float(), ids_TK.int(), inplace=False
    )
