"""TextModel against transformers' AutoTokenizer, and the checkpoints it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from moestro.cluster.text.model import MAX_TOKENIZER_BYTES, TextModel
from moestro.protos.errors import CheckpointError, InvalidRequest

KINDS = ["byte_level", "sentencepiece", "metaspace", "wordpiece"]
TEXTS = ["", "def f(x):\n\treturn x", "  Grüße </s> 你好 🙂", "e\u0301 <|im_end|>x", "👩‍👩‍👧\x00"]
MESSAGES = [{"role": "user", "content": "hello 你"}, {"role": "assistant", "content": " a\n"}]


@pytest.mark.parametrize("kind", KINDS)
def test_equals_transformers(folders: dict[str, Path], kind: str) -> None:
    model, oracle = TextModel.load(folders[kind]), AutoTokenizer.from_pretrained(folders[kind])
    for text in TEXTS:
        for special in (True, False):
            ids = model.encode(text, add_special_tokens=special)
            assert ids == oracle.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert model.decode(ids, skip) == oracle.decode(ids, skip_special_tokens=skip)
    assert model.render_chat(MESSAGES) == oracle.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )
    expected = oracle.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert model.encode_chat(MESSAGES) == expected
    assert {oracle.bos_token_id, oracle.eos_token_id} <= model.special_ids
    assert model.vocab_size == max(oracle.get_vocab().values()) + 1


def copy_with(folders: dict[str, Path], target: Path, files: dict[str, Any]) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_bytes((folders["byte_level"] / name).read_bytes())
    for name, value in files.items():
        (target / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return target


def test_generation_defaults(folders: dict[str, Path], tmp_path: Path) -> None:
    files = {
        "generation_config.json": {
            "temperature": 0.7,
            "top_k": 20,
            "top_p": 0.8,
            "min_p": 0.1,
            "eos_token_id": [3, 2],
            "repetition_penalty": 1.05,
            "max_new_tokens": 99,
            "do_sample": True,
        },
        "config.json": {"eos_token_id": 7},
    }
    generation = TextModel.load(copy_with(folders, tmp_path, files)).generation
    assert (generation.temperature, generation.top_k, generation.top_p, generation.min_p) == (0.7, 20, 0.8, 0.1)
    assert (generation.repetition_penalty, generation.max_new_tokens) == (1.05, 99)
    assert generation.eos_token_ids == (2, 3, 7)
    greedy = copy_with(folders, tmp_path, {"generation_config.json": {"temperature": 0.7, "do_sample": False}})
    assert TextModel.load(greedy).generation.temperature == 0.0


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer.json": {"version": "1.0"}}, "tokenizer.json"),
        ({"tokenizer_config.json": "[1]"}, "tokenizer_config.json: must hold a JSON object"),
        ({"tokenizer_config.json": "nope"}, "tokenizer_config.json: not valid JSON"),
        ({"tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["x.Y", None]}}}, "auto_map"),
        ({"tokenizer_config.json": {"eos_token": 3}}, "eos_token must be"),
        ({"tokenizer_config.json": {"chat_template": "{% if"}}, "not valid Jinja"),
        ({"tokenizer_config.json": {"chat_template": 5}}, "chat_template must be"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "rag", "template": "x"}]}}, "'default'"),
        ({"chat_template.jinja": "{{"}, "chat_template.jinja"),
        ({"generation_config.json": {"temperature": -1}}, "temperature must be in"),
        ({"generation_config.json": {"top_p": 0}}, "top_p must be in"),
        ({"generation_config.json": '{"min_p": NaN}'}, "min_p must be in"),
        ({"generation_config.json": {"top_k": "many"}}, "top_k must be an integer"),
        ({"generation_config.json": {"eos_token_id": [-1]}}, "eos_token_id"),
    ],
)
def test_refused_checkpoints(folders: dict[str, Path], tmp_path: Path, files: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        TextModel.load(copy_with(folders, tmp_path, files))


def test_missing_and_huge_tokenizers_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: missing"):
        TextModel.load(tmp_path)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_TOKENIZER_BYTES + 1)
    with pytest.raises(CheckpointError, match="bytes, more than"):
        TextModel.load(tmp_path)


def test_template_files_and_named_templates(folders: dict[str, Path], tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D{{ eos_token }}"}, {"name": "tool_use", "template": "T"}]
    config = {"chat_template": named, "eos_token": {"content": "</s>", "lstrip": False}}
    folder = copy_with(folders, tmp_path, {"tokenizer_config.json": config})
    assert TextModel.load(folder).render_chat(MESSAGES) == "D</s>"
    (folder / "chat_template.jinja").write_text("from the file")
    assert TextModel.load(folder).render_chat(MESSAGES) == "from the file"
    bare = tmp_path / "bare"
    bare.mkdir()
    without = TextModel.load(copy_with(folders, bare, {"tokenizer_config.json": {}}))
    assert not without.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        without.render_chat(MESSAGES)


def test_bad_messages_name_their_fields(folders: dict[str, Path]) -> None:
    model = TextModel.load(folders["byte_level"])
    bad: list[Any] = [{"role": "user", "content": "x"}, {"role": "a<b", "content": None}, {"content": "x"}]
    with pytest.raises(InvalidRequest) as caught:
        model.render_chat(bad)
    fields = [violation.field for violation in caught.value.violations]
    assert fields == ["messages[1].role", "messages[1].content", "messages[2].role"]
    with pytest.raises(InvalidRequest, match="at least 1 message"):
        model.render_chat([])


def test_text_that_is_no_unicode_is_the_callers_fault(folders: dict[str, Path]) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        TextModel.load(folders["byte_level"]).encode("\ud800")


def test_token_text(folders: dict[str, Path]) -> None:
    model = TextModel.load(folders["sentencepiece"])
    vocab = {token: i for i, token in enumerate(model._tokens)}
    assert model.token_text(vocab["<0xF0>"]) == "\\xf0"
    assert model.token_text(vocab["▁▁"]) == "  "
    assert (model.token_text(-1), model.token_text(10**6), model.token_text(vocab["</s>"])) == ("", "", "</s>")


def test_neither_torch_nor_transformers_nor_ray_is_imported() -> None:
    import subprocess
    import sys

    source = Path(__file__).parents[2] / "src"
    code = "import sys, moestro.cluster.text.stream; print({'torch', 'ray', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(source)}, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
