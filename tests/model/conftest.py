from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.small_models import make_model, save_model

from moestro.workers.loading import load_model
from moestro.workers.model.decoder import Decoder

Pair = tuple[transformers.PreTrainedModel, Decoder]


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Pair]:
    """A model of transformers and ours, loaded from what transformers saved."""
    made: dict[object, Pair] = {}

    def get(name: str, **options: object) -> Pair:
        key = (name, repr(sorted(options.items())))
        if key not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            model = make_model(name, **options)
            made[key] = (model, load_model(save_model(model, folder)))
        return made[key]

    return get
