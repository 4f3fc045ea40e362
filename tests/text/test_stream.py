"""Streams against one-shot decoding and stop strings against their definition, however the tokens are cut.

Properties, for every prompt P, output O and cutting of O into pushes:
- decode(P) without an unfinished character at its end, then the stream's text, is decode(P + O);
- decode equals tokenizers' own wherever no run of byte tokens is ill-formed UTF-8.
"""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from moestro.cluster.text.model import TextModel
from moestro.cluster.text.stream import TextStream

KINDS = ["byte_level", "sentencepiece", "metaspace", "wordpiece"]
TEXTS = [
    "def hello(name):\n    return 'Hello'  # 你好 🙂",
    "  two leading spaces, e\u0301 combining, 👩‍👩‍👧 family",
    "Grüße\ufffd\ufffd \x00 naïve",
]


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, TextModel]:
    return {kind: TextModel.load(folder) for kind, folder in folders.items()}


@pytest.fixture(scope="module")
def oracles(folders: dict[str, Path]) -> dict[str, Tokenizer]:
    return {kind: Tokenizer.from_file(str(folder / "tokenizer.json")) for kind, folder in folders.items()}


def cut(ids: list[int], seed: int) -> list[list[int]]:
    rng, chunks, at = random.Random(seed), [], 0
    while at < len(ids):
        size = rng.choice((0, 1, 1, 1, 2, 5))
        chunks.append(ids[at : at + size])
        at += size
    return chunks


def stream_text(stream: TextStream, chunks: list[list[int]]) -> str:
    return "".join(stream.push(chunk).text for chunk in chunks) + stream.finish()


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_stream_is_the_decode_in_context(
    models: dict[str, TextModel], kind: str, skip: bool, data: st.DataObject
) -> None:
    model = models[kind]
    tokens = st.lists(st.integers(0, model.vocab_size - 1), max_size=20)
    prompt, output, seed = data.draw(tokens), data.draw(tokens), data.draw(st.integers(0, 999))
    streamed = stream_text(TextStream(model, prompt, (), skip), cut(output, seed))
    stable = "" if model._table is None else model.detokenizer((), skip).feed(prompt)
    if model._table is None:
        stable = model.decode(prompt, skip)
    assert stable + streamed == model.decode([*prompt, *output], skip)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_decode_is_tokenizers(
    models: dict[str, TextModel], oracles: dict[str, Tokenizer], kind: str, skip: bool, data: st.DataObject
) -> None:
    model, oracle = models[kind], oracles[kind]
    ids = data.draw(st.lists(st.integers(0, model.vocab_size - 1), max_size=20))
    expected = oracle.decode(ids, skip_special_tokens=skip)
    if kind == "sentencepiece" and "\ufffd" in expected:  # ill-formed runs differ on purpose, by U+FFFD only
        ours = model.decode(ids, skip)
        assert "\ufffd" in ours
        kept = iter(ours)  # what tokenizers keeps, we keep in order; we may keep more of an ill-formed run
        assert all(char in kept for char in expected if char != "\ufffd")
    else:
        assert model.decode(ids, skip) == expected


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("text", TEXTS)
def test_text_streams_back(models: dict[str, TextModel], kind: str, text: str) -> None:
    model = models[kind]
    prompt = model.encode("Say: ")
    output = model.encode("x" + text, add_special_tokens=False)
    streamed = stream_text(TextStream(model, prompt), [[token_id] for token_id in output])
    assert model.decode(prompt) + streamed == model.decode([*prompt, *output])
    if kind == "byte_level":
        assert streamed == unicodedata.normalize("NFC", "x" + text)


def test_half_a_character_waits_and_ends_as_replacement(models: dict[str, TextModel]) -> None:
    for kind, byte_tokens in (("byte_level", ["Ł", "ł"]), ("sentencepiece", ["<0xF0>", "<0x9F>"])):
        model = models[kind]
        vocab = model._tokenizer.get_vocab()
        ids = [vocab["ð"], vocab["Ł"]] if kind == "byte_level" else [vocab[token] for token in byte_tokens]
        stream = TextStream(model, [])
        assert [stream.push([token_id]).text for token_id in ids] == ["", ""]
        assert stream.finish() == "\ufffd"


def test_ill_formed_bytes_are_never_held_for_long(models: dict[str, TextModel]) -> None:
    model = models["sentencepiece"]
    continuation = model._tokenizer.token_to_id("<0x80>")
    stream = TextStream(model, [])
    assert all(stream.push([continuation]).text == "\ufffd" for _ in range(100))


@pytest.mark.parametrize("kind", KINDS[:3])
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_stop_strings_by_definition(models: dict[str, TextModel], kind: str, data: st.DataObject) -> None:
    """Whatever the cutting: the text before the first match to end, no character of the match, the tokens it took."""
    model = models[kind]
    alphabet = [i for text in ("aab", "ba a", "你", "🙂") for i in model.encode(text, add_special_tokens=False)]
    prompt, output = (
        data.draw(st.lists(st.sampled_from(alphabet), max_size=3)),
        data.draw(st.lists(st.sampled_from(alphabet), max_size=14)),
    )
    stops = data.draw(st.lists(st.text("ab 你🙂\ufffd", min_size=1, max_size=4), min_size=1, max_size=5))
    whole = stream_text(TextStream(model, prompt), [output])
    ends = [(whole.index(stop) + len(stop), -len(stop), stop) for stop in stops if stop in whole]
    expected = min(ends) if ends else None

    stream, text, used = TextStream(model, prompt, stops), "", 0
    for chunk in cut(output, data.draw(st.integers(0, 999))):
        update = stream.push(chunk)
        text += update.text
        used += update.num_tokens_used
        if update.stop_string is not None:
            break
        assert update.num_tokens_used == len(chunk)
    text += stream.finish()
    if expected is None:
        assert (text, stream.stop_string, used) == (whole, None, len(output))
        return
    end, minus_length, stop = expected
    assert (text, stream.stop_string) == (whole[: end + minus_length], stop)
    detokenizer = model.detokenizer(prompt, True)
    lengths = [0]
    for token_id in output:
        lengths.append(lengths[-1] + len(detokenizer.feed([token_id])))
    needed = next((n for n, length in enumerate(lengths) if length >= end), len(output))
    assert used == needed


def test_stop_string_inside_one_token_and_over_the_prompts_border(models: dict[str, TextModel]) -> None:
    model = models["byte_level"]
    hello = model.encode("hello")
    stream = TextStream(model, model.encode("he"), ["el"])
    update = stream.push(hello + hello)
    assert (update.text, update.stop_string) == ("h", "el")
    assert stream.push(hello).num_tokens_used == 0
    assert stream.finish() == ""
    border = TextStream(model, model.encode("STO"), ["STOP"])
    assert border.push(model.encode("P")).text + border.finish() == "P"
