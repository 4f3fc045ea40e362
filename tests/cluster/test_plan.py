"""How what a cluster is to be may change while it serves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moestro.cluster.config import ClusterConfig, Config, SchedulerSection, ServerConfig, load_config
from moestro.cluster.serving.plan import FIXED, Plan
from moestro.cluster.serving.specs import group_of_actor, group_resources, has_room, has_size
from moestro.protos.errors import ConfigError

PLAN = Plan(Config(cluster=ClusterConfig(groups=2, dp=4), server=ServerConfig(port=6000)), "secret", 0.0)

OTHERS = {
    "model.path": "/somewhere/else",
    "model.name": "another",
    "model.dtype": "float32",
    "cluster.tp": 2,
    "cluster.ray_address": "auto",
    "rank.device": "cpu",
    "rank.kernels": "plain",
    "server.host": "0.0.0.0",
    "server.port": 6001,
}


def test_settings_are_json_without_the_secret_and_give_the_plan_again() -> None:
    text = json.dumps(PLAN.settings())
    assert "secret" not in text
    assert Plan.of(json.loads(text), "secret") == PLAN


def test_scaling_changes_the_numbers_that_are_given_and_restarts_nothing() -> None:
    plan = PLAN.scaled(groups=3, gateways=None)
    assert plan.config.cluster == ClusterConfig(groups=3, dp=4, gateways=1)
    assert plan.config.server == PLAN.config.server
    assert plan.generation == PLAN.generation
    with pytest.raises(ConfigError, match=r"cluster\.gateways.*less than or equal to 64 \(got 65\)"):
        PLAN.scaled(groups=None, gateways=65)


def test_updating_starts_a_new_generation(tmp_path: Path) -> None:
    file = tmp_path / "update.toml"
    file.write_text("[scheduler]\nmax_num_tokens = 512\n[cluster]\ndp = 2\n")
    plan = PLAN.updated(load_config(file, {}, base=PLAN.config))
    assert plan.generation == PLAN.generation + 1
    assert plan.config.scheduler == SchedulerSection(max_num_tokens=512)
    assert plan.config.cluster == ClusterConfig(groups=2, dp=2)
    assert plan.config.server.port == 6000
    assert PLAN.updated(load_config(None, {}, base=PLAN.config)).config == PLAN.config


@pytest.mark.parametrize("name", FIXED)
def test_what_answers_and_clients_depend_on_stays(name: str) -> None:
    section, field = name.split(".")
    config = load_config(None, {section: {field: OTHERS[name]}}, base=PLAN.config)
    with pytest.raises(ConfigError, match=rf"{section}\.{field}: cannot change while the cluster serves"):
        PLAN.updated(config)


def test_a_file_that_is_no_configuration_is_refused_over_a_base_too(tmp_path: Path) -> None:
    file = tmp_path / "update.toml"
    file.write_text("cluster = 3\n")
    with pytest.raises(ConfigError, match="cluster"):
        load_config(file, {}, base=PLAN.config)


def test_there_is_room_when_all_resources_suffice() -> None:
    theirs = Config(cluster=ClusterConfig(dp=2, ray_address="auto"))
    bundles = group_resources(theirs, 1.0)
    assert has_room(bundles, {"CPU": 2.5, "GPU": 2.0, "memory": 1.0})
    assert not has_room(bundles, {"CPU": 2.5, "GPU": 1.0})
    assert not has_room(bundles, {"CPU": 2.0, "GPU": 2.0})
    assert not has_room(bundles, {"CPU": 8.0})
    ours = Config(cluster=ClusterConfig(dp=100))
    assert has_room(group_resources(ours, 0.0), {"CPU": 1.0})


def test_a_ranks_actor_names_its_group() -> None:
    assert group_of_actor("group-12 rank 3 epoch 4") == "group-12"
    assert group_of_actor("SERVE_REPLICA::moestro#Group#x1") is None


@pytest.mark.parametrize(
    ("groups", "done"),
    [
        ({"RUNNING": 2, "STOPPING": 0}, True),
        ({"RUNNING": 2, "STOPPING": 1}, False),
        ({"RUNNING": 2, "STARTING": 1}, False),
        ({"RUNNING": 1}, False),
        ({}, False),
    ],
)
def test_a_change_is_over_when_what_goes_has_gone(groups: dict[str, int], done: bool) -> None:
    rest = {"Directory": {"RUNNING": 1}, "Gateway": {"RUNNING": 1}}
    assert has_size(PLAN.config, rest | {"Group": groups}) is done
    assert not has_size(PLAN.config, {"Group": groups})
