"""The whole of verify: the baseline, then one perturbation after another, each compared with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from moestro.cluster.edge.events import Completion
from moestro.cluster.verify.compare import Comparison, compare, failed
from moestro.cluster.verify.lab import Asked, Lab, find_places
from moestro.cluster.verify.perturbations import PERTURBATIONS
from moestro.cluster.verify.suite import TEXTS, build_suite
from moestro.cluster.verify.target import NotApplicable, Target
from moestro.protos.errors import ConfigError, MoestroError, SequenceFailed


@dataclass(frozen=True, slots=True)
class Row:
    """One perturbation. ``compared`` is None when it did not apply, for which ``note`` has the reason."""

    perturbation: str
    num_requests: int
    compared: Comparison | None
    num_different: int = 0  # requests
    note: str = ""

    @property
    def is_equal(self) -> bool:
        return self.compared is not None and self.compared.difference is None


@dataclass(frozen=True, slots=True)
class Report:
    """What was asked of whom, and how each perturbation ended."""

    model: str
    architecture: str
    dtype: str
    home: str  # the rank of the baseline
    seed: int
    num_requests: int
    rows: tuple[Row, ...]

    @property
    def applied(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.compared is not None)

    @property
    def is_equal(self) -> bool:
        """Something was compared, and all of it was equal."""
        return bool(self.applied) and all(row.is_equal for row in self.applied)


def choose(wanted: Sequence[str]) -> tuple[str, ...]:
    """The perturbations of these names, or that begin with one; all of them when none is named. Raises ConfigError."""
    for name in wanted:
        if not any(_fits(known, name) for known in PERTURBATIONS):
            raise ConfigError(f"perturbation must be one of {', '.join(PERTURBATIONS)}, not {name!r}")
    return tuple(known for known in PERTURBATIONS if not wanted or any(_fits(known, name) for name in wanted))


def _fits(known: str, name: str) -> bool:
    return known == name or known.startswith(f"{name} ")


async def verify(
    target: Target,
    num_requests: int,
    seed: int,
    names: Sequence[str] = tuple(PERTURBATIONS),
    on_phase: Callable[[str], None] = lambda name: None,
) -> Report:
    """Raises MoestroError when even the undisturbed requests fail."""
    model = await target.model()
    texts = [await target.tokenize(text) for text in TEXTS]
    cases = build_suite(model, texts, num_requests, seed)
    lab = Lab(target, model, find_places(await target.status()), cases, seed)
    on_phase("baseline")
    lab = replace(lab, baseline=_baseline(await lab.one_by_one(lab.at(lab.places.home))))
    rows = []
    for name in names:
        on_phase(name)
        rows.append(await _row(lab, name))
    return Report(model.name, model.architecture, model.dtype, lab.places.home, seed, num_requests, tuple(rows))


def _baseline(asked: Sequence[Asked]) -> dict[str, Completion]:
    answers = {}
    for each in asked:
        if isinstance(each.result, str):
            raise SequenceFailed(f"request {each.case.name} fails undisturbed: {each.result}")
        answers[each.case.name] = each.result
    return answers


async def _row(lab: Lab, name: str) -> Row:
    try:
        outcome = await PERTURBATIONS[name](lab)
    except NotApplicable as reason:
        return Row(name, 0, None, note=str(reason))
    except (MoestroError, TimeoutError) as error:
        return Row(name, 0, failed("none", f"{type(error).__name__}: {error}"))
    compared = [_compare(lab, each) for each in outcome.asked]
    num_different = sum(comparison.difference is not None for comparison in compared)
    return Row(name, len(compared), sum(compared, Comparison()), num_different, outcome.note)


def _compare(lab: Lab, asked: Asked) -> Comparison:
    if isinstance(asked.result, str):
        return failed(asked.case.name, asked.result)
    return compare(asked.case.name, lab.baseline[asked.case.name], asked.result)
