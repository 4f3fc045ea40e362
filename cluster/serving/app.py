"""The cluster as Ray Serve sees it: three deployments, named as a person reads them in the dashboard.

    Directory   who is alive (one replica)
    Group       one copy of the model; its ranks are actors in the replica's placement group
    Gateway     the gRPC edge; tokens never pass through Serve

Serve owns lifecycle (start order, health, restart, drain); control messages go through Serve handles, tokens through
our own sockets.
"""

from __future__ import annotations

from ray import serve

from moestro.cluster.serving.directory_service import DirectoryService
from moestro.cluster.serving.gateway_service import GatewayService
from moestro.cluster.serving.group_service import GroupService
from moestro.cluster.serving.plan import Plan
from moestro.cluster.serving.specs import SHARED_CPUS, group_resources

APP_NAME = "moestro"

HEALTH_CHECK_S = 0.5  # Serve replaces a replica after three failures in a row
STOP_S = 10.0  # beyond the drain period, before Serve kills a replica
SURGE_PERCENT = 1  # of the replicas; Serve rounds up, so one


def build_app(plan: Plan, *, groups_surge: bool = True) -> serve.Application:
    """The three deployments, bound to each other.

    Deploying it again changes a running cluster: numbers of replicas at once, and replicas of an older generation are
    replaced one after the other. The new one serves before the old one drains; with ``groups_surge`` off a group drains
    first, where there is no room for one more.
    """
    config = plan.config
    cluster, drain_s = config.cluster, config.server.drain_s
    # Serve would draw a random version each time, and so replace every replica even when only their number changes.
    rolling = {"version": str(plan.generation), "_internal": True, "max_surge_percent": SURGE_PERCENT}
    light = {"num_cpus": SHARED_CPUS}
    lifecycle = {
        "health_check_period_s": HEALTH_CHECK_S,
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": drain_s + STOP_S,
        # What fails at start fails again: the reason must reach the person who waits. Once up, Serve tries for ever.
        "max_constructor_retry_count": 1,
    }
    directory = (
        serve.deployment(DirectoryService, name="Directory")
        .options(
            version="1",
            _internal=True,
            user_config=plan.settings(),
            ray_actor_options=light,
            **lifecycle,
        )
        .bind(plan.secret)
    )
    groups = (
        serve.deployment(GroupService, name="Group")
        .options(
            num_replicas=cluster.groups,
            ray_actor_options=light,
            placement_group_bundles=group_resources(config, plan.gpus_per_rank),
            placement_group_strategy="PACK",
            **lifecycle,
            **rolling | {"max_surge_percent": SURGE_PERCENT if groups_surge else 0},
        )
        .bind(config, plan.secret, directory, plan.gpus_per_rank)
    )
    return (
        serve.deployment(GatewayService, name="Gateway")
        .options(num_replicas=cluster.gateways, ray_actor_options=light, **lifecycle, **rolling)
        .bind(config, plan.secret, directory, groups)
    )
