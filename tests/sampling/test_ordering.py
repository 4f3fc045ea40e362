"""The order of tokens against Python's own sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moestro.workers.sampling.ordering import _pack, _smallest, ranked

torch.set_num_threads(1)
floats = st.floats(width=32, allow_nan=False)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(floats, st.sampled_from([0.0, -0.0, 1.0, -1.0])), min_size=1, max_size=40), st.data())
def test_ranked_is_the_stable_sort_by_falling_logit(values: list[float], data: st.DataObject) -> None:
    width = data.draw(st.integers(1, len(values)))
    logits, ids = ranked(torch.tensor([values], dtype=torch.float32), width)
    want = sorted(range(len(values)), key=lambda token: (-values[token], token))[:width]
    assert ids[0].tolist() == want
    assert logits[0].tolist() == [values[token] for token in want]


@pytest.mark.parametrize("width", [1, 5, 64])
def test_the_accelerator_path_gives_the_same_keys(width: int) -> None:
    key = _pack(torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).round(decimals=1))
    want = torch.sort(key, dim=1).values[:, :width]
    assert torch.equal(torch.topk(key, width, dim=1, largest=False, sorted=True).values, want)
    assert torch.equal(_smallest(key.clone(), width), want)
