from __future__ import annotations

import os
import subprocess
import sys
from functools import reduce
from operator import xor
from pathlib import Path

import pytest
import torch
from tests.kernels.cpu import needs_cpu_kernels

from moestro.kernels.choose import choose_backend
from moestro.kernels.cpu import build
from moestro.kernels.cpu.backend import CpuBackend
from moestro.kernels.native_module import BuildError
from moestro.kernels.plain import PlainBackend

CPU = torch.device("cpu")


@needs_cpu_kernels
def test_one_openmp_runtime_and_the_threads_of_torch():
    build.load()
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line or "libiomp" in line}) == 1
    assert "libomp" not in maps


@needs_cpu_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_the_checksum_of_a_read_sees_every_word(threads):
    words = torch.randint(-(2**62), 2**62, (1003 * 8,), generator=torch.Generator().manual_seed(3))
    torch.set_num_threads(threads)
    got = build.load().read_bandwidth(words)
    torch.set_num_threads(1)
    assert got == reduce(xor, words.tolist()) % 2**64


def test_importing_the_backends_loads_nothing():
    code = "import sys; import moestro.kernels.choose; print(any('moestro_cpu' in name for name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.stdout.strip() == "False", done.stderr


@needs_cpu_kernels
def test_two_processes_build_once(tmp_path):
    """With a compiler that notes each call and writes what it is told to, instead of seconds of compiling twice."""
    log, compiler = tmp_path / "log", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {log}\nsleep 0.05\nfor last; do :; done\necho built > "$last"\n')
    compiler.chmod(0o755)
    environment = _environment(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path / "cache"))
    code = "from moestro.kernels.cpu import build; print(build.MODULE.built())"
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    paths = {process.communicate()[0].strip() for process in processes}
    assert len(paths) == 1
    assert Path(paths.pop()).read_text() == "built\n"
    assert sum("-shared" in line for line in log.read_text().splitlines()) == 1
    left = {path.suffix for path in (tmp_path / "cache" / "moestro").iterdir()}
    assert left == {".so", ".lock"}


@needs_cpu_kernels
def test_the_words_of_the_compiler_are_reported(tmp_path, monkeypatch):
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho "no more disk" >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(BuildError, match="no more disk"):
        build.MODULE.built()
    build.load.cache_clear()
    chosen = choose_backend(CPU, torch.bfloat16)
    assert isinstance(chosen.backend, PlainBackend)
    assert "no more disk" in chosen.reason
    with pytest.raises(ValueError, match="no more disk"):
        choose_backend(CPU, torch.bfloat16, "cpu")


def test_what_is_asked_for_and_impossible_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="bfloat16, not in float32"):
        choose_backend(CPU, torch.float32, "cpu")
    with pytest.raises(ValueError, match="not on meta"):
        choose_backend(torch.device("meta"), torch.bfloat16, "cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    reason = build.unavailable_reason()
    assert reason is not None
    assert choose_backend(CPU, torch.bfloat16).reason == f"not cpu: {reason}"
    assert isinstance(choose_backend(CPU, torch.float32).backend, PlainBackend)


@needs_cpu_kernels
def test_auto_takes_the_cpu_backend_for_bf16():
    assert isinstance(choose_backend(CPU, torch.bfloat16).backend, CpuBackend)
    assert isinstance(choose_backend(CPU, torch.bfloat16, "plain").backend, PlainBackend)


def _environment(**more: str) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2]
    return {**os.environ, "PYTHONPATH": f"{root / 'src'}:{root}", **more}
