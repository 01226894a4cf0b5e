"""How much memory this process may take: what the machine has left, and the limits that are set on it.

A limit that is reached is a kill without a word (the kernel's, a container's) or a failed allocation (`ulimit -v`).
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

CGROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")
# Names of limit, use, and the part of the use that the kernel takes back when it needs to, for both versions.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def on_host() -> int:
    """Resident bytes that this process can come to, what it has now included; shared with the other local processes."""
    process = psutil.Process().memory_info()
    free = [psutil.virtual_memory().available, *_free_in_groups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        free.append(limit - process.vms)
    return int(process.rss + max(0, min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def on_gpu(device: torch.device) -> int:
    """Bytes that this process can come to on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device)


def _free_in_groups() -> Iterator[int]:
    """What each control group that this process is in, or that contains one of them, has left."""
    if not OF_PROCESS.is_file():
        return
    for line in OF_PROCESS.read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root, names = (CGROUPS / "memory", V1) if controllers else (CGROUPS, V2)
        own = root / name.lstrip("/")
        # In a container the own group may be the root that is seen, whatever its name is outside.
        for group in dict.fromkeys([own, *own.parents, root]):
            if group.is_relative_to(root):
                yield from _free_in(group, *names)


def _free_in(group: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text().strip()
        if most != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            yield int(most) - int((group / used).read_text()) + int(statistics.get(reclaimable, 0))
    except (OSError, ValueError):
        return  # no such group is seen from here, or it sets no limit
