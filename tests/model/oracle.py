"""What transformers makes of a model, and a driver that feeds our decoder by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moestro.workers.batch import Batch, CacheTables
from moestro.workers.kv_cache import KVCache
from moestro.workers.model.decoder import Decoder

if TYPE_CHECKING:
    import transformers  # which processes that only drive a decoder need not load


@torch.no_grad()
def reference_logits(model: transformers.PreTrainedModel, ids: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(ids)])).logits[0].float()


@torch.no_grad()
def reference_greedy(model: transformers.PreTrainedModel, ids: Sequence[int], num_tokens: int) -> list[int]:
    prompt = torch.tensor([list(ids)])
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False
    )
    return out[0, len(ids) :].tolist()


@dataclass
class Driver:
    """Blocks handed out in a scattered order; what lies behind a window is given up, as a scheduler would."""

    decoder: Decoder
    block_size: int = 4
    num_blocks: int = 400
    lengths: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.cache: KVCache = self.decoder.cache_spec.allocate(self.num_blocks, self.block_size)
        for layer in self.cache.layers:
            layer[0] = 1e4  # padding points at block 0: nothing there may ever count
        order = torch.randperm(self.num_blocks - 1, generator=torch.Generator().manual_seed(3)) + 1
        self.free = order.tolist()

    def step(self, spans: Sequence[tuple[int, Sequence[int]]]) -> list[Tensor]:
        """Computes the next tokens of each sequence; logits_TV of each span."""
        batch = self.batch(spans)
        logits = self.decoder.forward(batch, self.cache)
        starts = batch.query_start_S1
        return [logits[a:b] for a, b in pairwise(starts)]

    def batch(self, spans: Sequence[tuple[int, Sequence[int]]]) -> Batch:
        assert [len(ids) > 1 for _, ids in spans] == sorted(len(ids) > 1 for _, ids in spans), "decodes come first"
        starts, contexts, positions, slots = [0], [], [], []
        for sequence, ids in spans:
            begin = self.lengths.get(sequence, 0)
            end = begin + len(ids)
            table = self.tables.setdefault(sequence, [])
            while len(table) * self.block_size < end:
                table.append(self.free.pop())
            positions += range(begin, end)
            slots += [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(begin, end)]
            starts.append(starts[-1] + len(ids))
            contexts.append(end)
            self.lengths[sequence] = end
        device = self.decoder.cache_spec.device
        slot_T = torch.tensor(slots, dtype=torch.int64, device=device)
        return Batch(
            token_ids_T=torch.tensor([i for _, ids in spans for i in ids], dtype=torch.int64, device=device),
            positions_T=torch.tensor(positions, dtype=torch.int64, device=device),
            query_start_S1=tuple(starts),
            context_len_S=tuple(contexts),
            num_decodes=sum(len(ids) == 1 for _, ids in spans),
            tables_G=tuple(
                CacheTables(self._table(spans, starts, contexts, window).to(device), slot_T)
                for window in self.decoder.cache_spec.windows
            ),
            logit_rows_R=torch.arange(starts[-1], device=device),
            num_tokens_N=(starts[-1],),
        )

    def _table(
        self, spans: Sequence[tuple[int, Sequence[int]]], starts: list[int], contexts: list[int], window: int | None
    ) -> Tensor:
        width = max((len(self.tables[s]) for s, _ in spans), default=0)
        rows = torch.zeros(len(spans), width, dtype=torch.int32)
        for row, (sequence, ids) in enumerate(spans):
            first_key = 0 if window is None else max(0, contexts[row] - len(ids) - window + 1)
            for column, block in enumerate(self.tables[sequence]):
                if (column + 1) * self.block_size > first_key:
                    rows[row, column] = block
        return rows


def greedy(driver: Driver, prompts: dict[int, Sequence[int]], num_tokens: int) -> dict[int, list[int]]:
    """Prefills each prompt alone, then decodes all together."""
    out: dict[int, list[int]] = {}
    for sequence, ids in prompts.items():
        out[sequence] = [int(driver.step([(sequence, ids)])[0][-1].argmax())]
    for _ in range(num_tokens - 1):
        logits = driver.step([(sequence, [tokens[-1]]) for sequence, tokens in out.items()])
        for tokens, logits_1V in zip(out.values(), logits, strict=True):
            tokens.append(int(logits_1V[0].argmax()))
    return out
