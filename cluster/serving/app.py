"""The cluster as Ray Serve sees it: three deployments, named as a person reads them in the dashboard.

    Directory   who is alive (one replica)
    Group       one copy of the model; its ranks are actors in the replica's placement group
    Gateway     the gRPC edge; tokens never pass through Serve

Serve owns lifecycle (start order, health, restart, drain); control messages go through Serve handles, tokens through
our own sockets.
"""

from __future__ import annotations

from ray import serve

from moestro.cluster.config import Config
from moestro.cluster.serving.directory_service import DirectoryService
from moestro.cluster.serving.gateway_service import GatewayService
from moestro.cluster.serving.group_service import GroupService
from moestro.cluster.serving.specs import bundle

APP_NAME = "moestro"

HEALTH_CHECK_S = 0.5  # Serve replaces a replica after three failures in a row
STOP_S = 10.0  # beyond the drain period, before Serve kills a replica
REPLICA_CPUS = 0.001  # a group's own process waits for its ranks; Ray wants to see a number above zero


def build_app(config: Config, secret: str, gpus_per_rank: float) -> serve.Application:
    """The three deployments, bound to each other."""
    cluster, drain_s = config.cluster, config.server.drain_s
    light = {"num_cpus": 0}
    lifecycle = {
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": drain_s + STOP_S,
        # What fails at start fails again: the reason must reach the person who waits. Once up, Serve tries for ever.
        "max_constructor_retry_count": 1,
    }
    directory = (
        serve.deployment(DirectoryService, name="Directory").options(ray_actor_options=light, **lifecycle).bind()
    )
    groups = (
        serve.deployment(GroupService, name="Group")
        .options(
            num_replicas=cluster.groups,
            ray_actor_options=light,
            placement_group_bundles=[
                {"CPU": REPLICA_CPUS},
                *[bundle(config, gpus_per_rank)] * (cluster.dp * cluster.tp),
            ],
            placement_group_strategy="PACK",
            **lifecycle,
        )
        .bind(config, secret, directory, gpus_per_rank)
    )
    return (
        serve.deployment(GatewayService, name="Gateway")
        .options(num_replicas=cluster.gateways, ray_actor_options=light, **lifecycle)
        .bind(config, secret, directory, groups)
    )
