"""How many cores this process may use."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")


@cache
def n_cores() -> int:
    """Return the cores that threads may use: those of the affinity mask, within a quota of CPU time
    that a container may have."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = min((quota for quota in _quotas() if quota), default=math.inf)
    return max(1, math.ceil(min(cores or 1, quota)))


def _quotas() -> list[float | None]:
    """Return the quota of each control group that holds this process, in cores."""
    return [_quota_of(*limits) for limits in _limits()]


def _limits() -> list[tuple[str, str]]:
    """Return quota and period of each control group, in microseconds, as the kernel has them."""
    found = []
    for line in _read(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUP / controllers if controllers else _CGROUP
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if controllers:
                quota = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
            else:
                quota = tuple(_read(folder / "cpu.max").split()) or ("", "")
            if len(quota) == 2:
                found.append(quota)
            if folder == root:
                break
    return found


def _quota_of(quota: str, period: str) -> float | None:
    """Return a quota in cores, or None if there is none: "max" and -1 say so."""
    try:
        cores = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cores if cores > 0 else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
