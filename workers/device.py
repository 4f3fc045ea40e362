"""Process-wide switches: what a kind of device needs of torch, and what a rank needs of Python."""

from __future__ import annotations

import gc

import torch


def configure_torch(kind: str) -> None:
    """To be called once by whoever owns the process, before the first step on a ``kind`` ("cpu" or "cuda").

    On CUDA it takes cuDNN out of the choice of ``scaled_dot_product_attention``: cuDNN builds an execution plan for
    every new shape, and each decode step has a number of keys that no step had before.
    """
    if kind == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def freeze_heap() -> None:
    """To be called once by whoever owns the process, when everything is built: no later garbage collection walks what
    is there now. A full one through torch's and Ray's 300,000 objects would stop every sequence for 0.1 s."""
    gc.collect()
    gc.freeze()
