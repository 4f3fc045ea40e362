"""The blocks of one cache group: who holds them, and which contents can be found again.

A block holds the keys and values of ``block_size`` consecutive positions (PagedAttention, Kwon et al. 2023). The pool
counts references and never touches a tensor. A full block may be *published* under the digest of everything up to its
end; whoever finds it shares it. A block nobody holds keeps its contents findable until it is handed out again, least
recently held first. Every operation is O(1).

Block 0 is the null block: padding in tables and positions behind a window. It is never handed out.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

ROOT_DIGEST = b""  # of the empty prefix; an adapter of its own would start from another


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Name of a full block: what came before it and its own tokens.

    256 bits of BLAKE2b, so that no two prefixes that anyone can construct share a name: a found block is taken without
    comparing token ids. The same in every process of one byte order, unlike ``hash``.
    """
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=32).digest()


class BlockPool:
    """Reference counts, free blocks and findable contents of ``num_blocks`` blocks, the null block included."""

    __slots__ = ("_block_of", "_digest_of", "_fresh", "_refs", "_reusable", "_unused_from")

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (block 0 is the null block), not {num_blocks}")
        self._refs = array("i", bytes(4 * num_blocks))
        self._unused_from = 1  # blocks from here on were never handed out
        self._fresh: list[int] = []  # given back, and nothing to find in them; a stack
        self._reusable: OrderedDict[int, None] = OrderedDict()  # free but findable; oldest first
        self._digest_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_usable(self) -> int:
        """Blocks that can be handed out at all."""
        return len(self._refs) - 1

    @property
    def num_free(self) -> int:
        """Blocks nobody holds, findable ones included."""
        return len(self._refs) - self._unused_from + len(self._fresh) + len(self._reusable)

    @property
    def num_used(self) -> int:
        return self._unused_from - 1 - len(self._fresh) - len(self._reusable)

    def is_free(self, block: int) -> bool:
        return self._refs[block] == 0

    def allocate(self) -> int:
        """A block with one reference and no contents. The caller has looked at ``num_free``."""
        if self._fresh:
            block = self._fresh.pop()
        elif self._unused_from < len(self._refs):
            block = self._unused_from
            self._unused_from += 1
        else:
            block, _ = self._reusable.popitem(last=False)
            self.forget(block)
        self._refs[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more reference to a block that was found."""
        if self._refs[block] == 0:
            del self._reusable[block]
        self._refs[block] += 1

    def release(self, block: int) -> None:
        """One reference less."""
        left = self._refs[block] - 1
        if left < 0:
            raise ValueError(f"block {block} was released more often than it was held")
        self._refs[block] = left
        if left == 0:
            if self._digest_of[block] is None:
                self._fresh.append(block)
            else:
                self._reusable[block] = None

    def find(self, digest: bytes) -> int | None:
        return self._block_of.get(digest)

    def digest_of(self, block: int) -> bytes | None:
        """The name under which a block can be found, if it can."""
        return self._digest_of[block]

    def publish(self, block: int, digest: bytes) -> None:
        """Makes a full block findable. Where the same contents are findable already, the first block stays the one."""
        if digest not in self._block_of and self._digest_of[block] is None:
            self._block_of[digest] = block
            self._digest_of[block] = digest

    def forget(self, block: int) -> None:
        """The contents of a block can no longer be found; its holders keep it."""
        digest = self._digest_of[block]
        if digest is None:
            return
        del self._block_of[digest]
        self._digest_of[block] = None
        if block in self._reusable:
            del self._reusable[block]
            self._fresh.append(block)

    def check_integrity(self, held: Iterable[int]) -> None:
        """Asserts every invariant, given each reference that the sequences hold (a block twice if it is held twice)."""
        counts = [0] * len(self._refs)
        for block in held:
            counts[block] += 1
        assert counts == self._refs.tolist(), f"references {self._refs} differ from holders {counts}"
        assert counts[0] == 0, "the null block is held"
        free = sorted([*self._fresh, *self._reusable, *range(self._unused_from, len(counts))])
        assert free == [b for b in range(1, len(counts)) if counts[b] == 0], f"free {free}, references {counts}"
        published = {digest: block for block, digest in enumerate(self._digest_of) if digest is not None}
        assert published == self._block_of, "digests and blocks disagree"
        assert not any(self._digest_of[block] for block in self._fresh), "a fresh block is findable"
        assert all(self._digest_of[block] for block in self._reusable), "a reusable block is not findable"
