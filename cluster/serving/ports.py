"""Whether a port can be had, or is there to be called: asked early, where waiting would tell it late."""

from __future__ import annotations

import socket

from moestro.protos.errors import ConfigError

CONNECT_S = 5.0


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises ConfigError when it cannot be bound: better known before half a minute of
    loading."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigError(
            f"server.port: cannot listen on {host} port {port}: {error.strerror or error}; is another server there?"
        ) from None


def check_ray(address: str) -> None:
    """Raises ConfigError when nothing listens at a Ray cluster's host:port; Ray itself finds out after two minutes."""
    host, separator, port = address.rpartition(":")
    if not separator or "://" in address or not port.isdigit():
        return  # auto, local folders and the like are Ray's to judge
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"cluster.ray_address: no Ray cluster at {address}: {reason}") from None
