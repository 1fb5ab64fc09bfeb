"""What a measurement was taken on, without names of hosts or paths; and what a process uses."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
from pathlib import Path


def describe(directory: Path) -> dict[str, str]:
    """Return what figures depend on. `directory` is where the database is kept."""
    return {
        "processor": _processor(),
        "cores": str(len(os.sched_getaffinity(0))),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sqlite": sqlite3.sqlite_version,
        "file system": _file_system(directory),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return " ".join(named[1].split()) if named else platform.machine()


def _file_system(directory: Path) -> str:
    """Return the kind of file system; on one in memory, a commit costs nothing."""
    place = directory.resolve()
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    above = [(at, kind) for at, kind in mounts if place.is_relative_to(at)]
    return max(above, key=lambda mount: len(mount[0]), default=("", "unknown"))[1]


def resident_mib(pid: int) -> float:
    """Return how much memory of the process is resident, in MiB."""
    status = Path(f"/proc/{pid}/status").read_text()
    resident = re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)
    assert resident
    return int(resident[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """Return how long the process has computed so far, the kernel's part included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
