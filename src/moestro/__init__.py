"""Moestro: a distributed Mixture-of-Experts serving cluster."""

__version__ = "0.1.0"
