from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def _load_zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tokenizers_zoo", Path(__file__).with_name("tokenizers_zoo.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["tokenizers_zoo"] = module
    spec.loader.exec_module(module)
    return module


zoo = _load_zoo()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    return {kind: zoo.write(root / kind, kind) for kind in zoo.KINDS}
