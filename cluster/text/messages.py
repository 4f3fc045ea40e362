"""What a chat message must look like before a template sees it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from moestro.protos.errors import FieldViolation, InvalidRequest

# a role is written into the prompt between control tokens, so it must not be able to spell one
_ROLE = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


def check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    """InvalidRequest with every violated field: ``messages``, ``messages[i].role``, ``messages[i].content``."""
    if not messages:
        raise InvalidRequest([FieldViolation("messages", "must hold at least 1 message, holds 0")])
    violations = []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not _ROLE.match(role):
            description = f"must be 1 to 64 letters, digits, '_' or '-', is {str(role)[:80]!r}"
            violations.append(FieldViolation(f"messages[{index}].role", description))
        if not isinstance(content, str):
            description = f"must be text, is {type(content).__name__}"
            violations.append(FieldViolation(f"messages[{index}].content", description))
    if violations:
        raise InvalidRequest(violations)
