"""``moestro config``: every setting, its meaning and its value, as a TOML file that ``serve --config`` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap
from typing import Annotated

import typer

from moestro.cluster.config import Config, load_config


def config(
    file: Annotated[
        Path | None, typer.Option("--config", help="Show this file's values instead of the defaults.")
    ] = None,
) -> None:
    """Prints the whole configuration as TOML, each field with its meaning."""
    typer.echo("\n".join(to_toml(load_config(file, {}))))


def to_toml(config: Config) -> Iterator[str]:
    """The lines of a TOML file that reads back as ``config``."""
    for name in type(config).model_fields:
        section = getattr(config, name)
        yield f"[{name}]"
        for key, field in type(section).model_fields.items():
            yield from (f"# {line}" for line in wrap(field.description or "", 100))
            value = getattr(section, key)
            yield f"{key} = {json.dumps(str(value) if isinstance(value, Path) else value)}"
        yield ""
