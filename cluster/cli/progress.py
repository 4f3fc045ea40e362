"""A progress bar per rank while checkpoints load."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from moestro.cluster.directory import GroupEntry, RankState


class LoadingProgress:
    """Shows how far the ranks of a starting cluster are. On a terminal only; elsewhere it keeps quiet."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._starting = self._progress.add_task("starting Ray", total=None)
        self._tasks: dict[tuple[str, int], TaskID] = {}

    def __enter__(self) -> LoadingProgress:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        self._progress.stop()

    def show(self, groups: tuple[GroupEntry, ...]) -> None:
        """Takes the directory's latest picture."""
        if groups:
            self._progress.update(self._starting, visible=False)
        for group in groups:
            for number, rank in enumerate(group.ranks):
                key = (group.name, number)
                if key not in self._tasks:
                    self._tasks[key] = self._progress.add_task(f"{group.name} rank {number}", total=None)
                done = rank.total_bytes if rank.state is RankState.SERVING else rank.loaded_bytes
                self._progress.update(self._tasks[key], completed=done, total=rank.total_bytes or None)
