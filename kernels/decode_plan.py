"""Plain attention's plan of a step of decodes whose lengths only the device knows.

Legend: S sequences, B block-table columns, n sequences gathered together, L keys.

``plan_attention`` reads lengths on the host and gathers what they need; here every sequence is gathered as wide as the
table, and a mask on the device says what is seen. The bits are the same, since keys are added up in chunks at fixed
positions and those that are not seen weigh exactly zero. It pays with reading what nobody sees: good for a captured
step where no better kernel is at hand, and as the reference of those that are.
"""

from __future__ import annotations

from math import lcm

import torch
from torch import Tensor

from moestro.kernels.attention_tiles import AttentionTiles
from moestro.kernels.backend import Decodes
from moestro.kernels.paged_attention import AttentionPlan, QueryRun, SequenceGroup, additive_mask, gathered_tiles


def plan_decodes(decodes: Decodes, *, num_kv_heads: int, window: int | None, tiles: AttentionTiles) -> AttentionPlan:
    """A plan made of operations on the device alone; see ``PagedAttention.plan_decodes``."""
    num_sequences, num_columns = decodes.block_table_SB.shape
    size, length_S1 = decodes.block_size, decodes.context_len_S.long().unsqueeze(1)
    begin_S1, most_keys = torch.zeros_like(length_S1), num_columns * size
    if window is not None:
        unit = lcm(tiles.chunk, size)  # as plan_attention aligns what it gathers
        begin_S1 = (length_S1 - window).clamp_(min=0) // unit * unit
        most_keys = min(most_keys, window + unit - 1)
    num_keys = -(-most_keys // tiles.grain) * tiles.grain
    at_once = max(1, tiles.pairs_at_once // (num_kv_heads * num_keys))
    groups = []
    for start in range(0, num_sequences, at_once):
        rows = slice(start, min(start + at_once, num_sequences))
        length_n1, begin_n1 = length_S1[rows], begin_S1[rows]
        mask = additive_mask((length_n1 - 1 - begin_n1).unsqueeze(2), 0, num_keys, window)
        gathered = gathered_tiles(
            decodes.block_table_SB[rows],
            begin_n1 // size,
            (length_n1 - 1) // size + 1,
            -(-num_keys // size),
            num_kv_heads,
        )
        run = QueryRun(rows, 1, 0, num_keys, 0, mask)
        groups.append(SequenceGroup(rows.stop - rows.start, gathered, num_keys, (run,)))
    write_block_S = decodes.slot_S // size
    return AttentionPlan(
        write_block_S,
        decodes.slot_S - write_block_S * size,
        _fresh_blocks(decodes, write_block_S),
        tuple(groups),
        tiles,
    )


def _fresh_blocks(decodes: Decodes, write_block_S: Tensor) -> Tensor:
    """The blocks whose first slot is written. How many there are is not known here, so sequences that begin none name
    one that is: the list has an entry for each. Where nobody begins one, all name block 0, which is zero as it is."""
    begins_S = decodes.slot_S % decodes.block_size == 0
    return torch.where(begins_S, write_block_S, 0)
