"""Starting and stopping a cluster from one process, usually ``moestro serve``."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry
from moestro.cluster.serving.app import APP_NAME, build_app
from moestro.cluster.serving.specs import rank_resources
from moestro.protos.errors import ConfigError, MoestroError

POLL_S = 0.1
SERVE_CPUS = 1.0  # Serve's controller and the groups' own bundles ask for fractions of a CPU

Progress = Callable[[tuple[GroupEntry, ...]], None]


class StartFailed(MoestroError):
    """The cluster did not come up. The message is Serve's own reason, or how long was waited."""


@contextmanager
def running_cluster(config: Config, on_progress: Progress) -> Iterator[str]:
    """A cluster that serves while the block runs and is gone afterwards. Yields the dashboard's URL ("" if none).

    ``on_progress`` is called while the model loads. Raises ConfigError or StartFailed with nothing left running.
    """
    check_port(config)
    for name in ("ray.serve", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their running commentary is in Ray's own log files
    with _ray(config) as dashboard_url:
        serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
        app = build_app(config, secret=secrets.token_hex(32))
        try:
            serve.run_many(
                [serve.RunTarget(target=app, name=APP_NAME, route_prefix=None)], wait_for_applications_running=False
            )
            _wait_until_running(config, on_progress)
            yield dashboard_url
        finally:
            with suppress(Exception):  # whatever is wrong with it, what follows takes the rest down
                serve.delete(APP_NAME)


def check_port(config: Config) -> None:
    """Raises ConfigError when the gRPC port cannot be bound: better known before half a minute of loading."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.server.host, config.server.port))
        except OSError as error:
            raise ConfigError(
                f"server.port: {config.server.host}:{config.server.port} cannot be bound: {error.strerror}"
            ) from None


@contextmanager
def _ray(config: Config) -> Iterator[str]:
    """A connection to the given Ray cluster, or a cluster of our own for as long as the block runs."""
    cluster = config.cluster
    # RAY_AUTH_MODE is left alone: Ray turns token authentication on for clusters it starts, and keeps the token in the
    # user's home. Without it anyone who reaches Ray's ports could run code here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    common: dict[str, Any] = {"namespace": APP_NAME, "log_to_driver": False, "logging_level": logging.WARNING}
    if cluster.ray_address:
        context = ray.init(address=cluster.ray_address, **common)
    else:
        num_ranks = cluster.groups * cluster.dp * cluster.tp
        context = ray.init(
            address="local",
            # Ranks share the cores as our own thread counts say, so Ray must not refuse more ranks than cores.
            num_cpus=int(max(os.cpu_count() or 1, num_ranks * rank_resources(config)["num_cpus"] + SERVE_CPUS)),
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=cluster.dashboard_port,
            **common,
        )
    for each, handler in handlers.items():
        signal.signal(each, handler)  # ray.init puts a crash reporter on SIGTERM; ours stops in order
    try:
        yield context.dashboard_url or ""
    finally:
        ray.shutdown()


def _wait_until_running(config: Config, on_progress: Progress) -> None:
    deadline = time.monotonic() + config.cluster.start_timeout_s
    directory = None
    while True:
        application = serve.status().applications[APP_NAME]
        if application.status is ApplicationStatus.RUNNING:
            return
        if application.status is ApplicationStatus.DEPLOY_FAILED:
            raise StartFailed(application.message)
        if time.monotonic() > deadline:
            raise StartFailed(f"not serving after cluster.start_timeout_s = {config.cluster.start_timeout_s} s")
        with suppress(Exception):  # the directory is a deployment like the others and comes up with them
            directory = directory or serve.get_deployment_handle("Directory", APP_NAME)
            _, groups = directory.watch.remote(-1).result(timeout_s=1.0)
            on_progress(groups)
        time.sleep(POLL_S)
