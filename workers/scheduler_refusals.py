"""What a scheduler can never serve: a pure function of the request and the context."""

from __future__ import annotations

from moestro.protos.errors import ContextOverflow, FieldViolation, InvalidRequest
from moestro.protos.sequences import SequenceRequest


def why_never(request: SequenceRequest, context_limit: int) -> InvalidRequest | None:
    """The error for a sequence without a place in a context of ``context_limit`` tokens, or None. ``max_tokens`` beyond
    the context is no error: the sequence ends with LENGTH where the context does."""
    num_prompt, num_output = len(request.prompt_ids), len(request.output_ids)
    max_tokens = request.sampling.max_tokens
    if num_prompt == 0:
        return InvalidRequest([FieldViolation("prompt_ids", "must hold at least 1 token, not 0")])
    if num_prompt + num_output + 1 > context_limit:
        bound = f"must leave room for 1 more token in a context of {context_limit}"
        return ContextOverflow([FieldViolation("prompt_ids", f"{bound}, not hold {num_prompt + num_output}")])
    if num_output >= max_tokens:
        bound = f"must hold fewer than max_tokens ({max_tokens}) tokens, not {num_output}"
        return InvalidRequest([FieldViolation("output_ids", bound)])
    return None
