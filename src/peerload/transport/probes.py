"""Which transports this host can use: each is tried, in this and in other processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from typing import Final

from ..errors import ConfigError, HostError
from ..memory.cuda import driver
from ..memory.cuda.share import share
from .local_peer import why_not
from .nixl import INSTALL, NixlTransport, module
from .registry import _names


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found out about a transport here: `reason` says what it can do or why it can't, `install` what to do then."""

    name: str
    available: bool
    reason: str
    install: str = ""


def probe(name: str) -> Probe:
    """Really try, in this and in other processes: about 0.1 s, seconds with GPUs. Raises ConfigError for a name there isn't."""
    if name == "files":
        return Probe(name, True, "reads files with preadv")
    if name == "local":
        return _probe_local()
    if name == "nixl":
        return _probe_nixl()
    if name == "cuda_ipc":
        return _probe_cuda_ipc()
    raise ConfigError(f"there is no transport {name!r}; there are {_names()}")


def _probe_cuda_ipc() -> Probe:
    """With every GPU there is."""
    try:
        gpus = [f"cuda:{number}" for number in range(driver.count())]
        if not gpus:
            return Probe("cuda_ipc", False, "the driver shows no GPU to this process", "look at CUDA_VISIBLE_DEVICES")
        for name in gpus:
            share(name)
    except HostError as error:
        return Probe(
            "cuda_ipc", False, error.message, error.next_step or "containers have to share the IPC and process namespaces"
        )
    return Probe("cuda_ipc", True, f"processes map each other's memory on {', '.join(gpus)}")


def _probe_nixl() -> Probe:
    try:
        nixl = module()
    except HostError as error:
        return Probe("nixl", False, error.message, INSTALL)
    try:
        with closing(NixlTransport("lo")) as transport:
            transport.describe()
    except HostError as error:
        return Probe("nixl", False, error.message, "see NIXL's own messages on standard error")
    text = "closed unless transport is nixl; then whoever reaches `interface` can read and overwrite the weights"
    return Probe("nixl", True, f"{nixl.__name__} with UCX; {text}")


#: Two processes, neither of them the other's ancestor, as a seed and a target are: the first permits readers where Yama
#: wants that, tells its process id and the address of eight bytes, and waits; the second reads them.
_READABLE: Final = """
import ctypes, sys
libc = ctypes.CDLL(None)
libc.prctl(0x59616d61, ctypes.c_ulong(-1), 0, 0, 0)
data = ctypes.create_string_buffer(b"peerload")
print(__import__("os").getpid(), ctypes.addressof(data), flush=True)
sys.stdin.read()
"""


_READING: Final = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
class IOVec(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("nbytes", ctypes.c_size_t)]
data = ctypes.create_string_buffer(8)
here, there = IOVec(ctypes.addressof(data), 8), IOVec(int(sys.argv[2]), 8)
libc.process_vm_readv.restype = ctypes.c_ssize_t
moved = libc.process_vm_readv(int(sys.argv[1]), ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
print(0 if moved == 8 and data.raw == b"peerload" else ctypes.get_errno())
"""


def _probe_local() -> Probe:
    """Arenas work wherever Linux does; whether CMA does is found out by using it."""
    if not sys.platform.startswith("linux"):
        return Probe("local", False, f"needs Linux, this is {sys.platform}")
    error = cma_error()
    if error == 0:
        return Probe("local", True, "maps arenas, and reads any other memory of the same user with process_vm_readv")
    problem, fix = why_not(error)
    return Probe("local", True, f"maps arenas; other memory can't be read with process_vm_readv: {problem}", fix)


def cma_error() -> int:
    """0 if one process here may read another of the same user with process_vm_readv, else the errno it gets."""
    python = [sys.executable, "-I", "-S", "-c"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*python, _READABLE], stdin=pipe, stdout=pipe, text=True) as readable:
        assert readable.stdout is not None
        told = readable.stdout.readline().split()
        answer = subprocess.run([*python, _READING, *told], stdout=pipe, text=True, timeout=10, check=True).stdout
    return int(answer)
