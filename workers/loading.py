"""From a checkpoint, or from nothing, to a model on a device.

Data is read straight into the tensors that keep it, or through a staging buffer of a few megabytes where dtype, layout
or device differ. Files are read and not mapped, so that resident memory is what the model keeps.
"""

from __future__ import annotations

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moestro.kernels.backend import Backend
from moestro.kernels.choose import choose_backend
from moestro.kernels.plain import PlainBackend
from moestro.protos.errors import CheckpointError
from moestro.router.expert_parallel import ExpertParallel, all_here
from moestro.router.parallel import NoTensorParallel, TensorParallel
from moestro.workers.checkpoint import Checkpoint, open_checkpoint, stamp
from moestro.workers.model.decoder import Decoder, build_decoder, build_share
from moestro.workers.model.weights import WeightSource
from moestro.workers.model_config import ModelConfig
from moestro.workers.safetensors_header import TensorInfo

_STAGING_BYTES = 4 << 20
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True)
class Progress:
    """How far loading is: pieces of tensors, and bytes as kept in memory."""

    tensors_done: int
    tensors_total: int
    bytes_done: int
    bytes_total: int


OnProgress = Callable[[Progress], None]


def load_model(
    checkpoint: Checkpoint | str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
    tp: TensorParallel | None = None,
    experts: ExpertParallel | None = None,
    on_progress: OnProgress | None = None,
) -> Decoder:
    """This rank's share of a checkpoint.

    ``dtype`` None means the checkpoint's own, ``backend`` None the fastest for dtype and device. Without ``tp`` and
    ``experts`` the rank holds the whole model. Raises CheckpointError for a checkpoint that cannot be served and
    ConfigError when ``tp`` does not fit the model; both before any weight is read, but for files that change under our
    hands.
    """
    if not isinstance(checkpoint, Checkpoint):
        checkpoint = open_checkpoint(checkpoint)
    config = checkpoint.config
    experts = all_here(config.num_experts, config.num_moe_layers) if experts is None else experts
    held = [placement.slots[experts.rank] for placement in experts.placements]
    share = load_share(checkpoint, held, dtype=dtype, device=device, backend=backend, tp=tp, on_progress=on_progress)
    return share.over(experts)


def load_share(
    checkpoint: Checkpoint,
    held: Sequence[Sequence[int]],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
    tp: TensorParallel | None = None,
    on_progress: OnProgress | None = None,
) -> Decoder:
    """What ``load_model`` reads, for no group in particular: of the experts those ``held``, by mixture layer and slot.
    ``Decoder.over`` or ``regroup`` make it a model that computes; ``tp`` may be a seat whose set is yet to form."""
    config = checkpoint.config
    tp = NoTensorParallel() if tp is None else tp
    dtype, device = dtype or config.dtype, torch.device(device)
    backend = backend or choose_backend(device, dtype).backend
    need = measure(config, dtype, tp, held)
    with ExitStack() as stack:
        source = CheckpointSource(checkpoint, dtype, device, backend, stack, need, on_progress)
        return build_share(config, source, tp, held)


def random_model(
    config: ModelConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    backend: Backend | None = None,
    tp: TensorParallel | None = None,
    experts: ExpertParallel | None = None,
    seed: int = 0,
    std: float = 0.02,
) -> Decoder:
    """A model of random weights, drawn on the device: normal with ``std``, norms 1, biases 0. For measurements: what a
    rank draws depends on how the model is split."""
    dtype, device = dtype or config.dtype, torch.device(device)
    backend = backend or choose_backend(device, dtype).backend
    source = RandomSource(dtype, device, backend, seed, std)
    experts = all_here(config.num_experts, config.num_moe_layers) if experts is None else experts
    return build_decoder(config, source, NoTensorParallel() if tp is None else tp, experts)


@dataclass(slots=True)
class Need:
    """What a rank will read: a weight source that only counts, on the meta device."""

    dtype: torch.dtype
    device: torch.device = field(default_factory=lambda: torch.device("meta"))
    backend: Backend = field(default_factory=PlainBackend)
    num_tensors: int = 0
    num_bytes: int = 0

    def read_(self, out: Tensor, name: str, row: int = 0, column: int = 0) -> None:
        self.num_tensors += 1
        self.num_bytes += out.nbytes


def measure(config: ModelConfig, dtype: torch.dtype, tp: TensorParallel, held: Sequence[Sequence[int]]) -> Need:
    """Tensors and bytes that one rank keeps which holds these experts, by mixture layer. Raises ConfigError when ``tp``
    does not fit the model."""
    need = Need(dtype)
    build_share(config, need, tp, held)
    return need


@contextmanager
def open_source(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> Iterator[WeightSource]:
    """The weights of a checkpoint that was opened and checked before, once more; files are closed with the block.
    Whoever takes experts from it repacks them, so the source needs none but the plain backend."""
    with ExitStack() as stack:
        yield CheckpointSource(checkpoint, dtype, device, PlainBackend(), stack, Need(dtype), None)


@dataclass(frozen=True, slots=True)
class RandomSource:
    """Weights from a seed and their name and place."""

    dtype: torch.dtype
    device: torch.device
    backend: Backend
    seed: int
    std: float

    def read_(self, out: Tensor, name: str, row: int = 0, column: int = 0) -> None:
        if name.endswith("norm.weight"):
            out.fill_(1.0)
        elif name.endswith(".bias"):
            out.zero_()
        else:
            generator = torch.Generator(self.device)
            generator.manual_seed(zlib.crc32(f"{self.seed} {name} {row} {column}".encode()))
            out.normal_(0.0, self.std, generator=generator)


class CheckpointSource:
    """Weights from the files of a checkpoint."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        backend: Backend,
        stack: ExitStack,
        need: Need,
        on_progress: OnProgress | None,
    ) -> None:
        """Files are opened once each and closed with ``stack``."""
        self.dtype, self.device, self.backend = dtype, device, backend
        self._pieces, self._stamps = checkpoint.pieces, checkpoint.stamps
        self._stack = stack
        self._files: dict[Path, BinaryIO] = {}
        self._need, self._on_progress = need, on_progress
        self._tensors_done = self._bytes_done = 0

    def read_(self, out: Tensor, name: str, row: int = 0, column: int = 0) -> None:
        piece = self._pieces[name]
        width = math.prod(piece.shape[1:])
        out_RC = out if out.dim() == 2 else out.unsqueeze(1)
        self._read_rows(out_RC, piece.info, width, piece.row + row, column)
        self._tensors_done += 1
        self._bytes_done += out.nbytes
        if self._on_progress is not None:
            self._on_progress(
                Progress(self._tensors_done, self._need.num_tensors, self._bytes_done, self._need.num_bytes)
            )

    def _read_rows(self, out_RC: Tensor, info: TensorInfo, width: int, row: int, column: int) -> None:
        dtype = _DTYPES[info.dtype]
        num_rows, num_columns = out_RC.shape
        row_bytes = width * dtype.itemsize
        offset = info.offset + row * row_bytes
        if num_columns == width and out_RC.dtype == dtype and out_RC.device.type == "cpu" and out_RC.is_contiguous():
            self._read_bytes(out_RC, info, offset)
            return
        chunk = max(1, _STAGING_BYTES // row_bytes)
        staging_RW = torch.empty(min(chunk, num_rows), width, dtype=dtype)
        for start in range(0, num_rows, chunk):
            rows_RW = staging_RW[: min(chunk, num_rows - start)]
            self._read_bytes(rows_RW, info, offset + start * row_bytes)
            out_RC[start : start + len(rows_RW)].copy_(rows_RW[:, column : column + num_columns])

    def _read_bytes(self, out: Tensor, info: TensorInfo, offset: int) -> None:
        """Fills contiguous memory from the file."""
        buffer: Any = out.view(-1).view(torch.uint8).numpy()
        left = memoryview(buffer)
        file = self._open(info.file)
        while left:
            try:
                num_read = os.preadv(file.fileno(), [left], offset)
            except OSError as error:
                raise CheckpointError(f"{info.file.name}: cannot be read: {error.strerror}") from None
            if num_read == 0:
                raise CheckpointError(f"{info.file.name}: the file is truncated, {len(left)} bytes are missing")
            left, offset = left[num_read:], offset + num_read

    def _open(self, path: Path) -> BinaryIO:
        if path not in self._files:
            try:
                file = self._stack.enter_context(path.open("rb"))
                now = stamp(os.fstat(file.fileno()))
            except OSError as error:
                raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from None
            if now != self._stamps[path]:
                raise CheckpointError(f"{path.name}: the file is another than when it was checked")
            self._files[path] = file
        return self._files[path]
