"""Chat templates: Jinja from a checkpoint, rendered as transformers does, under bounds.

The environment matches transformers' (immutable sandbox, trim_blocks, lstrip_blocks, loop controls, ``tojson`` without
HTML escapes, ``raise_exception``, ``strftime_now``, ``{% generation %}``). What a hostile template may use up is
bounded by ``sandbox``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from moestro.cluster.text.sandbox import BoundedEnvironment, RenderBounds, TemplateBoundExceeded
from moestro.protos.errors import CheckpointError, FieldViolation, InvalidRequest

MAX_TEMPLATE_CHARS = 1 << 20


class ChatTemplate:
    """A compiled chat template. ``source_name`` is the file it came from, for the operator."""

    def __init__(self, source: str, source_name: str, bounds: RenderBounds | None = None) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"{source_name}: the chat template has {len(source)} characters, more than {MAX_TEMPLATE_CHARS}"
            )
        self._environment = _environment(bounds or RenderBounds())
        try:
            self._template = self._environment.from_string(source)
        except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{source_name}: the chat template is not valid Jinja: {_reason(error)}") from error

    def render(self, messages: Sequence[Mapping[str, str]], variables: Mapping[str, str]) -> str:
        """The prompt for the assistant's next message. InvalidRequest names what the template does not accept."""
        try:
            with self._environment.bounded() as budget:
                parts = []
                for part in self._template.generate(
                    messages=[dict(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=True,
                    **variables,
                ):
                    budget.spend_output(len(part))
                    parts.append(part)
                return "".join(parts)
        except _RaisedByTemplate as error:
            raise _refusal(f"refused by the chat template: {error}") from error
        except TemplateBoundExceeded as error:
            raise _refusal(f"the chat template exceeded a bound: {error}") from error
        except RecursionError as error:
            raise _refusal("the chat template exceeded a bound: it recurses too deeply") from error
        except Exception as error:  # whatever template code can raise must not end the request in INTERNAL
            raise _refusal(f"the chat template cannot render these messages: {_reason(error)}") from error


class _RaisedByTemplate(TemplateError):
    """The template itself called raise_exception."""


class _GenerationTag(Extension):
    """``{% generation %}`` marks assistant text for training; for serving it is only its body."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment(bounds: RenderBounds) -> BoundedEnvironment:
    environment = BoundedEnvironment(bounds, extensions=("jinja2.ext.loopcontrols", _GenerationTag))
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if indent is not None and not (isinstance(indent, int) and indent <= 64):
        raise TemplateBoundExceeded(f"an indent of {str(indent)[:32]}, at most 64")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: object) -> None:
    raise _RaisedByTemplate(str(message)[:1000])


def _strftime_now(format: str) -> str:
    if len(format) > 1000:
        raise TemplateBoundExceeded(f"a time format of {len(format)} characters, at most 1000")
    return datetime.now().strftime(format)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error)[:300]}"


def _refusal(description: str) -> InvalidRequest:
    return InvalidRequest([FieldViolation("messages", description)])
