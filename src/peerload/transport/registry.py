"""The transports there are, by name, and those that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Final

from ..config import Config
from ..errors import ConfigError
from ..memory.cuda.landing import Landing
from .base import Transport
from .cuda_ipc import CudaIpcTransport
from .files import FilesTransport
from .local import LocalTransport
from .nixl import NixlTransport
from .on_demand import Deferred
from .via_host import ThroughHost

FACTORIES: Final[Mapping[str, Callable[[Config], Transport]]] = {
    "local": lambda config: LocalTransport(config.threads),
    "nixl": lambda config: NixlTransport(config.interface, config.stall_s),
}


#: For a GPU's memory.
GPU_FACTORIES: Final[Mapping[str, Callable[[str], Transport]]] = {"cuda_ipc": CudaIpcTransport}


#: Pinned host memory through which files reach a GPU; no faster when larger.
LANDING_NBYTES: Final = 64 << 20


def open_transport(name: str, config: Config, device: str = "cpu") -> Transport:
    """A transport for memory on `device`. Raises ConfigError for a name there isn't, and for one that doesn't move such memory;
    for nixl also without a network interface; HostError when this host can't use it. The caller closes it."""
    on_gpu = device != "cpu"
    if name == FilesTransport.name:
        files = FilesTransport(threads=config.threads)
        return ThroughHost(files, Landing(device, min(LANDING_NBYTES, config.staging_bytes))) if on_gpu else files
    if name not in FACTORIES and name not in GPU_FACTORIES:
        raise ConfigError(f"there is no transport {name!r}; there are {_names()}")
    if on_gpu:
        if name not in GPU_FACTORIES:
            raise ConfigError(
                f"transport {name} doesn't move memory of {device} yet", next_step="set transport to auto or cuda_ipc"
            )
        return GPU_FACTORIES[name](device)
    if name not in FACTORIES:
        raise ConfigError(
            f"transport {name} moves GPU memory only, and the weights are on {device}", next_step="set transport to auto"
        )
    return FACTORIES[name](config)


def open_transports(config: Config, device: str = "cpu") -> dict[str, Transport]:
    """For memory on `device`, the transport that `config.transport` asks for, and `files`, which reads checkpoints. auto:
    cuda_ipc on a GPU, else local; never one that other hosts can reach. The caller closes them."""
    name = config.transport
    if name == "auto":
        name = "local" if device == "cpu" else "cuda_ipc"
    opened = {name: open_transport(name, config, device)}
    if device == "cpu":
        return {**opened, FilesTransport.name: open_transport(FilesTransport.name, config)}
    # Its landing is pinned memory: made only if a checkpoint is read.
    files = Deferred(FilesTransport.name, FilesTransport.limits, lambda: open_transport(FilesTransport.name, config, device))
    return {**opened, files.name: files}


@contextmanager
def opened_transports(config: Config, device: str = "cpu") -> Iterator[dict[str, Transport]]:
    """`open_transports` for the length of a block: then connections end and memory is forgotten."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(transport)) for name, transport in open_transports(config, device).items()}


def _names() -> str:
    return ", ".join((*FACTORIES, *GPU_FACTORIES))
