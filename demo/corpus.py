"""The demo's text: the Python standard library of the running interpreter, split by file.

Legend: N tokens of a split, D documents of a split.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from moestro.demo.tokenizer import EOS

# Machine-made tables, a grammar's pickles and deliberately broken sources: they teach a small model nothing.
SKIPPED_PARTS = frozenset(
    {"site-packages", "lib2to3", "idlelib", "encodings", "cjkencodings", "__pycache__", "ensurepip", "data"}
)
MAX_FILE_BYTES = 400_000
HELD_OUT_PERCENT = 5


@dataclass(frozen=True)
class Document:
    """One source file: its path relative to the standard library, and its text."""

    path: str
    text: str


@dataclass(frozen=True)
class Split:
    """Token ids of all documents of one split, each ended by the end-of-text token."""

    tokens_N: npt.NDArray[np.uint16]
    starts_D: npt.NDArray[np.int64]
    text_bytes: int


def is_held_out(path: str) -> bool:
    """Whether a file belongs to the held-out split: decided by its path alone, so it never moves."""
    digest = hashlib.sha256(path.encode()).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def documents() -> Iterator[Document]:
    """All usable source files in sorted order. Identical copies of a text appear once."""
    root = Path(sysconfig.get_paths()["stdlib"])
    seen: set[bytes] = set()
    for file in sorted(root.rglob("*.py")):
        relative = file.relative_to(root)
        if SKIPPED_PARTS.intersection(relative.parts) or not 64 <= file.stat().st_size <= MAX_FILE_BYTES:
            continue
        raw = file.read_bytes()
        digest = hashlib.sha256(raw).digest()
        if digest in seen:
            continue
        seen.add(digest)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            continue
        yield Document(relative.as_posix(), text.replace("\r\n", "\n"))


def tokenize(tokenizer: Tokenizer, docs: list[Document]) -> Split:
    """Encode documents one after another, each followed by the end-of-text token."""
    eos_id = tokenizer.token_to_id(EOS)
    if eos_id is None:
        raise ValueError(f"the tokenizer has no {EOS} token")
    ids: list[int] = []
    starts: list[int] = []
    for encoding in tokenizer.encode_batch_fast([doc.text for doc in docs], add_special_tokens=False):
        starts.append(len(ids))
        ids.extend(encoding.ids)
        ids.append(eos_id)
    text_bytes = sum(len(doc.text.encode()) for doc in docs)
    return Split(np.asarray(ids, dtype=np.uint16), np.asarray(starts, dtype=np.int64), text_bytes)
