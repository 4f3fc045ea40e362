"""The block tables of sequences over all cache groups: find, hold, extend, publish, trim, release.

Sharing is on only when every group sees the whole context: behind a window the blocks of a prefix are gone, and a
prefix found in one group alone would spare no computation. Only full blocks are ever shared, so nobody writes into a
block that another holds and no copy on write is needed.

A block is published in the plan of the step that fills it, before its contents exist. A sequence admitted later in the
same plan may share it: the runner writes the keys and values of all tokens of a layer before the attention of that
layer reads any. Should the step fail, ``Scheduler.abandon`` takes the publication back.
"""

from __future__ import annotations

from collections.abc import Sequence

from moestro.workers.kv_blocks import ROOT_DIGEST, BlockPool, chain_digest
from moestro.workers.scheduler_config import CacheGroup, blocks_of_window
from moestro.workers.scheduler_sequence import NO_LIMIT, SequenceState, empty_tables


class TableManager:
    """Which blocks each sequence holds in each group."""

    __slots__ = ("_block_size", "_groups", "_pools", "_windows", "has_windows", "is_sharing")

    def __init__(self, groups: Sequence[CacheGroup], pools: Sequence[BlockPool], block_size: int) -> None:
        self._groups = tuple(zip(groups, pools, strict=True))
        self._pools = tuple(pools)
        self._windows = tuple((i, g.window, pools[i]) for i, g in enumerate(groups) if g.window is not None)
        self._block_size = block_size
        self.has_windows = bool(self._windows)
        self.is_sharing = not self._windows

    def find_prefix(self, sequence: SequenceState) -> int:
        """Full blocks at the start of the sequence that every group has. The last known token is never among them: its
        logits are wanted. Neither is any of a sequence whose prompt's log probabilities are wanted, or that is to
        compute anew what it may have written itself."""
        if not self.is_sharing or sequence.wants_prompt_logprobs or sequence.recomputes:
            return 0
        most = (len(sequence.token_ids) - 1) // self._block_size
        found = 0
        while found < most:
            digest = self._digest(sequence, found)
            for pool in self._pools:
                if pool.find(digest) is None:
                    return found
            found += 1
        return found

    def fits(
        self, sequence: SequenceState, num_tokens: int, num_found: int, spare: int, victims: Sequence[SequenceState]
    ) -> bool:
        """Whether every group can give blocks for ``num_tokens`` tokens, ``num_found`` blocks of them found, and keep
        ``spare`` blocks free, were the blocks of ``victims`` free too. With victims it is an upper bound: blocks that
        several of them share are counted for each."""
        for index, (group, pool) in enumerate(self._groups):
            taken = num_found
            for digest in sequence.digests[:num_found]:
                block = pool.find(digest)
                taken -= block is not None and not pool.is_free(block)
            needed = _ceil_div(num_tokens, self._block_size)
            if group.window is not None:
                needed = min(needed, blocks_of_window(group.window, self._block_size))
            freed = sum(len(v.block_tables[index]) - v.first_live[index] for v in victims)
            if pool.num_free + freed < needed - num_found + taken + spare:
                return False
        return True

    def hold(self, sequence: SequenceState, num_tokens: int, num_found: int) -> None:
        """Takes the found blocks and, where the whole context is seen, fresh ones for ``num_tokens`` tokens. Groups
        with a window are extended step by step, since most of a long prompt would be behind it at once."""
        for index, (group, pool) in enumerate(self._groups):
            table = sequence.block_tables[index]
            for digest in sequence.digests[:num_found]:
                block = pool.find(digest)
                assert block is not None
                pool.share(block)
                table.append(block)
            if group.window is None:
                table.extend(pool.allocate() for _ in range(_ceil_div(num_tokens, self._block_size) - num_found))
        sequence.num_computed = num_found * self._block_size
        sequence.num_published = num_found
        self._update_capacity(sequence)

    def reachable(self, sequence: SequenceState) -> int:
        """Tokens that the sequence could hold by taking every free block."""
        blocks = NO_LIMIT
        for table, pool in zip(sequence.block_tables, self._pools, strict=True):
            blocks = min(blocks, len(table) + pool.num_free)
        return blocks * self._block_size

    def extend(self, sequence: SequenceState, end: int) -> None:
        """Makes room for tokens before ``end``; the caller knows that it is reachable."""
        needed = _ceil_div(end, self._block_size)
        for table, pool in zip(sequence.block_tables, self._pools, strict=True):
            while len(table) < needed:
                table.append(pool.allocate())
        self._update_capacity(sequence)

    def steady_until(self, end: int) -> int:
        """Of a sequence computed up to ``end``: while it has fewer tokens than this, one more needs no block and fills
        none. 0 if already the next one does."""
        filled = end % self._block_size
        return end - filled + self._block_size - 1 if filled else 0

    def commit(self, sequence: SequenceState, end: int) -> None:
        """A step will compute the tokens before ``end``: publishes the blocks that it fills."""
        if not self.is_sharing:
            return
        size = self._block_size
        for index in range(sequence.num_published, end // size):
            digest = self._digest(sequence, index)
            for table, pool in zip(sequence.block_tables, self._pools, strict=True):
                pool.publish(table[index], digest)
        sequence.num_published = end // size

    def trim(self, sequence: SequenceState) -> None:
        """Frees the blocks that lie wholly behind the window of the next token to compute."""
        for index, window, pool in self._windows:
            keep = (sequence.num_computed - window + 1) // self._block_size
            if keep <= sequence.first_live[index]:
                continue
            table = sequence.block_tables[index]
            for entry in range(sequence.first_live[index], keep):
                pool.release(table[entry])
                table[entry] = 0
            sequence.first_live[index] = keep

    def release(self, sequence: SequenceState, forget_from: int | None = None) -> None:
        """Gives everything back; nothing is computed any more. Deepest first, so that the start of a prefix, which the
        rest is worth nothing without, is the last to be reused. The contents of the blocks from ``forget_from`` on are
        not to be found any more: they were never written, or are not to be trusted."""
        for index, pool in enumerate(self._pools):
            table = sequence.block_tables[index]
            for entry in range(len(table) - 1, sequence.first_live[index] - 1, -1):
                if forget_from is not None and entry >= forget_from:
                    pool.forget(table[entry])
                pool.release(table[entry])
        # New lists: whoever still looks at the old plan sees it as it was.
        sequence.block_tables = empty_tables(len(self._pools))
        sequence.first_live = [0] * len(self._pools)
        sequence.num_computed = sequence.num_published = sequence.capacity = sequence.steady_until = 0

    def check_integrity(self, holders: Sequence[SequenceState]) -> None:
        """Asserts that tables and pools agree and that every position a next token would see has its block."""
        size = self._block_size
        for index, (group, pool) in enumerate(self._groups):
            pool.check_integrity(block for s in holders for block in s.block_tables[index] if block)
            for s in holders:
                table = s.block_tables[index]
                seen_from = 0 if group.window is None else max(0, s.num_computed - group.window + 1)
                assert s.first_live[index] == seen_from // size, f"{s}: live from {s.first_live}, seen from {seen_from}"
                assert not any(table[: s.first_live[index]]), f"{s}: a block behind the window is held: {table}"
                assert all(table[s.first_live[index] :]), f"{s}: a block within the window is missing: {table}"
        for s in holders:
            assert s.num_computed <= s.capacity == min(map(len, s.block_tables)) * size, f"{s}: capacity {s.capacity}"
            for table, pool in zip(s.block_tables, self._pools, strict=True):
                for index, block in enumerate(table):
                    name = pool.digest_of(block)
                    assert name is None or index < s.num_published, f"{s}: a block that is not full is findable"
                    assert name is None or name == self._digest(s, index), f"{s}: block {block} has another's name"

    def _digest(self, sequence: SequenceState, index: int) -> bytes:
        digests, size = sequence.digests, self._block_size
        while len(digests) <= index:
            start = len(digests) * size
            parent = digests[-1] if digests else ROOT_DIGEST
            digests.append(chain_digest(parent, sequence.token_ids[start : start + size]))
        return digests[index]

    def _update_capacity(self, sequence: SequenceState) -> None:
        sequence.capacity = min(map(len, sequence.block_tables)) * self._block_size


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
