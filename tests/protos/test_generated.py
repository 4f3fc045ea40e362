"""The committed stubs are what the protos say, and the protos keep to the rules that can be checked without buf."""

from __future__ import annotations

from pathlib import Path

from moestro.protos import generate
from moestro.protos.gen import inference_pb2

ROOT = Path(generate.__file__).resolve().parent


def test_committed_stubs_are_current(tmp_path: Path) -> None:
    generate.generate(tmp_path)
    fresh = {path.name: path.read_text() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text() for path in (ROOT / "gen").glob("*_pb2*")}
    assert sorted(fresh) == sorted(committed)
    stale = [name for name, text in fresh.items() if committed[name] != text]
    assert not stale, f"run python protos/generate.py; stale: {stale}"


def test_every_proto_is_generated() -> None:
    protos = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto")}
    assert protos == set(generate.PROTOS)


def test_generate_and_chat_answers_are_the_same_on_the_wire() -> None:
    """The edge serialises both alike."""
    shapes = [
        [(field.number, field.name, field.message_type.full_name) for field in message.DESCRIPTOR.fields]
        for message in (inference_pb2.GenerateResponse, inference_pb2.ChatResponse)
    ]
    assert shapes[0] == shapes[1] == [(1, "event", "moestro.v1.StreamEvent")]


def test_chat_and_generate_requests_offer_the_same_options() -> None:
    prompt = {"text", "token_ids", "messages"}
    kinds = (inference_pb2.GenerateRequest, inference_pb2.ChatRequest)
    generate_fields, chat_fields = (
        {field.name: field.type for field in kind.DESCRIPTOR.fields if field.name not in prompt} for kind in kinds
    )
    assert generate_fields == chat_fields
