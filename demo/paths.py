"""Where the bundled demo model and its draft live, next to this file."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

MODEL_DIR = _HERE / "moestro-demo"
DRAFT_DIR = _HERE / "moestro-demo-draft"
