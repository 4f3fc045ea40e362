"""A request as it is once nothing about it is open any more: tokenised, fitted into the context, seeded. Pure."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field, replace
from hashlib import blake2b

from moestro.cluster.edge.request_ids import seed_of
from moestro.cluster.edge.served import ServedModel
from moestro.cluster.edge.validation import ValidRequest, fit
from moestro.protos.sequences import Diagnostics, SamplingParams
from moestro.workers.sampling.seeds import derive_seed


@dataclass(frozen=True, slots=True)
class Admitted:
    """What a request asks of the engine, settled."""

    request_id: str
    model: str
    prompt_ids: tuple[int, ...]
    sampling: tuple[SamplingParams, ...]  # one per choice
    seed: int  # of the request; each choice's own is derived from it
    stop_strings: tuple[str, ...] = ()
    priority: int = 0
    diagnostics: Diagnostics = field(default_factory=Diagnostics)

    @property
    def digest(self) -> str:
        """The same for requests of the same answer; 32 hexadecimal digits."""
        first = self.sampling[0]
        if first.logit_bias:
            first = replace(first, logit_bias=dict(sorted(first.logit_bias.items())))
        hashed = blake2b(array("Q", self.prompt_ids).tobytes(), digest_size=16)
        hashed.update(repr((self.model, first, self.seed, len(self.sampling), self.stop_strings)).encode())
        return hashed.hexdigest()


def settle(valid: ValidRequest, request_id: str, model: ServedModel, prompt_ids: tuple[int, ...]) -> Admitted:
    """Fits the request into the context and expands it into its choices. Raises as ``fit`` does."""
    given_as = "text" if isinstance(valid.prompt, str) else "token_ids.ids"
    field = "messages" if valid.prompt is None else given_as
    sampling = fit(valid, len(prompt_ids), model.backend.limits, field)
    seed = seed_of(request_id) if valid.seed is None else valid.seed
    return Admitted(
        request_id=request_id,
        model=model.name,
        prompt_ids=prompt_ids,
        sampling=tuple(
            # The prompt is the same for every choice, so its logprobs are asked for once.
            replace(sampling, seed=derive_seed(seed, i), prompt_logprobs=sampling.prompt_logprobs if i == 0 else None)
            for i in range(valid.n)
        ),
        seed=seed,
        stop_strings=valid.stop_strings,
        priority=valid.priority,
        diagnostics=valid.diagnostics,
    )
