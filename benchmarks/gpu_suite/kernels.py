"""Every kernel of the backend that the device gets, against its definition in fp64, and the same bits in any company.

Legend: T tokens or rows, O outputs, I inputs, M model width, E experts, K experts per token, W expert width, S
sequences, N heads of queries, keys and values together, D head width.

The backend is the one a rank would choose; on CUDA it must be ``cuda``. An error is the distance of norms, which for
bf16 operands lies between 1e-3 and 1e-2: at most ``TOLERANCE``. Bits are compared over numbers of rows on both sides of
every bucket of tiles, so kernels and tiles that do not agree are found whichever of them is taken for how many rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from benchmarks.gpu_suite.checks import Check, Settings, Unmet, Values, attempt, on_cuda_only
from benchmarks.gpu_suite.kernel_attention import attention_checks
from torch import Tensor

from moestro.kernels.backend import Backend
from moestro.kernels.choose import choose_backend
from moestro.kernels.gate import GateSpec, GroupSpec, Score, route
from moestro.kernels.grouped_experts import ExpertShape, experts_reference
from moestro.protos.sequences import SamplingParams
from moestro.workers.device import configure_torch
from moestro.workers.sampling.noise import row_keys
from moestro.workers.sampling.sampler import SamplingRow, sample

TOLERANCE = 1e-2
_ROWS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 127, 128, 129, 255, 256, 257, 511, 513, 1024, 2049)


@dataclass(frozen=True, slots=True)
class Sizes:
    rows: tuple[int, ...]
    linears: tuple[tuple[int, int], ...]  # outputs, inputs
    experts: tuple[tuple[int, int, int, int], ...]  # experts, experts per token, width, model width
    widths: tuple[int, ...]  # of the residual stream


FULL = Sizes(
    _ROWS,
    ((5120, 2048), (2048, 4096), (128, 2048), (6144, 4096), (5120, 2880), (200, 72)),
    ((128, 8, 768, 2048), (8, 2, 14_336, 4096), (32, 4, 2880, 2880), (3, 2, 40, 64)),
    (64, 2048, 2880, 4096),
)
SMALL = Sizes((1, 2, 5, 16, 33), ((40, 64), (9, 24)), ((8, 2, 32, 64), (3, 2, 40, 64)), (64,))


def run(settings: Settings) -> Iterator[Check]:
    configure_torch(settings.device)
    device, sizes = torch.device(settings.device), SMALL if settings.small else FULL
    found: list[Backend] = []
    chosen = attempt("backend", lambda: _choose(device, found))
    yield chosen
    if not found:
        return
    backend = found[0]
    with torch.inference_mode():
        for out_features, in_features in sizes.linears:
            yield attempt(
                f"linear {out_features} x {in_features}",
                lambda o=out_features, i=in_features: linear(backend, o, i, sizes.rows, _generator(device, settings)),
            )
        for shape in sizes.experts:
            yield attempt(
                f"experts {' x '.join(map(str, shape))}",
                lambda shape=shape: experts(backend, *shape, sizes.rows, _generator(device, settings)),
            )
        for spec in _gates(settings.small):
            yield attempt(
                f"gate, {spec.num_experts} experts, {spec.score.name.lower()}",
                lambda spec=spec: gate(backend, spec, sizes.rows, _generator(device, settings)),
            )
        for width in sizes.widths:
            yield attempt(f"norm {width}", lambda m=width: norm(backend, m, sizes.rows, _generator(device, settings)))
        yield from attention_checks(backend, settings, _generator(device, settings))
        yield on_cuda_only("sampling kernel", settings, lambda: sampling(_generator(device, settings)))
        yield on_cuda_only("ordered sum", settings, lambda: ordered_sum(_generator(device, settings)))


def _choose(device: torch.device, found: list[Backend]) -> Values:
    """What runs is checked even when it is not what should run."""
    chosen = choose_backend(device, torch.bfloat16)
    found.append(chosen.backend)
    if device.type == "cuda" and chosen.backend.name != "cuda":
        raise Unmet(f"the backend is {chosen.backend.name} and not cuda: {chosen.reason}")
    return {"headline": chosen.backend.name, "reason": chosen.reason}


def linear(
    backend: Backend, out_features: int, in_features: int, rows: Sequence[int], generator: torch.Generator
) -> Values:
    weight_OI = normal((out_features, in_features), generator, in_features**-0.5)
    x_TI = normal((max(rows), in_features), generator)
    want_TO = x_TI.double() @ weight_OI.double().T
    to_fill = backend.empty_weight(out_features, in_features, torch.bfloat16, generator.device)
    to_fill.copy_(weight_OI)
    made = backend.make_linear(to_fill)
    return accurate(made.apply(x_TI), want_TO) | same_bits(made.apply, x_TI, rows, generator)


def experts(
    backend: Backend,
    num: int,
    top_k: int,
    width: int,
    model_width: int,
    rows: Sequence[int],
    generator: torch.Generator,
) -> Values:
    """Ragged: routing is skewed, and some experts have no rows at all."""
    device = generator.device
    gate_up = normal((num, 2 * width, model_width), generator, model_width**-0.5)
    down = normal((num, model_width, width), generator, width**-0.5)

    def filler(expert: int) -> Callable[[Tensor, Tensor], None]:
        def fill(to_2WM: Tensor, to_MW: Tensor) -> None:
            to_2WM.copy_(gate_up[expert])
            to_MW.copy_(down[expert])

        return fill

    made = backend.make_experts(
        ExpertShape(width, model_width, torch.bfloat16, device), [filler(expert) for expert in range(num)]
    )
    most = max(rows)
    x_TM = normal((most, model_width), generator)
    odds_E = 1.0 / torch.arange(1, num + 1, device=device)
    odds_E[num - 1] *= num > top_k  # nobody chooses the last
    ids_TK = torch.multinomial(odds_E.expand(most, num), top_k, generator=generator)
    weights_TK = torch.rand(most, top_k, generator=generator, device=device)
    y_TM, counts_L = made.mix(x_TM, ids_TK, weights_TK)
    want_L = torch.bincount(ids_TK.flatten(), minlength=num)
    if not torch.equal(counts_L, want_L):
        raise Unmet("the rows of the slots are miscounted", counts=counts_L.tolist(), want=want_L.tolist())
    few = min(most, 64)  # the definition goes row by row
    order_P = torch.argsort(ids_TK[:few].flatten(), stable=True)
    counts_few = torch.bincount(ids_TK[:few].flatten(), minlength=num)
    rows_PM = torch.empty(few * top_k, model_width, dtype=torch.float64, device=device)
    rows_PM[order_P] = experts_reference(x_TM[:few].double()[order_P // top_k], counts_few, gate_up, down)
    want_TM = (rows_PM.view(few, top_k, model_width) * weights_TK[:few, :, None].double()).sum(1)

    def mix(chosen_T: Tensor) -> Tensor:
        return made.mix(x_TM[chosen_T], ids_TK[chosen_T], weights_TK[chosen_T])[0]

    sorted_P = torch.argsort(ids_TK.flatten(), stable=True)
    padding = 5
    padded = torch.cat((x_TM[sorted_P // top_k], x_TM[:1].expand(padding, -1)))
    applied_PM = torch.empty(most * top_k, model_width, dtype=torch.bfloat16, device=device)
    applied_PM[sorted_P] = made.apply(padded, want_L)[: most * top_k]
    summed_TM = applied_PM.view(most, top_k, model_width)[:, 0].float() * weights_TK[:, :1]
    for k in range(1, top_k):
        summed_TM += applied_PM.view(most, top_k, model_width)[:, k].float() * weights_TK[:, k : k + 1]
    if not torch.equal(summed_TM.to(torch.bfloat16), y_TM):
        raise Unmet("apply over sorted rows and mix give other bits")
    return accurate(y_TM[:few], want_TM) | same_bits(mix, torch.arange(most, device=device), rows, generator)


def gate(backend: Backend, spec: GateSpec, rows: Sequence[int], generator: torch.Generator) -> Values:
    """The same choice as the definition on the CPU; equal scores go to the smaller id, NaN stays in its row."""
    most = max(rows)
    logits_TE = normal((most, spec.num_experts), generator)
    logits_TE[most // 2] = 0.5  # all equal
    logits_TE[most - 1, 0] = float("nan")
    bias_E = None
    if spec.has_bias:
        bias_E = 0.1 * torch.randn(spec.num_experts, generator=generator, device=generator.device)
    ids_TK, weights_TK = backend.route(logits_TE, bias_E, spec)
    want_ids, want_weights = route(logits_TE.cpu(), None if bias_E is None else bias_E.cpu(), spec)
    sound = slice(0, most - 1)
    differs = int((ids_TK.cpu() != want_ids)[sound].any(1).sum())
    if differs > most // 100:  # scores closer than rounding may be ordered otherwise by another chip's exp
        raise Unmet(f"{differs} of {most} tokens go to other experts than on the CPU")
    if not bool(weights_TK[most - 1].isnan().all()) or bool(weights_TK[sound].isnan().any()):
        raise Unmet("NaN did not stay in its row")
    same = (ids_TK.cpu() == want_ids)[sound].all(1)
    values = accurate(weights_TK.cpu()[sound][same], want_weights[sound][same], 1e-5)
    sound_TE = logits_TE[sound]
    few = [count for count in rows if count < most]
    bits = same_bits(lambda x_TE: backend.route(x_TE, bias_E, spec)[1], sound_TE, few, generator)
    return values | bits | {"other_choices": differs}


def norm(backend: Backend, width: int, rows: Sequence[int], generator: torch.Generator) -> Values:
    most = max(rows)
    x_TM, delta_TM = normal((most, width), generator), normal((most, width), generator)
    weight_M = normal((width,), generator)
    sum_TM, out_TM = backend.add_rms_norm(x_TM.clone(), delta_TM, weight_M, 1e-6)
    if not torch.equal(sum_TM, x_TM + delta_TM):
        raise Unmet("the residual stream is not x + delta")
    wide_TM = sum_TM.double()
    want_TM = wide_TM * (wide_TM.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight_M.double()
    alone = accurate(backend.add_rms_norm(sum_TM.clone(), None, weight_M, 1e-6)[1], want_TM)

    def call(chosen_T: Tensor) -> Tensor:
        return backend.add_rms_norm(x_TM[chosen_T], delta_TM[chosen_T], weight_M, 1e-6)[1]

    bits = same_bits(call, torch.arange(most, device=generator.device), rows, generator)
    return accurate(out_TM, want_TM) | bits | {"without_delta": alone["error"]}


def sampling(generator: torch.Generator) -> Values:
    """The kernel of ``kernels/cuda`` draws the sampler's tokens; a tie of scores within rounding may go elsewhere."""
    sample_rows: Any = import_module("moestro.kernels.cuda.sampling").sample_rows
    device, rows, vocab_size = generator.device, 256, 151_936
    logits_RV = 4 * torch.randn(rows, vocab_size, generator=generator, device=device)
    logits_RV[3, 100:200] = 60.0  # equal ones
    logits_RV[5, 7], logits_RV[6, 9] = float("nan"), float("inf")
    logits_RV[7] = float("-inf")
    temperatures = [0.0 if row % 2 else 0.1 + row / 100 for row in range(rows)]
    params = [SamplingParams(temperature=value, seed=row) for row, value in enumerate(temperatures)]
    want = [token.token_id for token in sample(logits_RV, [SamplingRow(one, (1, 2, 3), 2, 3) for one in params])]
    key_R = row_keys([one.seed for one in params], [3] * rows).to(device)
    code_R, logprob_R, _ = sample_rows(logits_RV, torch.tensor(temperatures, device=device), key_R)
    codes = code_R.tolist()
    if codes[5:8] != [-1, -2, -3]:
        raise Unmet(f"NaN, +Inf and all -Inf got the codes {codes[5:8]}")
    differs = [row for row in range(rows) if max(codes[row], -1) != want[row]]
    if any(row % 2 for row in differs) or len(differs) > 1:
        raise Unmet(f"rows {differs} got other tokens than the sampler's")
    sound_R = code_R >= 0
    want_R = torch.log_softmax(logits_RV.double(), 1).gather(1, code_R.clamp(min=0)[:, None])[:, 0]
    values = accurate(logprob_R[sound_R], want_R[sound_R], 1e-5)
    alone_R = torch.cat(
        [
            sample_rows(logits_RV[r : r + 1], torch.tensor([temperatures[r]], device=device), key_R[r : r + 1])[0]
            for r in range(16)
        ]
    )
    if not torch.equal(alone_R, code_R[:16]):
        raise Unmet("a row alone gets another token than in company")
    return values | {"other_tokens": len(differs)}


def ordered_sum(generator: torch.Generator) -> Values:
    """The arithmetic of the one-shot all-reduce over four buffers of this device: exactly the sum in order in fp32."""
    kernel: Any = import_module("moestro.kernels.cuda.all_reduce").ordered_sum
    for numel in (8, 2048, 2880 * 7, 1 << 20):
        parts = [normal((numel,), generator) for _ in range(4)]
        peers_R = torch.tensor([part.data_ptr() for part in parts], dtype=torch.int64, device=generator.device)
        want = parts[0].float()
        for part in parts[1:]:
            want = want + part.float()
        if not torch.equal(kernel(peers_R, parts[0]), want.bfloat16()):
            raise Unmet(f"a sum of {numel} elements has other bits")
    return {"headline": "the same bits"}


def accurate(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> Values:
    """‖got - want‖ / ‖want‖. NaN never passes."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error <= tolerance:
        raise Unmet(f"the error is {error:.1e}, at most {tolerance:.0e} was to be", error=error)
    return {"headline": f"error {error:.1e}, the same bits", "error": error}


def same_bits(call: Callable[[Tensor], Tensor], x_T: Tensor, rows: Sequence[int], generator: torch.Generator) -> Values:
    """Every row of ``call(x_T)`` has the bits it has among the first n rows, for every n of ``rows``, in any order."""
    want_T = call(x_T)
    for count in rows:
        got_T = call(x_T[:count])
        if not torch.equal(got_T, want_T[:count]):
            row = int((got_T != want_T[:count]).flatten(1).any(1).int().argmax())
            raise Unmet(f"row {row} has other bits among {count} rows than among {len(x_T)}")
    order_T = torch.randperm(len(x_T), generator=generator, device=generator.device)
    if not torch.equal(call(x_T[order_T]), want_T[order_T]):
        raise Unmet("rows have other bits in another order")
    return {"same_bits_for_rows": [*rows, len(x_T)]}


def normal(shape: tuple[int, ...], generator: torch.Generator, std: float = 1.0) -> Tensor:
    out = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
    return out.normal_(0.0, std, generator=generator)


def _generator(device: torch.device, settings: Settings) -> torch.Generator:
    return torch.Generator(device).manual_seed(settings.seed)


def _gates(small: bool) -> tuple[GateSpec, ...]:
    if small:
        return GateSpec(8, 2, True), GateSpec(12, 4, True, Score.SIGMOID, True, GroupSpec(4, 2), 1.5)
    return (
        GateSpec(128, 8, True),
        GateSpec(8, 2, True),
        GateSpec(60, 4, False),
        GateSpec(512, 10, True),
        GateSpec(256, 8, True, Score.SIGMOID, True, GroupSpec(8, 4), 2.5),
    )
