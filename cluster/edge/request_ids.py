"""Ids of requests, and what follows from one."""

from __future__ import annotations

import secrets
from hashlib import blake2b


def new_request_id() -> str:
    """An id for a request whose caller gave none; hard to guess, since an id is what a stream is resumed by."""
    return f"req-{secrets.token_hex(16)}"


def seed_of(request_id: str) -> int:
    """The seed of a request that gives none: another for every id, and the same wherever the request is resumed."""
    return int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest())
