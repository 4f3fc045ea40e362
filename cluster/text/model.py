"""A checkpoint's tokenizer, chat template and generation defaults: everything between text and token ids.

Read from tokenizer.json with ``tokenizers`` alone; no code from a checkpoint is run and transformers is not imported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from moestro.cluster.text.chat_template import ChatTemplate
from moestro.cluster.text.detokenizer import Detokenizer, PieceDetokenizer, WindowDetokenizer
from moestro.cluster.text.files import read_json_object, read_text
from moestro.cluster.text.generation import GenerationDefaults, generation_defaults
from moestro.cluster.text.messages import check_messages
from moestro.cluster.text.pieces import PieceTable, piece_rule
from moestro.protos.errors import CheckpointError, FieldViolation, InvalidRequest

MAX_TOKENIZER_BYTES = 256 * 2**20
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextModel:
    """The text side of one checkpoint. Immutable; safe to share between threads and streams."""

    name: str
    special_ids: frozenset[int]
    generation: GenerationDefaults
    _tokenizer: Tokenizer
    _tokens: tuple[str | None, ...]  # by id
    _table: PieceTable | None
    _template: ChatTemplate | None
    _template_variables: Mapping[str, str]

    @classmethod
    def load(cls, folder: Path) -> TextModel:
        """Read the text side of the checkpoint in ``folder``.

        Raises CheckpointError, naming the file, when tokenizer.json is missing, unreadable or too large, when another
        file is invalid, when the chat template is no valid Jinja, or when the tokenizer needs code of its own.
        """
        config_path = folder / "tokenizer_config.json"
        config = read_json_object(config_path) or {}
        if "AutoTokenizer" in (config.get("auto_map") or ()):
            raise CheckpointError(f"{config_path}: auto_map asks for tokenizer code of its own, which is never run")
        tokenizer, decoder = _load_tokenizer(folder / "tokenizer.json")
        named = _named_tokens(config_path, {**(read_json_object(folder / "special_tokens_map.json") or {}), **config})
        _declare_special(tokenizer, config_path, config, named)
        tokens = _tokens_by_id(tokenizer)
        rule = piece_rule(decoder)
        generation_path, model_path = folder / "generation_config.json", folder / "config.json"
        eos_token = named.get("eos_token")
        return cls(
            name=folder.resolve().name,
            special_ids=_special_ids(tokenizer, tokens),
            generation=generation_defaults(
                generation_path,
                read_json_object(generation_path) or {},
                model_path,
                read_json_object(model_path) or {},
                None if eos_token is None else tokenizer.token_to_id(eos_token),
            ),
            _tokenizer=tokenizer,
            _tokens=tokens,
            _table=None if rule is None else PieceTable.build(rule, tokens),
            _template=_load_template(folder / "chat_template.jinja", config_path, config),
            _template_variables=named,
        )

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id the tokenizer knows, added tokens included."""
        return len(self._tokens)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Text that spells a special token becomes that token, as in transformers."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what tokenizers says of a str that has no UTF-8
            if not isinstance(text, str):
                raise
            raise InvalidRequest([FieldViolation("text", "not valid Unicode: a lone surrogate")]) from error

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids`` from the beginning of a text; unknown ids are skipped.

        Equal to tokenizers' decode, except for runs of byte tokens that are ill-formed UTF-8 (see ``detokenizer``).
        """
        if self._table is None:
            known = [i for i in ids if 0 <= i < len(self._tokens)]
            return self._tokenizer.decode(known, skip_special_tokens=skip_special_tokens)
        detokenizer = self.detokenizer((), skip_special_tokens)
        return detokenizer.feed(ids) + detokenizer.flush()

    def token_text(self, token_id: int) -> str:
        """One token for display: its text inside a text, bytes of unfinished characters as ``\\xNN``; unknown: ''."""
        token = self._tokens[token_id] if 0 <= token_id < len(self._tokens) else None
        if token is None:
            return ""
        return token if self._table is None else self._table.pieces[token_id].decode("utf-8", "backslashreplace")

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool) -> Detokenizer:
        """A detokenizer for what follows ``prompt_ids``."""
        skipped = self.special_ids if skip_special_tokens else frozenset[int]()
        detokenizer: PieceDetokenizer | WindowDetokenizer
        if self._table is not None:
            detokenizer = PieceDetokenizer(self._table, skipped)
        else:
            holes = {token_id for token_id, token in enumerate(self._tokens) if token is None}
            detokenizer = WindowDetokenizer(self._tokenizer, skipped | holes)
        detokenizer.prime(prompt_ids)
        return detokenizer

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The prompt the chat template makes of ``messages``, ready for the assistant's next one.

        InvalidRequest names the message and field, or ``messages`` when the template itself refuses.
        """
        if self._template is None:
            raise InvalidRequest([FieldViolation("messages", f"model {self.name!r} has no chat template")])
        check_messages(messages)
        return self._template.render(messages, self._template_variables)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the rendered chat. The template writes its own bos, so none is added (as in transformers)."""
        return self.encode(self.render_chat(messages), add_special_tokens=False)


def _load_tokenizer(path: Path) -> tuple[Tokenizer, dict[str, Any] | None]:
    text = read_text(path, MAX_TOKENIZER_BYTES)
    if text is None:
        raise CheckpointError(f"{path}: missing; a checkpoint is served with its fast tokenizer only")
    try:
        tokenizer = Tokenizer.from_str(text)
    except BaseException as error:  # a panic of the Rust library derives from BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise CheckpointError(f"{path}: not a tokenizer: {str(error)[:300]}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer, json.loads(text).get("decoder")


def _named_tokens(path: Path, config: Mapping[str, Any]) -> dict[str, str]:
    named = {}
    for key in _NAMED_TOKENS:
        value = config.get(key)
        content = value.get("content") if isinstance(value, dict) else value
        if content is None:
            continue
        if not isinstance(content, str):
            raise CheckpointError(f"{path}: {key} must be a string or an object with content, is {str(value)[:100]}")
        named[key] = content
    return named


def _declare_special(tokenizer: Tokenizer, path: Path, config: Mapping[str, Any], named: Mapping[str, str]) -> None:
    """Mark as special what only tokenizer_config.json calls special. No id is ever added."""
    declared = config.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict):
        raise CheckpointError(f"{path}: added_tokens_decoder must be an object, is {type(declared).__name__}")
    special = [entry for entry in declared.values() if isinstance(entry, dict) and entry.get("special") is True]
    contents = {
        **{str(entry.get("content")): entry for entry in special},
        **{content: {} for content in named.values()},
    }
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for content, entry in contents.items():
        if content in known or tokenizer.token_to_id(content) is None:
            continue
        options = {key: bool(entry[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in entry}
        tokenizer.add_special_tokens([AddedToken(content, special=True, **options)])


def _tokens_by_id(tokenizer: Tokenizer) -> tuple[str | None, ...]:
    vocabulary = {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=False).items()}
    vocabulary.update({i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()})
    return tuple(vocabulary.get(token_id) for token_id in range(max(vocabulary, default=-1) + 1))


def _special_ids(tokenizer: Tokenizer, tokens: tuple[str | None, ...]) -> frozenset[int]:
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return frozenset(token_id for token_id, token in enumerate(tokens) if token in special)


def _load_template(path: Path, config_path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else the tokenizer_config's one (a string, or a list of named ones with a "default")."""
    source = read_text(path)
    if source is not None:
        return ChatTemplate(source, str(path))
    value = config.get("chat_template")
    if isinstance(value, list):
        entries = [entry for entry in value if isinstance(entry, dict)]
        value = {entry.get("name"): entry.get("template") for entry in entries}.get("default")
        if value is None:
            raise CheckpointError(f"{config_path}: chat_template lists named templates, none of them named 'default'")
    if value is None:
        return None
    if not isinstance(value, str):
        raise CheckpointError(f"{config_path}: chat_template must be a string or a list, is {type(value).__name__}")
    return ChatTemplate(value, str(config_path))
