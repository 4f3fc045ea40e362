"""What ``moestro serve`` and its sisters say when they cannot: one line on standard error, exit code 1, before
anything is started."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cluster.servers import free_port, run

from moestro.cluster.serving.ports import check_port
from moestro.cluster.serving.reasons import reason_in
from moestro.protos.errors import ConfigError
from moestro.router.placement import spread
from moestro.router.placement_file import Shape, save_placements
from moestro.workers.checkpoint import open_checkpoint

QUICK_S = 20.0  # on a machine where nothing else runs: two or three


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def lie_in_header(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"\xff" * 8 + weights.read_bytes()[8:])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text("{not json")


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (truncate, "model.safetensors"),
        (lie_in_header, "model.safetensors"),
        (break_config, "config.json: is not JSON"),
        (lose_tokenizer, "tokenizer.json: is missing"),
    ],
)
def test_a_corrupt_checkpoint(spoil: Callable[[Path], None], reason: str, checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(checkpoint, folder)
    spoil(folder)
    refused(tmp_path, reason, "serve", folder)


def test_a_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path, "nowhere: no such folder", "serve", tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[cluster]\nranks = 4\n", "serve.toml: cluster.ranks: "),
        (b"[cluster]\ndp = 0\n", "serve.toml: cluster.dp: Input should be greater than or equal to 1 (got 0)"),
        (b"[rank]\nkv_memory = 'lots'\n", "serve.toml: rank.kv_memory: "),
        (b"[cluster\n", "serve.toml: not TOML"),
        (b"\xff\xfe", "serve.toml: not TOML"),
        (None, "serve.toml: cannot be read: No such file or directory"),
    ],
)
def test_a_config_file_that_cannot_be_used(content: bytes | None, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    if content is not None:
        file.write_bytes(content)
    refused(tmp_path, reason, "serve", "--config", file)


def test_a_placement_of_another_group(checkpoint: Path, tmp_path: Path) -> None:
    config = open_checkpoint(checkpoint).config
    shape = Shape(config.architecture, config.num_moe_layers, config.num_experts, 4, -(-config.num_experts // 4))
    save_placements(tmp_path / "old.json", shape, [spread(config.num_experts, 4)] * config.num_moe_layers)
    settings = tmp_path / "serve.toml"
    settings.write_text(f'[experts]\nplacement = "{tmp_path / "old.json"}"\n')
    refused(tmp_path, "old.json: world_size must be 2", "serve", checkpoint, "--config", settings, "--dp", 2)


def test_nothing_listens(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    refused(tmp_path, address.rpartition(":")[2], "generate", "x", "--address", address)
    refused(tmp_path, address.rpartition(":")[2], "status", "--address", address)


def test_a_ray_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    reason = f"cluster.ray_address: no Ray cluster at {address}: Connection refused"
    refused(tmp_path, reason, "serve", checkpoint, "--ray-address", address)


def refused(home: Path, reason: str, *arguments: object) -> None:
    began = time.monotonic()
    answer = run(home, *arguments)
    assert time.monotonic() - began < QUICK_S
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("error: ")
    assert reason in answer.stderr
    assert answer.stderr.count("\n") == 1, answer.stderr


def test_a_port_that_cannot_be_had() -> None:
    with pytest.raises(ConfigError, match=r"server.port: cannot listen on 192.0.2.1 port 50051: Cannot assign"):
        check_port("192.0.2.1", 50051)
    with pytest.raises(ConfigError, match=r"server.port: cannot listen on no.such.host.invalid port 1"):
        check_port("no.such.host.invalid", 1)
    check_port("localhost", 0)


REPORT = """The deployment failed to start 1 times in a row. Error:
\x1b[36mray::ServeReplica:moestro:Group.initialize_and_get_metadata()\x1b[39m (pid=1, ip=127.0.0.1)
  File "/somewhere/group_service.py", line 60, in __init__
    await starting
ray.exceptions.RayTaskError(ConfigError): \x1b[36mray::Rank.start()\x1b[39m (pid=2)
moestro.protos.errors.ConfigError: scheduler: too few blocks; rank.kv_memory is 5 bytes

The above exception was the direct cause of the following exception:
RuntimeError: Traceback (most recent call last):
"""


def test_the_reason_in_a_report() -> None:
    assert reason_in(REPORT) == "scheduler: too few blocks; rank.kv_memory is 5 bytes"
    assert reason_in("a\nValueError: odd\n  b") == "ValueError: odd"
    assert reason_in("no\n\ntraceback here\n\n") == "traceback here"
    assert reason_in("") == "no reason given"


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        ("CheckpointError: no tensor x", "no tensor x"),
        ("TypeError: an oversight", "TypeError: an oversight"),
        ("the others wait for it in epoch 1", "the others wait for it in epoch 1"),
    ],
)
def test_the_reason_of_a_group_that_did_not_come_up(raised: str, reason: str) -> None:
    report = f"Traceback:\n  more\nmoestro.cluster.supervisor.GroupFailed: {raised}\nRayTaskError: above"
    assert reason_in(report) == reason
