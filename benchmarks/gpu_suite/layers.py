"""A MoE layer and paged attention alone, at the shapes of Qwen3-30B-A3B, as a share of the bandwidth measured here.

Legend: T tokens (B sequences of one each), M model width, K experts per token, E experts, C copies of the layer.

Times are those of CUDA graphs that are replayed. Every replay goes through C copies of the layer with other weights (or
caches), together several times the L2, so that nothing is read from it. Bytes are those of the experts that the tokens
chose (weights once) or of the keys and values seen; activations are not counted. Routing is uniform without doubles:
each token's experts are a random choice of K of E.

Peers compute the same mixture from the same weights in the same process, in alternation: ``torch._grouped_mm`` over
sorted rows (the plain backend), transformers' experts module with its grouped implementation, and vLLM's
``fused_experts`` where it can be imported (see ``vllm_parts.md``). A peer that is not there is ``omitted`` with the
reason.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from benchmarks.gpu_suite import roofs
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt, why
from benchmarks.gpu_suite.peers import peers
from benchmarks.gpu_suite.timing import seconds, spread
from torch import Tensor

from moestro.kernels.backend import AttentionShape, Backend, Decodes
from moestro.kernels.choose import choose_backend
from moestro.kernels.grouped_experts import ExpertShape
from moestro.kernels.plain import PlainBackend
from moestro.workers.captured.graph import Called, Capture, CudaCapture, Graph
from moestro.workers.device import configure_torch

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_TM, ids_TK, weights_TK) to y_TM."""


@dataclass(frozen=True, slots=True)
class Sizes:
    num_experts: int
    top_k: int
    width: int
    model_width: int
    copies: int
    batches: tuple[int, ...]
    heads: tuple[int, int, int]  # query heads, key/value heads, width
    contexts: tuple[tuple[int, int], ...]  # sequences, keys of each
    rounds: int
    replays: int
    goals: Mapping[str, float] = field(default_factory=dict)


_GOALS = {"experts 1": 0.75, "experts 64": 0.85, "attention 1": 0.90, "attention 64": 0.90}
FULL = Sizes(
    128, 8, 768, 2048, 4, (1, 8, 64, 256), (32, 4, 128), ((1, 131_072), (64, 8192), (256, 1024)), 7, 20, _GOALS
)
SMALL = Sizes(8, 2, 32, 64, 2, (1, 3), (4, 2, 16), ((2, 64),), 2, 2)
_BLOCK = 16


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    device, sizes = torch.device(settings.device), SMALL if settings.small else FULL
    found: list[tuple[Backend, float]] = []

    def start() -> Values:
        chosen = choose_backend(device, torch.bfloat16)
        bandwidth = roofs.measure(settings).bytes_per_s
        found.append((chosen.backend, bandwidth))
        return {
            "headline": f"{chosen.backend.name}, {bandwidth / 1e12:.2f} TB/s",
            "backend": chosen.backend.name,
            "reason": chosen.reason,
            "copy_bytes_per_s": bandwidth,
        }

    started = attempt("backend and bandwidth", start)
    yield started
    if started.status != "passed":
        return
    backend, bandwidth = found[0]
    capture: Capture = CudaCapture() if device.type == "cuda" else Called
    with torch.inference_mode():
        yield from _experts(backend, bandwidth, sizes, device, capture, settings.seed)
        for sequences, keys in sizes.contexts:
            yield attempt(
                f"attention {sequences} x {keys}",
                lambda n=sequences, keys=keys: _attention(
                    backend, bandwidth, sizes, device, capture, n, keys, settings.seed
                ),
            )


def _experts(
    backend: Backend, bandwidth: float, sizes: Sizes, device: torch.device, capture: Capture, seed: int
) -> Iterator[Check]:
    generator = torch.Generator(device).manual_seed(seed)
    shape = ExpertShape(sizes.width, sizes.model_width, torch.bfloat16, device)
    gate_up = [
        _normal((sizes.num_experts, 2 * sizes.width, sizes.model_width), generator, 0.02) for _ in range(sizes.copies)
    ]
    down = [_normal((sizes.num_experts, sizes.model_width, sizes.width), generator, 0.02) for _ in range(sizes.copies)]
    ours = _of_backend(backend, shape, gate_up, down)
    others: dict[str, list[Mix] | str] = {"torch._grouped_mm": _of_backend(PlainBackend(), shape, gate_up, down)}
    others |= peers(gate_up, down, sizes.top_k)
    for name, reason in others.items():
        if isinstance(reason, str):
            yield Check(f"peer {name}", "omitted", reason=reason)
    mixes = {"ours": ours} | {name: mix for name, mix in others.items() if not isinstance(mix, str)}
    for batch in sizes.batches:
        yield attempt(
            f"experts, {batch} tokens",
            lambda batch=batch: _mixture(mixes, bandwidth, sizes, shape, device, capture, batch, generator),
        )


def _of_backend(backend: Backend, shape: ExpertShape, gate_up: Sequence[Tensor], down: Sequence[Tensor]) -> list[Mix]:
    def mix_of(gate_up_E2IM: Tensor, down_EMI: Tensor) -> Mix:
        def filler(expert: int) -> Callable[[Tensor, Tensor], None]:
            def fill(to_2IM: Tensor, to_MI: Tensor) -> None:
                to_2IM.copy_(gate_up_E2IM[expert])
                to_MI.copy_(down_EMI[expert])

            return fill

        experts = backend.make_experts(shape, [filler(expert) for expert in range(len(down_EMI))])
        return lambda x_TM, ids_TK, weights_TK: experts.mix(x_TM, ids_TK, weights_TK)[0]

    return [mix_of(*weights) for weights in zip(gate_up, down, strict=True)]


def _mixture(
    mixes: dict[str, list[Mix]],
    bandwidth: float,
    sizes: Sizes,
    shape: ExpertShape,
    device: torch.device,
    capture: Capture,
    batch: int,
    generator: torch.Generator,
) -> Values:
    x_TM = _normal((batch, sizes.model_width), generator, 1.0)
    scores = torch.rand(batch, sizes.num_experts, generator=generator, device=device)
    ids_TK = scores.topk(sizes.top_k, 1).indices
    weights_TK = torch.softmax(torch.rand(batch, sizes.top_k, generator=generator, device=device), 1)
    num_bytes = int(ids_TK.unique().numel()) * shape.num_bytes
    results = {name: mix[0](x_TM, ids_TK, weights_TK) for name, mix in mixes.items()}
    errors = {name: _distance(y_TM, results["ours"]) for name, y_TM in results.items()}
    if max(errors.values()) > 0.02:
        raise Unmet("a peer computes another mixture than we do", distances=errors)

    def all_copies(mix: list[Mix]) -> Callable[[], None]:
        def work() -> None:
            for one in mix:
                one(x_TM, ids_TK, weights_TK)

        return work

    graphs, refused = {}, {}
    for name, mix in mixes.items():
        try:
            graphs[name] = capture(all_copies(mix))
        except Exception as error:
            if name == "ours":
                raise
            refused[name] = why(error)
    times = _alternately(graphs, sizes, device)
    return _figures(times, num_bytes, bandwidth, sizes.goals.get(f"experts {batch}")) | {
        "distinct_experts": num_bytes // shape.num_bytes,
        "distances_from_ours": errors,
        "not_captured": refused,
    }


def _attention(
    backend: Backend,
    bandwidth: float,
    sizes: Sizes,
    device: torch.device,
    capture: Capture,
    sequences: int,
    keys: int,
    seed: int,
) -> Values:
    generator = torch.Generator(device).manual_seed(seed + keys)
    heads, kv_heads, width = sizes.heads
    shape = AttentionShape(heads, kv_heads, width, width, width**-0.5, None, torch.bfloat16, device)
    kernel = backend.make_attention(shape, None)
    columns = -(-keys // _BLOCK)
    blocks = sequences * columns + 1
    order = torch.randperm(blocks - 1, generator=generator, device=device) + 1
    table_SB = order.to(torch.int32).view(sequences, columns)
    last = keys - 1
    slot_S = table_SB[:, last // _BLOCK].long() * _BLOCK + last % _BLOCK
    lengths_S = torch.full((sequences,), keys, dtype=torch.int32, device=device)
    plan = kernel.plan_decodes(Decodes(lengths_S, table_SB, slot_S, _BLOCK))
    # As many copies as fill a few times the L2, and no more than memory is worth.
    copies = 2 if sequences * keys > 2**17 else sizes.copies
    caches = [_normal((blocks, 2 * kv_heads, _BLOCK, width), generator, 1.0) for _ in range(copies)]
    qkv_TND = _normal((sequences, heads + 2 * kv_heads, width), generator, 1.0)
    cos_T1D = torch.ones(sequences, 1, width, device=device)
    sin_T1D = torch.zeros(sequences, 1, width, device=device)

    def work() -> None:
        for kv_NCbD in caches:
            kernel.apply(qkv_TND, cos_T1D, sin_T1D, kv_NCbD, plan)

    times = _alternately({"ours": capture(work)}, sizes, device, copies)
    num_bytes = 2 * kv_heads * width * 2 * sequences * keys
    return _figures(times, num_bytes, bandwidth, sizes.goals.get(f"attention {sequences}"))


def _alternately(
    graphs: dict[str, Graph], sizes: Sizes, device: torch.device, copies: int | None = None
) -> dict[str, list[float]]:
    """Seconds a layer by name, one round of each after the other."""
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(sizes.rounds):
        for name, graph in graphs.items():
            total_s = seconds(lambda graph=graph: [graph.replay() for _ in range(sizes.replays)], device)
            times[name].append(total_s / (sizes.replays * (copies or sizes.copies)))
    return times


def _figures(times: dict[str, list[float]], num_bytes: int, bandwidth: float, goal: float | None) -> Values:
    medians = {name: statistics.median(found) for name, found in times.items()}
    share = num_bytes / bandwidth / medians["ours"]
    wanted = "" if goal is None else f" (goal {goal:.0%}: {'reached' if share >= goal else 'missed'})"
    return {
        "headline": f"{medians['ours'] * 1e6:.1f} us, {share:.1%} of the bandwidth{wanted}",
        "bytes": num_bytes,
        "goal": goal,
        "bandwidth_share": share,
        "layer_s": {name: spread(found) for name, found in times.items()},
        "times_faster_than": {name: medians[name] / medians["ours"] for name in medians if name != "ours"},
    }


def _normal(shape: tuple[int, ...], generator: torch.Generator, std: float) -> Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return out.normal_(0.0, std, generator=generator)


def _distance(y: Tensor, want: Tensor) -> float:
    return float((y.double() - want.double()).norm() / want.double().norm())
