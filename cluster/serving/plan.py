"""What a cluster is to be: all that it is deployed from, and how that may change while it serves."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from moestro.cluster.config import Config, load_config
from moestro.protos.errors import ConfigError

# Old and new gateways and ranks serve side by side for a while, and a stream goes on from one to the other: what an
# answer depends on and where clients find us stays.
FIXED = (
    "model.path",
    "model.name",
    "model.dtype",
    "cluster.tp",
    "cluster.ray_address",
    "rank.device",
    "rank.kernels",
    "server.host",
    "server.port",
)


@dataclass(frozen=True, slots=True)
class Plan:
    """``generation`` counts rolling updates: replicas of an older one are replaced."""

    config: Config
    secret: str
    gpus_per_rank: float
    generation: int = 1

    def scaled(self, groups: int | None, gateways: int | None) -> Plan:
        """Another number of groups or gateways; None: as it is. What runs goes on running. Raises ConfigError."""
        config = load_config(None, {"cluster": {"groups": groups, "gateways": gateways}}, base=self.config)
        return replace(self, config=config)

    def updated(self, config: Config) -> Plan:
        """The next generation. Raises ConfigError for what cannot change while the cluster serves."""
        for name in FIXED:
            present, wanted = _field(self.config, name), _field(config, name)
            if present != wanted:
                raise ConfigError(f"{name}: cannot change while the cluster serves: it is {present!r}, got {wanted!r}")
        return replace(self, config=config, generation=self.generation + 1)

    def settings(self) -> dict[str, Any]:
        """All but the secret, as JSON has it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "gpus_per_rank": self.gpus_per_rank,
            "generation": self.generation,
        }

    @staticmethod
    def of(settings: dict[str, Any], secret: str) -> Plan:
        """The plan whose settings these are."""
        config = Config.model_validate(settings["config"])
        return Plan(config, secret, settings["gpus_per_rank"], settings["generation"])


def _field(config: Config, name: str) -> object:
    return reduce(getattr, name.split("."), config)
