"""The bundled model and draft, loaded once by transformers alone."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from moestro.demo.paths import DRAFT_DIR, MODEL_DIR


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def load(folder: Path) -> tuple[Any, dict[str, Any]]:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    return model.eval(), info


@pytest.fixture(scope="session")
def target() -> tuple[Any, dict[str, Any]]:
    return load(MODEL_DIR)


@pytest.fixture(scope="session")
def draft() -> tuple[Any, dict[str, Any]]:
    return load(DRAFT_DIR)


@pytest.fixture(scope="session")
def auto_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR, local_files_only=True)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


@pytest.fixture(scope="session")
def evaluation() -> dict[str, Any]:
    result: dict[str, Any] = json.loads((MODEL_DIR.parent / "evaluation.json").read_text())
    return result
