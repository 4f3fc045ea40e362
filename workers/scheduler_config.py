"""What bounds a scheduler. Every bound says what happens when it is reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers that share a block table: all full-attention layers, or all layers of one sliding window."""

    window: int | None  # tokens a query sees, itself included; None: all. Blocks behind it are freed on the way
    num_blocks: int  # rows of the cache tensor, the null block 0 included; fewer: more preemption, shorter context


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Bounds and policies of one rank. Deterministic: equal configurations fed equal calls make equal plans."""

    groups: tuple[CacheGroup, ...]
    block_size: int = 16  # tokens a block; larger: fewer table entries, more unused slots in each last block
    max_num_sequences: int = 256  # sequences with blocks at one time; more wait
    max_num_tokens: int = 2048  # tokens a step; larger: faster prefill, longer steps for those that decode
    max_context: int = 4096  # prompt and output tokens of a sequence; reached: it ends with LENGTH
    max_waiting: int = 1024  # sequences without blocks; one more is refused with Overloaded
    admission: Literal["continuous", "static"] = "continuous"  # static: only into an empty rank; wastes slots
    reservation: Literal["paged", "max_length"] = "paged"  # max_length: blocks for max_tokens held from the start

    def validate(self) -> None:
        """Raises ValueError naming the field, the bound and the value."""
        for name in ("block_size", "max_num_sequences", "max_waiting"):
            _at_least(name, getattr(self, name), 1)
        _at_least("max_context", self.max_context, 2)
        # Every running sequence is owed one token a step, so that nobody's prompt can stall another's output.
        if self.max_num_tokens < self.max_num_sequences:
            raise ValueError(
                f"max_num_tokens must be at least max_num_sequences ({self.max_num_sequences}), "
                f"not {self.max_num_tokens}"
            )
        if not self.groups:
            raise ValueError("groups must name at least one cache group")
        for index, group in enumerate(self.groups):
            _at_least(f"groups[{index}].num_blocks", group.num_blocks, 2)
            if group.window is not None:
                _at_least(f"groups[{index}].window", group.window, 1)
        if self.admission not in ("continuous", "static"):
            raise ValueError(f"admission must be 'continuous' or 'static', not {self.admission!r}")
        if self.reservation not in ("paged", "max_length"):
            raise ValueError(f"reservation must be 'paged' or 'max_length', not {self.reservation!r}")

    @property
    def context_limit(self) -> int:
        """Tokens that one sequence can ever hold: ``max_context``, or fewer where a pool is smaller than that."""
        return min([self.max_context, *(_group_tokens(group, self.block_size) for group in self.groups)])

    @property
    def pool_tokens(self) -> int:
        """Tokens whose keys and values are held at once, over all sequences. Behind a window blocks are freed on the
        way, so a group with one counts as holding ``max_context`` of every sequence."""
        every = self.max_num_sequences * self.max_context
        full = ((group.num_blocks - 1) * self.block_size for group in self.groups if group.window is None)
        return min([every, *full])


def _at_least(name: str, value: int, bound: int) -> None:
    if value < bound:
        raise ValueError(f"{name} must be at least {bound}, not {value}")


def _group_tokens(group: CacheGroup, block_size: int) -> int:
    """Tokens of one sequence alone in a group. With a window, one token at a time needs no more blocks than the window
    can touch; a pool with that many carries any length."""
    usable = group.num_blocks - 1
    if group.window is not None and usable >= blocks_of_window(group.window, block_size):
        return 2**62
    return usable * block_size


def blocks_of_window(window: int, block_size: int) -> int:
    """Most blocks that ``window`` consecutive positions can touch."""
    return (window + block_size - 2) // block_size + 1
