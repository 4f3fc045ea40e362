"""Changing a cluster that serves, from any process that may talk to its Ray."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

from moestro.cluster.config import Config, load_config
from moestro.cluster.directory import GroupEntry
from moestro.cluster.serving.app import APP_NAME
from moestro.cluster.serving.handles import stop_handles
from moestro.cluster.serving.launch import ASK_S, StartFailed, applications, deploy, quiet_ray, wait_until_running
from moestro.cluster.serving.plan import Plan
from moestro.cluster.serving.ports import check_ray
from moestro.cluster.serving.reasons import reason_in
from moestro.cluster.serving.specs import group_resources, has_room

PLAN_S = 60.0  # without it nothing can be changed: worth the wait for a directory that is being replaced

Progress = Callable[[tuple[GroupEntry, ...]], None]


@dataclass(frozen=True, slots=True)
class RunningCluster:
    """A cluster that somebody else has started. ``plan`` is what it was told to be last."""

    plan: Plan
    directory: Any

    def scale(self, groups: int | None, gateways: int | None, on_progress: Progress) -> Config:
        """Starts or drains groups and gateways; what stays is not touched. Returns when it is done, with the
        configuration from now on. Raises ConfigError, StartFailed."""
        return self._change(self.plan.scaled(groups, gateways), on_progress)

    def update(self, file: Path | None, on_progress: Progress) -> Config:
        """Replaces every gateway and group, one at a time, each when its successor serves; by the configuration that
        the cluster has, with what ``file`` names laid over it. Raises ConfigError, StartFailed."""
        return self._change(self.plan.updated(load_config(file, {}, base=self.plan.config)), on_progress)

    def _change(self, plan: Plan, on_progress: Progress) -> Config:
        self._show(on_progress)
        deploy(plan, groups_surge=has_room(group_resources(plan.config, plan.gpus_per_rank), ray.available_resources()))
        wait_until_running(plan.config, self.directory, on_progress)
        self._show(on_progress)
        return plan.config

    def _show(self, on_progress: Progress) -> None:
        with suppress(Exception):  # a directory that is busy or being replaced stops no rollout
            on_progress(self.directory.watch.remote(-1).result(timeout_s=ASK_S).groups)


@contextmanager
def connected(ray_address: str) -> Iterator[RunningCluster]:
    """The Moestro cluster in the Ray cluster at an address; ``auto`` finds the one that was started on this machine
    last. Raises ConfigError, StartFailed."""
    check_ray(ray_address)
    quiet_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if ray_address.rpartition(":")[0] in ("localhost", "127.0.0.1", ray.util.get_node_ip_address()):
        # Of itself Ray shows its token only to a cluster that it has found itself; one on this machine is as near.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        try:
            ray.init(address=ray_address, namespace=APP_NAME, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise StartFailed(f"ray-address: {ray_address}: {reason_in(str(error))}") from None
        if APP_NAME not in applications():
            raise StartFailed(f"ray-address: no Moestro cluster runs at {ray_address}")
        directory = serve.get_deployment_handle("Directory", APP_NAME)
        yield RunningCluster(directory.plan.remote().result(timeout_s=PLAN_S), directory)
    finally:
        stop_handles()
        ray.shutdown()
