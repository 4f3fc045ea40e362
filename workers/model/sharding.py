"""Which part of a width one tensor-parallel rank holds."""

from __future__ import annotations

from dataclasses import dataclass

from moestro.protos.errors import ConfigError
from moestro.workers.model_config import AttentionSpec


def even_shard(what: str, total: int, rank: int, size: int) -> tuple[int, int]:
    """(start, length) of the rank's equal share. Raises ConfigError when ``total`` cannot be shared equally."""
    if total % size:
        raise ConfigError(f"tp must divide {what} {total}, not {size}")
    return rank * (total // size), total // size


def token_shard(num_tokens: int, rank: int, size: int) -> tuple[int, int]:
    """(start, stop) of the rank's contiguous share of the tokens; shares differ by one token at most."""
    return rank * num_tokens // size, (rank + 1) * num_tokens // size


def token_shares(num_tokens_N: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """How many tokens each rank of a group routes, when rank r's tensor-parallel set holds ``num_tokens_N[r]``."""
    if tp == 1:
        return num_tokens_N
    shards = (token_shard(num_tokens, rank % tp, tp) for rank, num_tokens in enumerate(num_tokens_N))
    return tuple(stop - start for start, stop in shards)


@dataclass(frozen=True, slots=True)
class HeadShard:
    """The heads of one rank."""

    first_head: int
    num_heads: int
    first_kv_head: int
    num_kv_heads: int
    kv_copies: int  # ranks that hold the same key/value heads


def shard_heads(spec: AttentionSpec, rank: int, size: int) -> HeadShard:
    """Query heads in equal shares; key/value heads likewise, or each on several ranks when there are more ranks.
    Raises ConfigError when neither goes evenly."""
    first_head, num_heads = even_shard("num_attention_heads", spec.num_heads, rank, size)
    if size <= spec.num_kv_heads:
        first_kv_head, num_kv_heads = even_shard("num_key_value_heads", spec.num_kv_heads, rank, size)
        return HeadShard(first_head, num_heads, first_kv_head, num_kv_heads, 1)
    if size % spec.num_kv_heads:
        raise ConfigError(f"tp must be a divisor or a multiple of num_key_value_heads {spec.num_kv_heads}, not {size}")
    copies = size // spec.num_kv_heads
    return HeadShard(first_head, num_heads, rank // copies, 1, copies)
