"""The hardware record: complete, plain JSON, anonymous, and free of torch."""

from __future__ import annotations

import getpass
import json
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.hardware import hardware_record

from moestro.cluster.bench.hardware import git_state

ROOT = Path(__file__).resolve().parents[2]


def test_record_is_json_and_complete():
    record = json.loads(json.dumps(hardware_record()))
    assert record["python"] == platform.python_version()
    assert record["cores"]["usable"] >= 1
    assert record["memory_bytes"] > 2**28
    assert {"cpu", "gpus", "packages", "commit", "dirty", "date"} <= record.keys()
    assert record["packages"]["numpy"]


def test_record_names_no_machine():
    text = json.dumps(hardware_record())
    assert str(ROOT) not in text
    assert platform.node() not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
    assert f'"{getpass.getuser()}"' not in text


def test_import_needs_no_torch():
    code = "import sys; sys.modules.update(torch=None, grpc=None); import benchmarks.hardware as h; h.hardware_record()"
    subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=ROOT, env={"PYTHONPATH": "src:.", "PATH": "/usr/bin:/bin"}
    )


def test_git_state_follows_the_file(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        return subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout

    tracked, loose = tmp_path / "tracked.py", tmp_path / "loose.py"
    tracked.write_text("1\n")
    git("init", "-q")
    git("add", "tracked.py")
    git("commit", "-qm", "one")
    assert git_state(tracked) == (git("rev-parse", "HEAD").strip(), False)
    loose.write_text("result of a run\n")
    assert git_state(tracked)[1] is False, "an untracked result file must not mark the code as changed"
    assert git_state(loose) == (None, None)
    tracked.write_text("2\n")
    assert git_state(tracked)[1] is True
