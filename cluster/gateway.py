"""A gateway: the edge, wired to the ranks of a cluster."""

from __future__ import annotations

