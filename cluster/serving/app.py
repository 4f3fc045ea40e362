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
from moestro.cluster.serving.specs import rank_resources

APP_NAME = "moestro"


def build_app(config: Config, secret: str) -> serve.Application:
    """The three deployments, bound to each other."""
    cluster, drain_s = config.cluster, config.server.drain_s
    light = {"num_cpus": 0}
    lifecycle = {
        "health_check_period_s": 2.0,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": drain_s + 10.0,
    }
    directory = (
        serve.deployment(DirectoryService, name="Directory").options(ray_actor_options=light, **lifecycle).bind()
    )
    groups = (
        serve.deployment(GroupService, name="Group")
        .options(
            num_replicas=cluster.groups,
            ray_actor_options=light,
            placement_group_bundles=[{"CPU": 0.001}, *[_bundle(config)] * (cluster.dp * cluster.tp)],
            placement_group_strategy="PACK",
            **lifecycle,
        )
        .bind(config, secret, directory)
    )
    return (
        serve.deployment(GatewayService, name="Gateway")
        .options(num_replicas=cluster.gateways, ray_actor_options=light, **lifecycle)
        .bind(config, secret, directory, groups)
    )


def _bundle(config: Config) -> dict[str, float]:
    resources = rank_resources(config)
    return {"CPU": resources["num_cpus"], "GPU": resources["num_gpus"]}
