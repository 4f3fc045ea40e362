"""The process group path with one rank: NCCL on CUDA, gloo (and said so) on a CPU.

One rank shows that groups form, that bytes arrive and that the engine runs through them; it says nothing of several.

Legend: T tokens, D model width, K experts per token, E experts.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt
from benchmarks.gpu_suite.engines import follow, make_engine
from benchmarks.small_models import make_model, random_ids, save_model

from moestro.kernels.grouped_experts import ExpertShape, GroupedExperts, make_experts
from moestro.router.expert_parallel import over_group
from moestro.router.mesh import Mesh, MeshTensorParallel, join, serve_store
from moestro.router.parallel import GroupShape
from moestro.router.placement import spread
from moestro.router.transport import LocalTransport, Transport
from moestro.router.transports.all_to_all import AllToAllTransport
from moestro.router.transports.choose import TransportKind
from moestro.router.transports.fixed_capacity import FixedCapacityTransport
from moestro.router.transports.gather_scatter import GatherScatterTransport
from moestro.workers.batch import Batch
from moestro.workers.batching import build_batch
from moestro.workers.device import configure_torch
from moestro.workers.loading import load_model
from moestro.workers.lockstep import GroupLockstep
from moestro.workers.scheduler_sequence import StepPlan

TIMEOUT_S = 45.0
NUM_EXPERTS, TOP_K, WIDTH, MODEL_WIDTH = 8, 3, 32, 64
OVER_A_GROUP: dict[TransportKind, Any] = {
    "all_to_all": AllToAllTransport,
    "gather_scatter": GatherScatterTransport,
    "fixed_capacity": FixedCapacityTransport,
}


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    store, address = serve_store()
    joined: list[Mesh] = []

    def form() -> Values:
        joined.append(
            join(GroupShape(1, 1), 0, address.connect(TIMEOUT_S), device_kind=settings.device, timeout_s=TIMEOUT_S)
        )
        backend = "nccl" if settings.device == "cuda" else "gloo"
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else None
        return {"headline": backend, "backend": backend, "nccl": version, "nccl_built_in": dist.is_nccl_available()}

    formed = attempt("a group of one over a TCPStore", form)
    yield formed
    if formed.status != "passed":
        return
    with joined[0] as mesh:
        for kind, dtype in product(OVER_A_GROUP, (torch.float32, torch.bfloat16)):
            yield attempt(
                f"{kind} equals local, {_name(dtype)}",
                lambda kind=kind, dtype=dtype: check_transport(mesh, kind, dtype, settings.seed),
            )
        yield attempt("sum and gather of a tensor-parallel set", lambda: check_tensor_parallel(mesh))
        yield attempt("lockstep", lambda: check_lockstep(GroupLockstep(mesh, address, timeout_s=TIMEOUT_S)))
        for kind, dtype in product(OVER_A_GROUP, (torch.float32, torch.bfloat16)):
            yield attempt(
                f"engine through {kind}, {_name(dtype)}",
                lambda kind=kind, dtype=dtype: check_engine(mesh, kind, dtype, settings),
            )
    del store


def check_transport(mesh: Mesh, kind: TransportKind, dtype: torch.dtype, seed: int) -> Values:
    """An expert layer over the group equals the local one bit for bit."""
    device, generator = mesh.device, torch.Generator().manual_seed(seed)

    def fill(gate_up: torch.Tensor, down: torch.Tensor) -> None:
        for out in (gate_up, down):
            out.copy_(0.1 * torch.randn(out.shape, generator=generator))

    experts = make_experts(ExpertShape(WIDTH, MODEL_WIDTH, dtype, device), [fill] * NUM_EXPERTS)
    local = LocalTransport(NUM_EXPERTS)
    transport = OVER_A_GROUP[kind](mesh.world, NUM_EXPERTS)
    compared = 0
    for num_tokens in (0, 1, 7, 200):
        x_TD = torch.randn(num_tokens, MODEL_WIDTH, generator=generator).to(device, dtype)
        ids_TK = torch.rand(num_tokens, NUM_EXPERTS, generator=generator).topk(TOP_K, 1).indices.to(device)
        weights_TK = torch.rand(num_tokens, TOP_K, generator=generator).to(device)
        want_TD = _layer(local, experts, x_TD, ids_TK, weights_TK)
        got_TD = _layer(transport, experts, x_TD, ids_TK, weights_TK)
        if not torch.equal(got_TD, want_TD):
            worst = float((got_TD.float() - want_TD.float()).abs().max())
            raise Unmet(f"{num_tokens} tokens: differs from one rank's by up to {worst:.1e}")
        compared += 1
    return {"headline": f"{compared} layers equal", "layers": compared, "experts": type(experts).__name__}


def _layer(
    transport: Transport[Any],
    experts: GroupedExperts,
    x_TD: torch.Tensor,
    ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> torch.Tensor:
    dispatched, handle = transport.dispatch(x_TD, ids_TK, (x_TD.shape[0],))()
    return transport.combine(experts.apply(dispatched.x_RD, dispatched.counts_L), weights_TK, handle)()


def check_tensor_parallel(mesh: Mesh) -> Values:
    """A set of one gives back what it was given, bits and shape."""
    tp = MeshTensorParallel(mesh.world)
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (0, 1, 5):
            x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows)).to(mesh.device, dtype)
            for name, got, want in (
                ("sum", tp.sum(x), x),
                ("sum, transposed", tp.sum(x.T), x.T),
                ("gather", tp.gather(x), x),
                ("gather of rows", tp.gather(x, dim=0), x),
                ("broadcast", mesh.world.broadcast_(x.clone(), 0), x),
            ):
                if got.dtype != want.dtype or not torch.equal(got, want):
                    raise Unmet(f"{name} of {rows} rows in {_name(dtype)} is not the input")
    return {"headline": "equal"}


def check_lockstep(lockstep: GroupLockstep) -> Values:
    """Agreement and wake-up run over the control group, which is gloo on every device."""
    agreements = [lockstep.agree(tokens) for tokens in (3, 0)]
    lockstep.wake()
    lockstep.sleep()  # returns at once: it was woken before
    lockstep.close()
    if [(one.tokens_per_rank, one.idle) for one in agreements] != [((3,), False), ((0,), True)]:
        raise Unmet(f"agreements are {agreements}")
    return {"headline": "agrees, sleeps and wakes"}


def check_engine(mesh: Mesh, kind: TransportKind, dtype: torch.dtype, settings: Settings) -> Values:
    """The same tokens and logits with the experts behind the group as with all on this rank."""
    num_output = 8 if settings.small else 64
    with tempfile.TemporaryDirectory() as name:
        folder = save_model(make_model("qwen3_moe", settings.seed), Path(name))
        alone = load_model(folder, dtype=dtype, device=mesh.device)
        grouped = load_model(
            folder,
            dtype=dtype,
            device=mesh.device,
            tp=mesh.tp,
            experts=over_group(
                mesh, (spread(alone.config.num_experts, 1),) * alone.config.num_moe_layers, transport=kind
            ),
        )
    prompts = [random_ids(length, seed=80 + length) for length in (1, 9, 40)]
    runs = []
    for decoder in (alone, grouped):
        engine = make_engine(decoder, max_num_sequences=3, max_num_tokens=16, max_context=40 + num_output, block_size=8)
        runs.append(follow(engine, prompts, num_output))
        empty = decoder.forward(_idle_batch(mesh.device), engine.runner.cache)
        if empty.shape != (0, decoder.config.vocab_size):
            raise Unmet(f"an idle rank's logits have shape {tuple(empty.shape)}")
    worst = 0.0
    for ours, want in zip(runs[1], runs[0], strict=True):
        if ours.ids != want.ids:
            raise Unmet("greedy tokens differ from those of the local transport")
        worst = max(worst, float((ours.logits_TV() - want.logits_TV()).abs().max()))
    return {
        "headline": f"{len(prompts) * num_output} tokens equal, logits within {worst:.1e}",
        "tokens": len(prompts) * num_output,
        "max_abs_difference": worst,
    }


def _idle_batch(device: torch.device) -> Batch:
    return build_batch(StepPlan(spans=(), num_decodes=0, num_tokens=0, planned_at=0.0), (0,), 8, device)[0]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
