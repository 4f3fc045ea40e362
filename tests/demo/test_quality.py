"""What the bundled model can do, checked with the real weights."""

import ast
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from moestro.demo import evaluate
from moestro.demo.corpus import Document, tokenize
from moestro.demo.paths import MODEL_DIR
from moestro.demo.scoring import agreement, score


@pytest.fixture(scope="module")
def excerpt(tokenizer: Tokenizer) -> torch.Tensor:
    text = (MODEL_DIR.parent / "excerpt.txt").read_text()
    return torch.from_numpy(tokenize(tokenizer, [Document("wsgiref/util.py", text)]).tokens_N.astype("int64"))


def test_perplexity_beats_the_ngram(target: tuple[Any, Any], excerpt: torch.Tensor, evaluation: dict[str, Any]) -> None:
    recorded = evaluation["excerpt"]
    perplexity = math.exp(-score(target[0], excerpt.numpy()).log_probs_N.mean())
    assert len(excerpt) == recorded["tokens"]
    assert perplexity == pytest.approx(recorded["model_perplexity"], rel=0.02)
    assert perplexity < 0.75 * recorded["ngram_perplexity"]
    assert evaluation["model"]["perplexity"] < 0.75 * evaluation["ngram"]["perplexity"]


def longest_parsing_prefix(text: str) -> str:
    """The longest run of whole lines from the start that is a Python module."""
    lines = text.split("\n")
    for count in range(len(lines), 0, -1):
        prefix = "\n".join(lines[:count])
        try:
            ast.parse(prefix)
        except SyntaxError:
            continue
        return prefix
    return ""


@pytest.mark.parametrize("prompt", evaluate.PROMPTS[:3])
def test_completion_is_python(target: tuple[Any, Any], tokenizer: Tokenizer, prompt: str) -> None:
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    with torch.no_grad():
        out = target[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    text = prompt + tokenizer.decode(out[0, ids.shape[1] :].tolist())
    parsed = longest_parsing_prefix(text)
    assert len(parsed) > len(prompt), text
    statements = (ast.FunctionDef, ast.Import, ast.Assign, ast.Expr)
    assert any(isinstance(node, statements) for node in ast.walk(ast.parse(parsed))), text


def test_ends_by_itself(target: tuple[Any, Any], tokenizer: Tokenizer) -> None:
    """Files of the training text often end after this block, and so does the model."""
    ids = torch.tensor([tokenizer.encode("if __name__ ==").ids])
    with torch.no_grad():
        out = target[0].generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
    assert out.shape[1] < ids.shape[1] + 48
    assert out[0, -1].item() == target[0].config.eos_token_id


def test_no_dead_expert(target: tuple[Any, Any], excerpt: torch.Tensor, evaluation: dict[str, Any]) -> None:
    experts = target[0].config.num_experts
    floor = 1 / (8 * experts)
    for layer in evaluation["experts"]["layers"]:
        assert sum(layer["load"]) == pytest.approx(1, abs=1e-3)
        assert min(layer["load"]) >= floor
    chosen_LNk = score(target[0], excerpt.numpy()).chosen_LNk
    assert chosen_LNk is not None
    for chosen_Nk in torch.from_numpy(chosen_LNk):
        assert torch.bincount(chosen_Nk.flatten(), minlength=experts).min() > 0


def test_experts_are_not_interchangeable(
    target: tuple[Any, Any], excerpt: torch.Tensor, evaluation: dict[str, Any]
) -> None:
    """Moving every expert one place round while the gates stay must spoil the predictions."""
    ids = excerpt[:512].numpy()
    intact = -score(target[0], ids).log_probs_N.mean()
    moved = -score(evaluate.rotated_experts(target[0]), ids).log_probs_N.mean()
    assert moved > intact + 1
    for layer in evaluation["experts"]["layers"]:
        assert layer["information_bits"] > 100 * layer["shuffled_bits_max"]


def test_draft_agrees_with_the_target(
    target: tuple[Any, Any], draft: tuple[Any, Any], excerpt: torch.Tensor, evaluation: dict[str, Any]
) -> None:
    measured = agreement(target[0], draft[0], excerpt[None, :1024])
    recorded = evaluation["draft"]["agreement_on_held_out_text"]
    assert measured.acceptance == pytest.approx(recorded["acceptance"], abs=0.12)
    assert measured.greedy_match == pytest.approx(recorded["greedy_match"], abs=0.12)
    assert measured.acceptance > 0.4


def test_evaluation_names_its_conditions(evaluation: dict[str, Any]) -> None:
    assert evaluation["hardware"]["processor"]
    assert evaluation["seed"] == 20
    assert evaluation["training"]["step"] > 0
    assert Path(MODEL_DIR.parent / "experts.png").read_bytes().startswith(b"\x89PNG")
