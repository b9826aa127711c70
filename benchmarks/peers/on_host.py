"""What the peers without MLX have in common: they compute at once, on the CPU."""

from __future__ import annotations


def start(device: str) -> None:
    """Have nothing to choose."""


def ready(results: list) -> None:
    """Have nothing to wait for."""
