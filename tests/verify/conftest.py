from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.small_models import make_model, save_model
from tests.text.tokenizers_zoo import write
from tokenizers import Tokenizer


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Qwen3-MoE of five layers with a tokenizer and a chat template, in fp32."""
    torch.set_num_threads(1)
    folder = write(tmp_path_factory.mktemp("verify") / "tiny", "byte_level")
    vocab_size = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()
    options = {"seed": 3, "vocab_size": vocab_size, "num_hidden_layers": 5, "max_position_embeddings": 128}
    return save_model(make_model("qwen3_moe", **options), folder)
