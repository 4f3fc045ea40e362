"""Rolling updates and scaling under load: how many requests fail, and how long each change takes.

    python -m benchmarks.rolling --runs 20

One ``moestro serve`` of two groups behind two gateways, and a steady crowd that knows its answers. Every run shrinks
the cluster to one of each, replaces all of it, and grows it again; what is counted is what the crowd sees. Clients are
as users have them: the Python client tries an unavailable server again and resumes a stream that was cut off.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from benchmarks.hardware import hardware_record
from benchmarks.rounds import spread
from benchmarks.steady_load import Asked, SteadyLoad
from rich.console import Console

START_LIMIT_S = 300.0
CHANGE_LIMIT_S = 600.0
VOCAB_SIZE = 4000
CHANGES = {
    "shrink": ("scale", "--groups", "1", "--gateways", "1"),
    "update": ("update",),
    "grow": ("scale", "--groups", "2", "--gateways", "2"),
}


def main(
    runs: Annotated[int, typer.Option(min=1, help="Times that the cluster is shrunk, replaced and grown.")] = 20,
    clients: Annotated[int, typer.Option(min=1, help="Requests open at a time; half of them streams.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=4, help="Length of the longest answer.")] = 100,
    drain_s: Annotated[float, typer.Option(min=0.0, help="What a gateway or group waits for what it runs.")] = 5.0,
    seed: int = 0,
    output: Annotated[Path, typer.Option()] = Path("benchmarks/results/rolling.json"),
) -> None:
    """Exit code 0 only when no request failed and no answer was wrong."""
    console = Console()
    asked = [Asked.of(1000 * seed + number, VOCAB_SIZE, max_tokens) for number in range(16)]
    rows: list[dict[str, float]] = []
    settings = {"runs": runs, "clients": clients, "max_tokens": max_tokens, "drain_s": drain_s, "seed": seed}
    hardware = hardware_record()
    with serving(drain_s) as (address, change):
        for number in range(runs):
            row: dict[str, float] = {}
            with SteadyLoad(address, asked, clients, seed=seed * runs + number) as load:
                for name, command in CHANGES.items():
                    began_s = time.monotonic()
                    change(*command)
                    row[f"{name}_s"] = time.monotonic() - began_s
            tally = load.tally
            row |= {"answered": tally.answered, "wrong": tally.wrong, "failed": len(tally.failures)}
            rows.append(row | {"longest_s": tally.longest_s})
            console.print(f"run {number}: " + ", ".join(f"{key} {value:.4g}" for key, value in rows[-1].items()))
            for failure in tally.failures:
                console.print(f"  {failure}", highlight=False)
            total = {key: sum(row[key] for row in rows) for key in ("answered", "wrong", "failed")}
            record = {"hardware": hardware, "settings": settings, "total": total, "spread": spread(rows), "runs": rows}
            output.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"{total}; written to {output}", highlight=False)
    if total["failed"] or total["wrong"] or not total["answered"]:
        raise typer.Exit(1)


@contextmanager
def serving(drain_s: float) -> Iterator[tuple[str, Callable[..., None]]]:
    """A cluster of two groups and two gateways; its address, and what runs a command against it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    home = Path(tempfile.mkdtemp(prefix="mr"))  # a Ray of its own, which `auto` finds; its sockets need a short path
    config, log = home / "serve.toml", home / "serve.log"
    config.write_text(
        "[cluster]\ngroups = 2\ndp = 1\ngateways = 2\ndashboard_port = 0\n"
        f"[server]\nport = {port}\ndrain_s = {drain_s}\n"
        '[rank]\nthreads = 1\nkv_memory = "64MiB"\n'
    )
    cache = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    env = os.environ | {"HOME": str(home), "RAY_TMPDIR": str(home), "XDG_CACHE_HOME": cache}

    def command(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "moestro.cluster.cli.main", *arguments]

    def change(*arguments: str) -> None:
        ray_address = re.findall(r"--ray-address ([^\s)]+)", log.read_text())[0]
        said = subprocess.run(
            command(*arguments, "--ray-address", ray_address),
            env=env,
            capture_output=True,
            text=True,
            timeout=CHANGE_LIMIT_S,
            check=False,
        )
        if said.returncode:
            raise RuntimeError(f"{' '.join(arguments)}: {said.stderr}")

    with log.open("w") as stderr:
        server = subprocess.Popen(command("serve", "--config", str(config)), env=env, stdout=stderr, stderr=stderr)
        try:
            began_s = time.monotonic()
            while not re.search("^ready", log.read_text(), re.MULTILINE):
                if server.poll() is not None or time.monotonic() - began_s > START_LIMIT_S:
                    raise RuntimeError(f"the cluster did not come up:\n{log.read_text()}")
                time.sleep(0.2)
            yield f"127.0.0.1:{port}", change
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(120)
            shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
