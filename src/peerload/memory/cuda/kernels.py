"""kernels.cu for the GPU at hand, compiled once in a process (up to a second) by NVRTC, which CUDA builds of PyTorch bring."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from importlib import resources
from typing import Final

from ...errors import HostError
from .driver import INSTALL, Device, Parameter, Stream

THREADS: Final = 256
WARPS: Final = THREADS // 32


class Kernels:
    """The two kernels on one device. Tables and sums are device addresses."""

    def __init__(self, device: Device) -> None:
        module = device.load(compiled(*device.capability))
        self._copy, self._digest = (module.kernel(name) for name in ("peerload_copy", "peerload_digest"))
        self._multiprocessors = device.multiprocessors

    def copy(self, stream: Stream, table: int, rows: int, tiles: int, *, strided: bool) -> None:
        # With more blocks, what is read at a time lies further apart than the GPU has address translations for, where memory is
        # another process's; strided copies reach twice as far.
        self._launch(stream, self._copy, 2 if strided else 4, table, rows, tiles)

    def digest(self, stream: Stream, sums: int, table: int, rows: int, tiles: int) -> None:
        self._launch(stream, self._digest, 4, table, rows, tiles, sums)

    def _launch(self, stream: Stream, kernel: object, room: int, table: int, rows: int, tiles: int, *out: int) -> None:
        """With at most `room` blocks to a multiprocessor; they take tiles by turns."""
        parameters: list[Parameter] = [(table, ctypes.c_void_p), (rows, ctypes.c_uint32), (tiles, ctypes.c_uint32)]
        parameters += [(o, ctypes.c_void_p) for o in out]
        stream.launch(kernel, min(room * self._multiprocessors, -(-tiles // WARPS)), THREADS, parameters)


def source() -> str:
    return resources.files(__package__).joinpath("kernels.cu").read_text(encoding="utf-8")


_compiling = threading.Lock()


def compiled(major: int, minor: int) -> bytes:
    """Machine code for one compute capability. Raises HostError with the compiler's own words."""
    with _compiling:  # who comes second waits for the first
        return _compiled(major, minor)


@cache
def _compiled(major: int, minor: int) -> bytes:
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise HostError(f"GPU kernels need the package cuda-bindings ({error})", next_step=INSTALL) from error

    def check(status: object, doing: str) -> None:
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise HostError(f"{doing}: {getattr(status, 'name', status)}")

    try:
        status, program = nvrtc.nvrtcCreateProgram(source().encode(), b"kernels.cu", 0, [], [])
    except RuntimeError as error:
        raise HostError(f"GPU kernels need NVRTC: {error}", next_step="pip install nvidia-cuda-nvrtc") from error
    check(status, "nvrtcCreateProgram")
    try:
        options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, log)
            raise HostError(f"kernels.cu doesn't compile for sm_{major}{minor}: {log.decode(errors='replace').strip()}")
        status, nbytes = nvrtc.nvrtcGetCUBINSize(program)
        check(status, "nvrtcGetCUBINSize")
        image: bytes = b" " * nbytes
        check(nvrtc.nvrtcGetCUBIN(program, image)[0], "nvrtcGetCUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return image
