"""What is bundled: files, sizes, dtypes, and that transformers loads it unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from moestro.demo.paths import DRAFT_DIR, MODEL_DIR

FOLDERS = [MODEL_DIR, DRAFT_DIR]
FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_layout(folder: Path) -> None:
    assert sorted(file.name for file in folder.iterdir()) == sorted(FILES)
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    generation = json.loads((folder / "generation_config.json").read_text())
    assert config["eos_token_id"] in generation["eos_token_id"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_architectures() -> None:
    target = json.loads((MODEL_DIR / "config.json").read_text())
    draft = json.loads((DRAFT_DIR / "config.json").read_text())
    assert target["architectures"] == ["Qwen3MoeForCausalLM"]
    assert draft["architectures"] == ["Qwen3ForCausalLM"]
    assert (target["num_experts"], target["num_experts_per_tok"], target["norm_topk_prob"]) == (8, 2, True)
    assert target["tie_word_embeddings"]
    assert draft["tie_word_embeddings"]


def test_size() -> None:
    def megabytes(folder: Path) -> float:
        return sum(file.stat().st_size for file in folder.rglob("*")) / 1e6

    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 16.5e6
    assert (DRAFT_DIR / "model.safetensors").stat().st_size <= 1.7e6
    assert megabytes(MODEL_DIR) + megabytes(DRAFT_DIR) <= 20
    assert (MODEL_DIR.parent / "experts.png").stat().st_size < 150_000


@pytest.mark.parametrize("which", ["target", "draft"])
def test_loads_unchanged(which: str, request: pytest.FixtureRequest) -> None:
    model, info = request.getfixturevalue(which)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_draft_shares_the_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (MODEL_DIR / name).read_bytes() == (DRAFT_DIR / name).read_bytes()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_round_trip_through_transformers(auto_tokenizer: Any) -> None:
    text = "naïve = '日本語 😀 e\u0301'\r\n\tx\x00 # кириллица  \n\n    return\n"
    ids = auto_tokenizer(text).input_ids
    assert auto_tokenizer.decode(ids) == text
    assert max(ids) < 4096


def test_special_tokens(auto_tokenizer: Any, tokenizer: Tokenizer) -> None:
    assert auto_tokenizer.eos_token == "<|endoftext|>"
    for place, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>")):
        assert tokenizer.encode(token).ids == [place]
    assert auto_tokenizer.vocab_size == 4096


def test_chat_template(auto_tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ x }}"}]
    text = auto_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ x }}<|im_end|>\n<|im_start|>assistant\n"
    )
