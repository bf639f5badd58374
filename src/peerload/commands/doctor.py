"""Say what this host can do: versions, cores and memory, which transports work and why others don't, GPUs, limits, how fast
its memory copies, and what to install or change for more. Changes nothing.

Examples:
  peerload doctor
  peerload doctor --fast --url coordinator:7070

The exit status is 0 even where optional things are missing, and 1 if no transport works.

"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..config import Config
from ..console import Console
from ..coordinator.client import CoordinatorClient
from ..errors import HostError, PeerloadError
from ..memory.cuda import driver
from ..transport.process import cores, ptrace_scope
from .options import add_config, config_of

#: Distributions that matter, what brings each one, and whether nothing works without it.
PACKAGES = (
    ("peerload", "", True),
    ("numpy", "", True),
    ("grpcio", "", True),
    ("torch", "pip install 'peerload[transformers]'", False),
    ("transformers", "pip install 'peerload[transformers]'", False),
    ("safetensors", "pip install 'peerload[transformers]'", False),
)
NIXL_PACKAGES = ("nixl-cu13", "nixl-cu12", "nixl")
#: Yama's settings, https://docs.kernel.org/admin-guide/LSM/Yama.html.
PTRACE = {0: "same user", 1: "only who is permitted", 2: "administrators only", 3: "nobody"}
MEMCPY_NBYTES = 1 << 30
SHM = Path("/dev/shm")  # noqa: S108 (its size is asked for, nothing is put there)
#: What a command of this host may take to answer.
PATIENCE_S = 20.0


@dataclass(frozen=True, slots=True)
class Finding:
    """state: ok; missing (optional, `todo` brings it); broken (should work, and doesn't); note (neither good nor bad)."""

    what: str
    state: str
    text: str
    todo: str = ""
    facts: dict[str, object] = field(default_factory=dict)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--fast", action="store_true", help="don't measure memory (which takes seconds and up to 2 GiB)")
    add_config(parser, "url")


def run(args: argparse.Namespace, console: Console) -> int:
    transports = _transports()
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("packages", _packages),
        ("host", _host),
        ("shared memory", _shared_memory),
        ("devices", _devices),
        ("open doors", lambda: _doors(config_of(args))),
    ]
    if not args.fast:
        checks.append(("memcpy", _memcpy))
    if args.url or args.config:
        url = config_of(args).url
        checks.append((f"coordinator {url}", lambda: _coordinator(url)))
    findings: list[Finding] = []
    for name, check in checks:
        findings += _carefully(name, check)
    usable = [t.what.removeprefix("transport ") for t in transports if t.state == "ok"]
    everything = findings + transports
    todo = _next(everything, usable)
    console.document({"ok": bool(usable), "transports": usable, "next_step": todo, "findings": [asdict(f) for f in everything]})
    console.table(
        f"peerload on {platform.node()}",
        ("what", "state", "finding", "for more"),
        [(f.what, f.state, f.text, f.todo) for f in everything],
    )
    console.text(f"next: {todo}")
    return 0 if usable else 1


def _carefully(name: str, check: Callable[[], Iterator[Finding]]) -> list[Finding]:
    """A check that fails is a finding, too."""
    try:
        return list(check())
    except PeerloadError as error:
        return [Finding(name, "broken", error.message, error.next_step)]
    except (OSError, ValueError, MemoryError, ImportError, subprocess.SubprocessError) as error:
        return [Finding(name, "broken", f"{type(error).__name__}: {error}")]


def _next(findings: list[Finding], usable: list[str]) -> str:
    broken = [f for f in findings if f.state == "broken"]
    if not usable:
        worst = next((f for f in broken if f.todo), None)
        return worst.todo if worst else "no transport works here; the reasons are above"
    if broken:
        return f"{broken[0].what}: {broken[0].todo or broken[0].text}"
    missing = [f.todo for f in findings if f.what == "transformers" and f.state == "missing"]
    return missing[0] if missing else "peerload demo shows the main job on this machine"


def _packages() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()} at {sys.executable}")
    for name, install, needed in PACKAGES:
        found = _version(name)
        if found:
            yield Finding(name, "ok", found, facts={"version": found})
        else:
            yield Finding(name, "broken" if needed else "missing", "not installed", install or f"pip install {name}")


def _version(distribution: str) -> str:
    """Empty if it isn't installed. Imports nothing."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""


def _host() -> Iterator[Finding]:
    yield Finding("kernel", "note", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding("cores", "ok", f"{cores()} of {os.cpu_count()} usable", facts={"cores": cores()})
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    total, free = (int(rows[key].split()[0]) << 10 for key in ("MemTotal", "MemAvailable"))
    facts: dict[str, object] = {"total_bytes": total, "available_bytes": free}
    yield Finding("memory", "ok", f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available{_cgroup()}", facts=facts)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = soft == resource.RLIM_INFINITY
    text = "unlimited" if unlimited else f"{soft / 1e6:.1f} MB"
    todo = "" if unlimited else "RDMA needs more: ulimit -l unlimited"
    yield Finding("locked memory", "note", text, todo, {"bytes": None if unlimited else soft})


def _cgroup() -> str:
    """What a container may take of it, when that is bounded."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text(encoding="ascii").strip()
        except OSError:
            continue
        if limit.isdigit() and int(limit) < 1 << 60:
            return f"; this container may use {int(limit) / 1e9:.1f} GB"
    return ""


def _shared_memory() -> Iterator[Finding]:
    os.close(os.memfd_create("peerload-doctor", os.MFD_CLOEXEC))
    yield Finding("memfd", "ok", "can be made: arenas that peers map")
    if SHM.is_dir():
        usage = shutil.disk_usage(SHM)
        text = f"{usage.free / 1e9:.1f} of {usage.total / 1e9:.1f} GB free (peerload doesn't need it; gloo and NCCL may)"
        yield Finding(str(SHM), "note", text, facts={"free_bytes": usage.free, "total_bytes": usage.total})
    scope = ptrace_scope()
    yield Finding("ptrace", "note", f"Yama's ptrace_scope {scope}: {PTRACE.get(scope, 'unknown')}", facts={"ptrace_scope": scope})


def _transports() -> list[Finding]:
    found: list[Finding] = []
    try:
        from ..transport.probes import probe
        from ..transport.registry import FACTORIES, GPU_FACTORIES
    except ImportError as error:
        reinstall = "install peerload again, with a C compiler at hand"
        return [Finding("transport local", "broken", f"the native helper can't be loaded: {error}", reinstall)]

    def one(name: str) -> Iterator[Finding]:
        result = probe(name)
        installed = next((f"{p} {_version(p)}; " for p in NIXL_PACKAGES if name == "nixl" and _version(p)), "")
        bad = "broken" if name == "local" else "missing"
        yield Finding(f"transport {name}", "ok" if result.available else bad, installed + result.reason, result.install)

    for name in (*FACTORIES, *GPU_FACTORIES):
        found += _carefully(f"transport {name}", lambda name=name: one(name))  # type: ignore[misc]
    return found


def _doors(config: Config) -> Iterator[Finding]:
    """Who can reach the weights of an instance with this configuration."""
    if config.transport == "nixl":
        text = (
            f"transport nixl: every process that reaches {config.interface or '(no interface named)'} can read and overwrite them"
        )
        yield Finding("open doors", "note", text, "name an interface that only trusted machines reach, or set transport to auto")
    else:
        text = f"none to other hosts (transport {config.transport}); processes of the same user on this host can read them"
        yield Finding("open doors", "ok", text)


def _devices() -> Iterator[Finding]:
    smi, gpus, todo = shutil.which("nvidia-smi"), list[str](), ""
    if smi:
        query = [smi, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
        gpus = [line.strip() for line in answer.stdout.splitlines() if line.strip()] if answer.returncode == 0 else []
    elif Path("/dev/nvidia0").exists():
        todo = "/dev/nvidia0 is there, nvidia-smi isn't: install the driver's tools"
    yield Finding("GPUs", "note", "; ".join(gpus) or "none", todo, {"gpus": gpus})
    if gpus:
        yield _peer_access()
    nics = Path("/sys/class/infiniband")
    names = sorted(p.name for p in nics.iterdir()) if nics.is_dir() else []
    yield Finding("RDMA", "note", ", ".join(names) or "none", facts={"devices": names})


def _peer_access() -> Finding:
    """Which GPU reads which directly. cuda_ipc works also within one."""
    try:
        here = range(driver.count())
        pairs = {f"cuda:{a}": [f"cuda:{b}" for b in here if b != a and driver.reaches(a, b)] for a in here}
    except HostError as error:
        return Finding("peer access", "missing", error.message, error.next_step)
    alone = [name for name, others in pairs.items() if len(others) < len(pairs) - 1]
    text = "; ".join(f"{name} reads {', '.join(others) or 'only itself'}" for name, others in pairs.items())
    todo = f"{', '.join(alone)}: see nvidia-smi topo -p2p r" if alone else ""
    return Finding("peer access", "note", text, todo, {"reads": pairs})


def _memcpy() -> Iterator[Finding]:
    from ..memory.speed import memcpy_gb_per_s

    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    nbytes = min(MEMCPY_NBYTES, free // 8)
    one, every = memcpy_gb_per_s(1, nbytes), memcpy_gb_per_s(0, nbytes)
    text = f"{one:.1f} GB/s with one thread, {every:.1f} GB/s with {cores()}: what a load is held against"
    yield Finding("memcpy", "ok", text, facts={"one_thread_gb_s": round(one, 2), "all_threads_gb_s": round(every, 2)})


def _coordinator(url: str) -> Iterator[Finding]:
    with CoordinatorClient(url, timeout_s=3.0) as client:
        status = client.status()
    text = f"peerload {status.version}, up {status.uptime_s:.0f} s, store {status.store}, {len(status.holdings)} ranks on offer"
    yield Finding(f"coordinator {url}", "ok", text, facts={"holdings": len(status.holdings)})
