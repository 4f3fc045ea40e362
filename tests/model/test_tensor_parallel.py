"""Tensor parallelism within one process: ranks are threads, collectives a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from benchmarks.small_models import MODELS, make_model, random_ids, save_model
from tests.model.oracle import Driver, reference_logits
from torch import Tensor

from moestro.protos.errors import ConfigError
from moestro.workers.loading import load_model
from moestro.workers.model.sharding import shard_heads, token_shard
from moestro.workers.model.vocabulary import Embedding
from moestro.workers.model_config import AttentionSpec


class Board:
    """What the ranks of a set show each other."""

    def __init__(self, size: int) -> None:
        self.size, self.barrier, self.shown = size, threading.Barrier(size, timeout=60), [None] * size

    def exchange(self, rank: int, x: Tensor) -> list[Tensor]:
        self.shown[rank] = x
        self.barrier.wait()
        everyone = list(self.shown)
        self.barrier.wait()
        return everyone


@dataclass(frozen=True)
class ThreadedTP:
    rank: int
    board: Board

    @property
    def size(self) -> int:
        return self.board.size

    def sum(self, x: Tensor) -> Tensor:
        out, *rest = self.board.exchange(self.rank, x)
        for y in rest:
            out = out + y
        return out

    def gather(self, x: Tensor, dim: int = -1) -> Tensor:
        everyone = self.board.exchange(self.rank, x)
        assert len({y.shape for y in everyone}) == 1, "a gather takes equal shapes"
        return torch.cat(everyone, dim)


def run_ranks(size: int, work: Callable[[ThreadedTP], list[Tensor]]) -> list[list[Tensor]]:
    board = Board(size)
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: work(ThreadedTP(rank, board)), range(size)))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_every_rank_gets_the_logits_of_one(name, size, tmp_path):
    model = make_model(name)
    save_model(model, tmp_path)
    a, b = random_ids(23, seed=1), random_ids(9, seed=2)

    def work(tp: ThreadedTP) -> list[Tensor]:
        driver = Driver(load_model(tmp_path, tp=tp))
        logits = [driver.step([(0, a[:20]), (1, b[:7])])]
        logits += [driver.step([(0, a[i : i + 1]), (1, b[j : j + 1])]) for i, j in ((20, 7), (21, 8))]
        logits.append([*driver.step([(0, a[22:])]), torch.zeros(0, 101)])  # fewer tokens than ranks
        driver.step([])
        return [torch.cat(part) for part in zip(*logits, strict=True)]

    ranks = run_ranks(size, work)
    for got in ranks:
        torch.testing.assert_close(got[0], reference_logits(model, a), rtol=0, atol=2e-4)
        torch.testing.assert_close(got[1], reference_logits(model, b), rtol=0, atol=2e-4)
        assert all(torch.equal(x, y) for x, y in zip(got, ranks[0], strict=True))


@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2), (8, 1), (6, 3)])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 8])
def test_query_heads_lie_with_their_key_heads(heads, size):
    num_heads, num_kv_heads = heads
    spec = AttentionSpec(num_heads, num_kv_heads, 4, 0.5)
    fits = num_heads % size == 0 and (num_kv_heads % size == 0 or size % num_kv_heads == 0)
    if not fits:
        with pytest.raises(ConfigError, match=rf"tp must .*, not {size}"):
            [shard_heads(spec, rank, size) for rank in range(size)]
        return
    seen: list[int] = []
    for rank in range(size):
        shard = shard_heads(spec, rank, size)
        for head in range(shard.first_head, shard.first_head + shard.num_heads):
            seen.append(head)
            local = (head - shard.first_head) * shard.num_kv_heads // shard.num_heads
            assert shard.first_kv_head + local == head * num_kv_heads // num_heads
    assert seen == list(range(num_heads))


def test_a_width_that_cannot_be_shared_is_refused_before_any_weight_is_read(tmp_path):
    save_model(make_model("llama", num_attention_heads=6, num_key_value_heads=6, hidden_size=96), tmp_path)
    with pytest.raises(ConfigError, match="tp must divide num_attention_heads 6, not 4"):
        load_model(tmp_path, tp=ThreadedTP(0, Board(4)))
    save_model(make_model("qwen3", num_attention_heads=3, num_key_value_heads=3, intermediate_size=50), tmp_path)
    with pytest.raises(ConfigError, match="tp must divide intermediate_size 50, not 3"):
        load_model(tmp_path, tp=ThreadedTP(0, Board(3)))


@pytest.mark.parametrize("num_tokens", range(12))
def test_token_shares_tile_the_tokens(num_tokens):
    for size in (1, 2, 3, 4, 8):
        shares = [token_shard(num_tokens, rank, size) for rank in range(size)]
        assert [t for start, stop in shares for t in range(start, stop)] == list(range(num_tokens))
        assert all(stop - start <= -(-num_tokens // size) for start, stop in shares)


def test_a_row_that_is_not_finite_stays_with_its_token() -> None:
    """Every rank reads some row of its own for tokens that belong to another."""
    table_VM = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    table_VM[[0, 3]] = torch.tensor([[float("nan")], [float("inf")]])
    ids_T = torch.tensor([1, 2, 4, 5, 0, 3])

    @dataclass(frozen=True)
    class Part:
        rank: int
        size: int = 2

        def sum(self, x: Tensor) -> Tensor:
            return x

    halves = [Embedding(table_VM[3 * r : 3 * r + 3], 3 * r, Part(r)).forward(ids_T) for r in range(2)]  # type: ignore[arg-type]
    assert torch.equal((halves[0] + halves[1])[:4], table_VM[ids_T[:4]])
