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


def main() -> None:
    try:
        load()
    except BuildError as error:
        print(f"no boards: {error}")


if __name__ == "__main__":
    main()
