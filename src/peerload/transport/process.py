"""Which machine and which process this is, as far as transports between processes of one host must know."""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """The same for all processes of a running kernel, containers included; changes with every boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def pid_namespace() -> int:
    """Process ids mean the same only to processes for which this number is the same."""
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 (the link itself can't be opened as a path)


def start_time(pid: int) -> int:
    """Clock ticks after boot at which the process began. (pid, start time) identifies a process until reboot. Raises
    ProcessLookupError if it's gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(f"process {pid}") from None
    return int(stat.rpartition(")")[2].split()[19])


def ptrace_scope() -> int:
    """Yama's setting: 0 same user (also where there is no Yama), 1 only descendants or who is permitted, 2 administrators,
    3 nobody."""
    try:
        return int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except FileNotFoundError:
        return 0


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))
