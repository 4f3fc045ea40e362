from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.small_models import make_model, save_model


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Qwen3-MoE in one file."""
    return save_model(make_model("qwen3_moe"), tmp_path / "model")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in several."""
    return save_model(make_model("qwen3_moe"), tmp_path / "sharded", max_shard_size="100KB")


@pytest.fixture
def edit() -> Callable[..., None]:
    """Changes fields of a JSON file; None removes one."""

    def change(path: Path, **fields: object) -> None:
        raw = json.loads(path.read_text())
        raw.update({name: value for name, value in fields.items() if value is not None})
        for name, value in fields.items():
            if value is None:
                raw.pop(name, None)
        path.write_text(json.dumps(raw))

    return change
