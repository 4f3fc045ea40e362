"""The configuration: one file, validated once, printed so that it reads back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel

from moestro.cluster.cli.config import to_toml
from moestro.cluster.config import Config, load_config
from moestro.protos.errors import ConfigError

OTHER = {
    "model": {"path": '/some "where"/über', "name": "a\\b", "dtype": "bfloat16"},
    "cluster": {"dp": 4, "tp": 2, "groups": 3, "gateways": 2, "ray_address": "auto", "start_timeout_s": 12.5},
    "rank": {"device": "cpu", "threads": 3, "num_cpus": 0.5, "kv_memory": "1.5GiB"},
    "scheduler": {"block_size": 32, "max_context": 2048},
    "server": {"host": "::", "port": 0, "max_message_bytes": "1MB", "drain_s": 0.0},
}


def write(folder: Path, text: str) -> Path:
    file = folder / "serve.toml"
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize("overrides", [{}, OTHER], ids=["defaults", "other"])
def test_what_is_printed_reads_back_equal(overrides: dict[str, dict[str, object]], tmp_path: Path) -> None:
    config = load_config(None, overrides)
    assert load_config(write(tmp_path, "\n".join(to_toml(config))), {}) == config


def test_every_field_says_what_it_means_and_is_printed() -> None:
    text = "\n".join(to_toml(Config()))
    for name, section in Config.model_fields.items():
        assert isinstance(section.annotation, type)
        assert issubclass(section.annotation, BaseModel)
        assert f"[{name}]" in text
        for key, field in section.annotation.model_fields.items():
            assert field.description, f"{name}.{key}"
            assert field.description.endswith("."), f"{name}.{key}"
            assert f"\n{key} = " in text


def test_sizes_and_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, '[rank]\nkv_memory = "2GiB"\n[cluster]\ndp = 4\ntp = 2\n')
    config = load_config(file, {"cluster": {"dp": 8, "tp": None}})
    assert (config.rank.kv_memory, config.cluster.dp, config.cluster.tp) == (2 * 2**30, 8, 2)
    assert load_config(None, {"model": {"path": "a/b"}}).model.served_name == "b"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[cluster]\ndp = 0", r"cluster\.dp: .*greater than or equal to 1 \(got 0\)"),
        ("[cluster]\ndp = 'two'", r"cluster\.dp: .*valid integer.* \(got 'two'\)"),
        ("[server]\nport = 65536", r"server\.port: .*less than or equal to 65535 \(got 65536\)"),
        ("[rank]\ndevice = 'tpu'", r"rank\.device: .*'auto', 'cpu' or 'cuda' \(got 'tpu'\)"),
        ("[rank]\nkv_memory = '12 parsecs'", r"rank\.kv_memory: .*'12 parsecs' is not a size"),
        ("[rank]\nkv_memory = 5", r"rank\.kv_memory: .*greater than or equal to 1048576 \(got 5\)"),
        ("[cluster]\nranks = 4", r"cluster\.ranks: .* \(got 4\)"),
        ("[cloud]\nname = 'x'", r"cloud: "),
        ("cluster = 5", r"cluster: .* \(got 5\)"),
        ("[server]\ndrain_s = nan", r"server\.drain_s: .* \(got nan\)"),
        ("[cluster]\nstart_timeout_s = inf", r"cluster\.start_timeout_s: .* \(got inf\)"),
    ],
)
def test_errors_name_file_key_bound_and_value(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"serve\.toml: {reason}"):
        load_config(write(tmp_path, text), {})


def test_every_error_is_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"command line: cluster\.dp: .*; server\.port: "):
        load_config(None, {"cluster": {"dp": 0}, "server": {"port": -1}})
