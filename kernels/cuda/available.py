"""Whether the Triton kernels can serve, found out without importing Triton."""

from __future__ import annotations

from importlib.util import find_spec

import torch

_LEAST_CAPABILITY = (9, 0)  # Hopper: the kernels' promise of equal bits is that of its matrix instructions


def why_not_cuda(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if they can."""
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype != torch.bfloat16:
        return f"the weights are {str(dtype).removeprefix('torch.')} and not bfloat16"
    if find_spec("triton") is None:
        return "triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return f"the device has compute capability {capability[0]}.{capability[1]}, less than 9.0"
    return None
