"""Bytes from a client to a message. What protobuf refuses is looked at once more, to name the field that is wrong."""

from __future__ import annotations

from typing import Any, TypeVar

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError, Message

from moestro.protos.errors import FieldViolation, InvalidRequest

M = TypeVar("M", bound=Message)

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def parse(kind: type[M], data: bytes) -> M:
    """Raises InvalidRequest when ``data`` is no message of that kind."""
    try:
        return kind.FromString(data)
    except DecodeError:
        violation = _find_fault(kind.DESCRIPTOR, data, "", 0)
        raise InvalidRequest([violation or FieldViolation("request", "is not a valid message")]) from None


def _find_fault(descriptor: Any, data: bytes, path: str, depth: int) -> FieldViolation | None:
    """Walks the wire format (https://protobuf.dev/programming-guides/encoding) to the first thing that is wrong:
    a string that is not UTF-8, or bytes that are no fields."""
    where = path or "request"
    if depth > 32:
        return FieldViolation(where, "is nested too deeply")
    position = 0
    counts: dict[int, int] = {}
    while position < len(data):
        tag = _varint(data, position)
        if tag is None:
            return FieldViolation(where, f"is cut off or malformed at byte {position}")
        (key, position), start = tag, position
        number, wire_type = key >> 3, key & 7
        field = descriptor.fields_by_number.get(number)
        name = _join(path, field, counts) if field is not None else where
        body, end = _body(data, position, wire_type)
        if number == 0 or end is None:
            return FieldViolation(name, f"is cut off or malformed at byte {start}")
        position = end
        if field is not None and wire_type == _LENGTH:
            fault = _look_into(field, body, name, depth)
            if fault is not None:
                return fault
    return None


def _look_into(field: FieldDescriptor, body: bytes, name: str, depth: int) -> FieldViolation | None:
    if field.type == FieldDescriptor.TYPE_STRING:
        try:
            body.decode()
        except UnicodeDecodeError as error:
            return FieldViolation(name, f"must be UTF-8, is not at byte {error.start}")
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        return _find_fault(field.message_type, body, name, depth + 1)
    return None


def _join(path: str, field: FieldDescriptor, counts: dict[int, int]) -> str:
    name = f"{path}.{field.name}" if path else field.name
    if field.is_repeated:
        index = counts.get(field.number, 0)
        counts[field.number] = index + 1
        return f"{name}[{index}]"
    return name


def _body(data: bytes, position: int, wire_type: int) -> tuple[bytes, int | None]:
    """The bytes of a field's value and where the next field starts; None where that is past the end."""
    if wire_type == _VARINT:
        value = _varint(data, position)
        return b"", None if value is None else value[1]
    if wire_type == _LENGTH:
        length = _varint(data, position)
        if length is None:
            return b"", None
        size, position = length
    elif wire_type in (_FIXED64, _FIXED32):
        size = 8 if wire_type == _FIXED64 else 4
    else:
        return b"", None
    end = position + size
    return data[position:end], end if end <= len(data) else None


def _varint(data: bytes, position: int) -> tuple[int, int] | None:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            return None
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    return None
