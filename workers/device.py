"""Process-wide switches: what a kind of device needs of torch."""

from __future__ import annotations

import torch


def configure_torch(kind: str) -> None:
    """To be called once by whoever owns the process, before the first step on a ``kind`` ("cpu" or "cuda").

    On CUDA it takes cuDNN out of the choice of ``scaled_dot_product_attention``: cuDNN builds an execution plan for
    every new shape, and each decode step has a number of keys that no step had before.
    """
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
