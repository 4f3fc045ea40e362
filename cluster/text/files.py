"""Reading the small files of a checkpoint folder, with bounds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moestro.protos.errors import CheckpointError

MAX_CONFIG_BYTES = 64 * 2**20  # tokenizer_config.json lists every added token, so it can be large


def read_text(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> str | None:
    """The file's text, or None when there is no such file. CheckpointError when it is too large or unreadable."""
    if not path.exists():
        return None
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise CheckpointError(f"{path}: {size} bytes, more than the {max_bytes} a file of its kind may have")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error


def read_json_object(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any] | None:
    """The file's JSON object, or None when there is no such file. CheckpointError when it holds anything else."""
    text = read_text(path, max_bytes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, holds {type(value).__name__}")
    return value
