"""Where the bundled checkpoints are."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "model"
DRAFT_DIR = _HERE / "draft"
