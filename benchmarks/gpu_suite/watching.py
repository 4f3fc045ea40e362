"""Models and mixtures that watch a step of the engine: how long the host and the device take, and which experts.

Legend: t tokens, K experts per token, M model width, E experts.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moestro.workers.batch import Batch
from moestro.workers.engine import Engine
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder
from moestro.workers.model.moe import ExpertBank, LocalMixture, MoeMlp
from moestro.workers.runner import Model

Values = dict[str, Any]


@dataclass(slots=True)
class ForwardClock:
    """A model that notes when the host entered and left its forward pass, and how long the device took for it."""

    model: Model
    entered_s: float = 0.0
    left_s: float = 0.0
    _events: tuple[Any, Any] | None = None

    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        on_cuda = batch.token_ids_T.is_cuda
        self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) if on_cuda else None
        self.entered_s = time.perf_counter()
        if self._events:
            self._events[0].record()
        logits_RV = self.model.forward(batch, cache)
        if self._events:
            self._events[1].record()
        self.left_s = time.perf_counter()
        return logits_RV

    def device_s(self) -> float | None:
        """From the first kernel of the forward pass to its last, gaps included. None without CUDA."""
        if self._events is None:
            return None
        self._events[1].synchronize()
        return float(self._events[0].elapsed_time(self._events[1])) / 1e3


def timed_step(engine: Engine, clock: ForwardClock) -> dict[str, float]:
    """One step of an engine whose model is ``clock``, split into the parts of the host's time (seconds)."""
    start = time.perf_counter()
    plan = engine.plan(start)
    planned = time.perf_counter()
    result = engine.runner.run(plan, (plan.num_tokens,))
    computed = time.perf_counter()
    engine.scheduler.apply(plan, result.sampled, computed, result.prompt_logprobs)
    end = time.perf_counter()
    split = {
        "step_s": end - start,
        "host_plan_s": planned - start,
        "host_build_batch_s": clock.entered_s - planned,
        "host_launch_forward_s": clock.left_s - clock.entered_s,
        "host_sample_and_wait_s": computed - clock.left_s,
        "host_apply_s": end - computed,
    }
    device_s = clock.device_s()
    return split if device_s is None else split | {"device_forward_s": device_s}


@dataclass(frozen=True, slots=True)
class CountingMixture:
    """A local mixture that keeps how many distinct experts each call reached."""

    of: LocalMixture
    distinct: list[Tensor]

    @property
    def bank(self) -> ExpertBank:
        return self.of.bank

    def forward(self, x_tM: Tensor, ids_tK: Tensor, *rest: Any) -> Tensor:
        reached_E = torch.zeros(self.bank.layout.slot_E.shape[0], dtype=torch.int64, device=ids_tK.device)
        self.distinct.append(reached_E.scatter_(0, ids_tK.reshape(-1), 1).sum())
        return self.of.forward(x_tM, ids_tK, *rest)


def counting(decoder: Decoder) -> tuple[Decoder, list[Tensor]]:
    """The same weights, with mixtures that count."""
    distinct: list[Tensor] = []

    def counted(mlp: MoeMlp) -> MoeMlp:
        mixture: Any = CountingMixture(mlp.mixture, distinct)
        return replace(mlp, mixture=mixture)

    layers = tuple(
        replace(layer, mlp=counted(layer.mlp)) if isinstance(layer.mlp, MoeMlp) else layer for layer in decoder.layers
    )
    return replace(decoder, layers=layers), distinct


def kernels_of(call: Any, num_steps: int, top: int = 12) -> Values:
    """torch's profiler over ``num_steps`` calls: time in kernels, their number, and those that took longest."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(num_steps):
            call()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.key_averages() if event.device_type == DeviceType.CUDA]
    if not kernels:
        raise RuntimeError("the profiler saw no kernel")
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total_s = sum(event.self_device_time_total for event in kernels) / 1e6 / num_steps
    count = sum(event.count for event in kernels) / num_steps
    return {
        "headline": f"{total_s * 1e3:.2f} ms in {count:.0f} kernels a step",
        "kernel_s_per_step": total_s,
        "kernels_per_step": count,
        "longest": [
            {
                "name": event.key[:120],
                "s_per_step": event.self_device_time_total / 1e6 / num_steps,
                "per_step": event.count / num_steps,
            }
            for event in kernels[:top]
        ],
    }
