"""The extension module of this folder: boards.

    python -m moestro.router.native.build      # ahead of the first start, which would wait for it; says why it cannot

Imported only where it is used, so that nothing compiles on import.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import ModuleType

from moestro.kernels.native_module import BuildError, NativeModule

MODULE = NativeModule("moestro_board", Path(__file__).resolve().parent)


@cache
def load() -> ModuleType:
    """Raises ``BuildError``."""
    return MODULE.load()


def prepare() -> str:
    """Compiles the module where that has not been done; why it cannot be, in words, or nothing."""
    try:
        load()
    except BuildError as error:
        return str(error)
    return ""


def main() -> None:
    if reason := prepare():
        print(f"no boards: {reason}")


if __name__ == "__main__":
    main()
