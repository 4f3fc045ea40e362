"""Whether a port can be had, asked early."""

from __future__ import annotations

import socket

from moestro.protos.errors import ConfigError


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when the gRPC port cannot be bound: better known before half a minute of loading."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, _, _, address = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"server.port: cannot listen on {host} port {port}: {error.strerror or error}; is another server there?"
        ) from None
