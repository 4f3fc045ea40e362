"""Starting and stopping a cluster from one process, usually ``moestro serve``."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.serve.schema import ApplicationStatus

from moestro.cluster.config import Config
from moestro.cluster.directory import GroupEntry, Snapshot
from moestro.cluster.serving.app import APP_NAME, build_app
from moestro.cluster.serving.handles import stop_handles
from moestro.cluster.serving.plan import Plan
from moestro.cluster.serving.ports import check_port, check_ray
from moestro.cluster.serving.reasons import reason_in
from moestro.cluster.serving.specs import gpus_per_rank, has_size
from moestro.protos.errors import MoestroError

POLL_S = 0.1
ASK_S = 2.0

Progress = Callable[[tuple[GroupEntry, ...]], None]


class StartFailed(MoestroError):
    """The cluster did not come up. The message is the reason in a line, or how long was waited."""


@dataclass(frozen=True, slots=True)
class Running:
    """A cluster that serves: where its gateways listen (host:port), the dashboard's address ("" if none), Ray's, and
    ``watch(version)``, which answers when the directory has another version, or after half a second."""

    addresses: tuple[str, ...]
    dashboard: str
    ray_address: str
    groups: tuple[GroupEntry, ...]
    watch: Callable[[int], Snapshot]


@contextmanager
def running_cluster(config: Config, on_progress: Progress) -> Iterator[Running]:
    """A cluster that serves while the block runs and is gone afterwards.

    Standard output is discarded meanwhile: Ray's driver prints there what its daemons report, with no way to turn it
    off; all of it is in Ray's logs too. ``on_progress`` is called while the model loads. Raises ConfigError or
    StartFailed with nothing left running.
    """
    config = _settled(config)
    quiet_ray()
    in_their_ray = bool(config.cluster.ray_address)
    with (
        open(os.devnull, "w") as nowhere,
        redirect_stdout(nowhere),
        _ray(config) as dashboard,
        _serve(in_their_ray),
        _app(config) as directory,
    ):
        wait_until_running(config, directory, on_progress)

        def watch(version: int) -> Snapshot:
            snapshot: Snapshot = directory.watch.remote(version).result(timeout_s=ASK_S)
            return snapshot

        snapshot = watch(-1)
        addresses = tuple(sorted({gateway.address for gateway in snapshot.gateways}))
        yield Running(addresses, dashboard, ray.get_runtime_context().gcs_address, snapshot.groups, watch)


def quiet_ray() -> None:
    """Ray's running commentary is in its own log files."""
    for name in ("ray", "ray.serve", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _settled(config: Config) -> Config:
    """The same with what must not change later, wherever and whenever a replica starts: the folder and, on one machine,
    the port. Raises ConfigError when the port or Ray's cannot be had."""
    model = config.model.model_copy(update={"path": config.model.path.resolve()})
    if config.cluster.ray_address:
        check_ray(config.cluster.ray_address)
        return config.model_copy(update={"model": model})
    port = check_port(config.server.host, config.server.port)
    return config.model_copy(update={"model": model, "server": config.server.model_copy(update={"port": port})})


@contextmanager
def _ray(config: Config) -> Iterator[str]:
    """A connection to the given Ray cluster, or a cluster of our own for as long as the block runs."""
    cluster = config.cluster
    # RAY_AUTH_MODE is left alone: Ray turns token authentication on for clusters it starts, and keeps the token in the
    # user's home. Without it anyone who reaches Ray's ports could run code here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"namespace": APP_NAME, "log_to_driver": False, "logging_level": logging.ERROR}
    if cluster.ray_address:
        options: dict[str, Any] = {"address": cluster.ray_address}
    else:
        # Ray's processes have dozens of threads, for which glibc would keep eight heaps a core: what is freed in one is
        # not used in the others, and all grow for hours.
        os.environ.setdefault("MALLOC_ARENA_MAX", "4")
        options = {
            "address": "local",
            "include_dashboard": True,
            "dashboard_host": "127.0.0.1",
            "dashboard_port": cluster.dashboard_port,
        }
    try:
        with _signals_deferred():
            try:
                context = ray.init(**options, **common)
            except (ConnectionError, RuntimeError, ValueError) as error:
                where = f"cluster.ray_address: {cluster.ray_address}: " if cluster.ray_address else "Ray: "
                raise StartFailed(where + reason_in(str(error))) from None
        yield context.dashboard_url or ""
    finally:
        stop_handles()
        ray.shutdown()


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """SIGINT and SIGTERM take effect when the block has ended: cut off in the middle, ray.init leaves processes behind.

    Also puts the handlers back, since ray.init puts a crash reporter on SIGTERM.
    """
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    came: list[int] = []
    for each in handlers:
        signal.signal(each, lambda number, frame: came.append(number))
    try:
        yield
    except SystemExit:  # Ray's own handler, in the moment between its setting and ours
        came.append(signal.SIGTERM)
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)
        if came:
            signal.raise_signal(came[0])


@contextmanager
def _serve(in_their_ray: bool) -> Iterator[None]:
    """Serve's controller. In a Ray cluster that outlives us it is ours to end when it ran nothing before; in our own
    it ends with Ray."""
    found = bool(applications())
    serve.start(http_options={"location": "NoServer"}, logging_config={"log_level": "WARNING"})
    try:
        yield
    finally:
        with suppress(Exception):
            if in_their_ray and not found and not applications():
                serve.shutdown()


def applications() -> dict[str, Any]:
    """What runs under Serve here; nothing when Serve is not there."""
    return dict(serve.status().applications)


@contextmanager
def _app(config: Config) -> Iterator[Any]:
    """Deploys our application; yields the directory's handle."""
    if APP_NAME in applications():
        raise StartFailed(f"cluster.ray_address: {config.cluster.ray_address} already runs a Moestro cluster")
    present = ray.cluster_resources().get("GPU", 0.0)
    gpus = gpus_per_rank(config, present)
    needed = gpus * config.cluster.groups * config.cluster.dp * config.cluster.tp
    if needed > present and not config.cluster.ray_address:  # another's Ray may grow as it is asked to
        raise StartFailed(f"rank.device: {needed:.0f} ranks need a GPU each, this machine has {present:.0f}")
    try:
        deploy(Plan(config, secrets.token_hex(32), gpus))
        yield serve.get_deployment_handle("Directory", APP_NAME)
    finally:
        with suppress(Exception):  # whatever is wrong with it, what follows takes the rest down
            serve.delete(APP_NAME)


def deploy(plan: Plan, *, groups_surge: bool = True) -> None:
    """Says how the application is to be; Serve makes it so."""
    app = build_app(plan, groups_surge=groups_surge)
    target = serve.RunTarget(target=app, name=APP_NAME, route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def wait_until_running(config: Config, directory: Any, on_progress: Progress) -> None:
    """Returns when the application is as it was deployed last. Raises StartFailed."""
    deadline = time.monotonic() + config.cluster.start_timeout_s
    while True:
        application = serve.status().applications[APP_NAME]
        replicas = {name: each.replica_states for name, each in application.deployments.items()}
        if application.status is ApplicationStatus.RUNNING and has_size(config, replicas):
            return
        if application.status is ApplicationStatus.DEPLOY_FAILED:
            messages = [each.message for each in application.deployments.values()]
            raise StartFailed(reason_in("\n".join([application.message, *messages])))
        if time.monotonic() > deadline:
            raise StartFailed(f"not serving after cluster.start_timeout_s = {config.cluster.start_timeout_s} s")
        with suppress(Exception):  # the directory is a deployment like the others and comes up with them
            on_progress(directory.watch.remote(-1).result(timeout_s=1.0).groups)
        time.sleep(POLL_S)
