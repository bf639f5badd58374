"""The CUDA driver, every call checked: a GPU as peerload uses it.

Always the device's primary context, which is the one PyTorch and the engines live in; never one of our own. The calling
thread's current context is restored. Addresses are plain integers.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ...deadline import Deadline
from ...errors import HostError

INSTALL: Final = "pip install 'peerload[cuda]'"
HANDLE_NBYTES: Final = 64
#: How often the end of a stream's work is asked for, seconds, once it has taken longer than BRISK_S: a sleep ends 50 us late.
POLL_S: Final = 50e-6
BRISK_S: Final = 10e-3

#: What a kernel gets: (value, C type).
Parameter = tuple[int, type[ctypes.c_void_p] | type[ctypes.c_uint32]]


class DriverError(HostError):
    """`code` is the driver's own name for it, as in CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, doing: str, code: str, text: str, *, next_step: str = "") -> None:
        super().__init__(f"{doing}: {code} ({text})", next_step=next_step)
        self.code = code


@cache
def bindings() -> ModuleType:
    """The vendor's bindings, ready for use. Raises HostError where there are none, no driver, or no GPU."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise HostError(f"GPU memory needs the package cuda-bindings ({error})", next_step=INSTALL) from error
    try:
        code = driver.cuInit(0)[0]
    except RuntimeError as error:
        raise HostError(f"no CUDA driver here: {error}", next_step="install the vendor's driver, or run on a GPU host") from error
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DriverError("cuInit", code.name, "no usable GPU", next_step="see whether nvidia-smi lists GPUs here")
    return driver  # type: ignore[no-any-return]  # the bindings carry no types


def call(name: str, *args: object, about: str = "") -> tuple[Any, ...]:
    """Call `name` of the driver; returns what it gives besides its status. Raises DriverError that says `about` what."""
    driver = bindings()
    status, *found = getattr(driver, name)(*args)
    if status != driver.CUresult.CUDA_SUCCESS:
        _, text = driver.cuGetErrorString(status)
        raise DriverError(f"{name}{' ' * bool(about)}{about}", status.name, text.decode() if text else "no description")
    return tuple(found)


def count() -> int:
    """GPUs that this process may use. Raises HostError where there is no driver."""
    return int(call("cuDeviceGetCount")[0])


def uuid(number: int) -> str:
    """Of GPU `number`, or of the slice of it (MIG): the same in every process, however it counts. Makes no context."""
    version_2 = hasattr(bindings(), "cuDeviceGetUuid_v2")  # before CUDA 13, version 1 knew nothing of slices
    (found,) = call("cuDeviceGetUuid_v2" if version_2 else "cuDeviceGetUuid", _device(number), about=f"cuda:{number}")
    return bytes(found.bytes).hex()


def reaches(number: int, other: int) -> bool:
    """Whether GPU `number` can read the memory of another one directly. Makes no context."""
    return number == other or bool(call("cuDeviceCanAccessPeer", _device(number), _device(other))[0])


def _device(number: int) -> object:
    return call("cuDeviceGet", number, about=f"cuda:{number}")[0]


@dataclass(frozen=True, slots=True)
class Block:
    """One allocation of the driver's: what an exported handle stands for. exportable: cuIpcGetMemHandle takes it."""

    address: int
    nbytes: int
    exportable: bool

    @property
    def end(self) -> int:
        return self.address + self.nbytes

    def contains(self, address: int, nbytes: int) -> bool:
        return self.address <= address and address + nbytes <= self.end


class Device:
    """GPU `name` ("cuda:N", N counted as the process sees its GPUs). Thread-safe. Keeps the primary context until closed.

    Raises HostError for a GPU that isn't there."""

    def __init__(self, name: str) -> None:
        kind, _, number = name.partition(":")
        if kind != "cuda" or not number.isdecimal():
            raise HostError(f"{name!r} names no GPU", next_step="write it as cuda:0")
        here = count()
        if int(number) >= here:
            raise HostError(
                f"{name} is not among the {here} GPUs that this process sees", next_step="look at CUDA_VISIBLE_DEVICES"
            )
        self.name: Final = name
        self.number: Final = int(number)
        self._device = _device(self.number)
        self._context = call("cuDevicePrimaryCtxRetain", self._device, about=name)[0]
        self._closed = False

    def close(self) -> None:
        """Let go of the primary context. Safe to call twice."""
        if not self._closed:
            self._closed = True
            call("cuDevicePrimaryCtxRelease", self._device, about=self.name)

    @property
    def capability(self) -> tuple[int, int]:
        attribute = bindings().CUdevice_attribute
        return (
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            self._attribute(attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        )

    @property
    def multiprocessors(self) -> int:
        return self._attribute(bindings().CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)

    @property
    def model(self) -> str:
        """As the vendor calls it."""
        return bytes(call("cuDeviceGetName", 100, self._device, about=self.name)[0]).split(b"\0")[0].decode()

    @property
    def memory_nbytes(self) -> tuple[int, int]:
        """Free and in all."""
        with self.current():
            free, total = call("cuMemGetInfo", about=self.name)
        return int(free), int(total)

    def _attribute(self, attribute: object) -> int:
        return int(call("cuDeviceGetAttribute", attribute, self._device, about=self.name)[0])

    @contextmanager
    def current(self) -> Iterator[None]:
        """This thread's context, for the length of a block."""
        call("cuCtxPushCurrent", self._context, about=self.name)
        try:
            yield
        finally:
            call("cuCtxPopCurrent", about=self.name)

    def synchronize(self) -> None:
        """Wait for everything that anybody in this process has asked of the GPU."""
        with self.current():
            call("cuCtxSynchronize", about=self.name)

    def block(self, address: int) -> Block:
        """The allocation that an address of device memory, of whichever GPU, lies in. Raises DriverError for any other."""
        driver, where = bindings(), f"of {address:#x}"
        legacy = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
        with self.current():
            base, nbytes = call("cuMemGetAddressRange", driver.CUdeviceptr(address), about=where)
            (exportable,) = call("cuPointerGetAttribute", legacy, driver.CUdeviceptr(address), about=where)
        return Block(int(base), int(nbytes), bool(exportable))

    def holds(self, address: int) -> bool:
        """Whether an address lies in device memory, of whichever GPU, that is allocated at present."""
        driver = bindings()
        with self.current():
            return bool(driver.cuMemGetAddressRange(driver.CUdeviceptr(address))[0] == driver.CUresult.CUDA_SUCCESS)

    def can_read(self, address: int) -> bool:
        """Whether kernels may touch an address: device memory, or host memory that was pinned. Pageable memory is not."""
        driver = bindings()
        name = driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_POINTER
        with self.current():
            status, found = driver.cuPointerGetAttribute(name, driver.CUdeviceptr(address))
        return status == driver.CUresult.CUDA_SUCCESS and int(found) == address

    def allocate(self, nbytes: int) -> int:
        """Device memory of the caller's, contents undefined. Raises DriverError."""
        with self.current():
            return int(call("cuMemAlloc", nbytes, about=f"{nbytes} bytes on {self.name}")[0])

    def free(self, address: int) -> None:
        with self.current():
            call("cuMemFree", bindings().CUdeviceptr(address), about=f"{address:#x} on {self.name}")

    def pin(self, nbytes: int) -> int:
        """Page-locked host memory of the caller's, which every GPU of the process may read at its host address."""
        with self.current():
            portable = bindings().CU_MEMHOSTALLOC_PORTABLE | bindings().CU_MEMHOSTALLOC_DEVICEMAP
            return int(call("cuMemHostAlloc", nbytes, portable, about=f"{nbytes} bytes for {self.name}")[0])

    def unpin(self, address: int) -> None:
        with self.current():
            call("cuMemFreeHost", address, about=f"{address:#x} for {self.name}")

    def write(self, address: int, data: bytes) -> None:
        """A few bytes into device memory; there for every reader when this returns, whatever else the GPU is busy with."""
        stream = Stream(self, apart=True)
        try:
            stream.upload(address, np.frombuffer(data, np.uint8))
            stream.wait()
        finally:
            stream.close()

    def export(self, base: int) -> bytes:
        """The handle of the allocation that begins at `base`. Raises DriverError."""
        with self.current():
            (handle,) = call("cuIpcGetMemHandle", bindings().CUdeviceptr(base), about=f"of {base:#x} on {self.name}")
        return bytes(handle.reserved)

    def open(self, handle: bytes) -> int:
        """Map another process's allocation, on this or another GPU; returns where it begins here. Pair with `shut`."""
        driver = bindings()
        wrapped = driver.CUipcMemHandle()
        wrapped.reserved = handle
        flag = int(driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS)
        with self.current():
            return int(call("cuIpcOpenMemHandle", wrapped, flag, about=f"into {self.name}")[0])

    def shut(self, base: int) -> None:
        with self.current():
            call("cuIpcCloseMemHandle", bindings().CUdeviceptr(base), about=f"{base:#x} on {self.name}")

    def enable_peer(self, other: Device) -> None:
        """Let this GPU read what the other one's context allocates in this process. Stays enabled."""
        with self.current():
            try:
                call("cuCtxEnablePeerAccess", other._context, 0, about=f"{self.name} to {other.name}")
            except DriverError as error:
                if error.code != "CUDA_ERROR_PEER_ACCESS_ALREADY_ENABLED":
                    raise

    def load(self, image: bytes) -> Module:
        with self.current():
            return Module(self, call("cuModuleLoadData", image, about=f"({len(image)} bytes) on {self.name}")[0])


class Module:
    """Kernels loaded into a device's context. They stay for as long as the context does."""

    def __init__(self, device: Device, module: object) -> None:
        self._device, self._module = device, module

    def kernel(self, name: str) -> object:
        with self._device.current():
            return call("cuModuleGetFunction", self._module, name.encode(), about=name)[0]


class Stream:
    """Work in order on one device, and after what is in its legacy default stream unless `apart`. For one thread at a time;
    `close` ends it."""

    def __init__(self, device: Device, *, apart: bool = False) -> None:
        self.device: Final = device
        flag = bindings().CUstream_flags.CU_STREAM_NON_BLOCKING if apart else bindings().CUstream_flags.CU_STREAM_DEFAULT
        with device.current():
            self._stream = call("cuStreamCreate", int(flag), about=f"on {device.name}")[0]

    def launch(self, kernel: object, blocks: int, threads: int, parameters: Sequence[Parameter]) -> None:
        values, types = tuple(value for value, _ in parameters), tuple(kind for _, kind in parameters)
        with self.device.current():
            call(
                "cuLaunchKernel",
                kernel,
                blocks,
                1,
                1,
                threads,
                1,
                1,
                0,
                self._stream,
                (values, types),
                0,
                about=f"of {blocks} blocks on {self.device.name}",
            )

    def upload(self, address: int, data: npt.NDArray[Any]) -> None:
        """Copy a contiguous array to device memory. It may be changed again when this returns."""
        where = f"{data.nbytes} bytes to {address:#x} on {self.device.name}"
        with self.device.current():
            call("cuMemcpyHtoDAsync", bindings().CUdeviceptr(address), data.ctypes.data, data.nbytes, self._stream, about=where)

    def download(self, host: int, address: int, nbytes: int) -> None:
        """Copy device memory to host memory. It is there after the next `wait`."""
        where = f"{nbytes} bytes from {address:#x} on {self.device.name}"
        with self.device.current():
            call("cuMemcpyDtoHAsync", host, bindings().CUdeviceptr(address), nbytes, self._stream, about=where)

    def move(self, dst: int, src: int, nbytes: int) -> None:
        """Copy within device memory, of this and other GPUs, with the copy engines."""
        where = f"{nbytes} bytes from {src:#x} to {dst:#x} on {self.device.name}"
        driver = bindings()
        with self.device.current():
            call("cuMemcpyAsync", driver.CUdeviceptr(dst), driver.CUdeviceptr(src), nbytes, self._stream, about=where)

    def clear(self, address: int, nbytes: int) -> None:
        """Zeros."""
        with self.device.current():
            call("cuMemsetD8Async", bindings().CUdeviceptr(address), 0, nbytes, self._stream, about=f"at {address:#x}")

    def wait(self, deadline: Deadline | None = None, doing: str = "") -> None:
        """Until all work is done. What the GPU has been given can't be taken back: after the deadline this waits on, and then
        raises DeadlineExceeded, so that nothing writes any more when it returns, however it does. Raises DriverError."""
        with self.device.current():
            if deadline is None:
                call("cuStreamSynchronize", self._stream, about=f"on {self.device.name}")
                return
            driver, began = bindings(), time.monotonic()
            while (status := driver.cuStreamQuery(self._stream)[0]) == driver.CUresult.CUDA_ERROR_NOT_READY:
                if deadline.remaining_s == 0:
                    call("cuStreamSynchronize", self._stream, about=f"on {self.device.name}")
                    deadline.check(doing)
                    return
                time.sleep(0 if time.monotonic() - began < BRISK_S else POLL_S)
            if status != driver.CUresult.CUDA_SUCCESS:
                call("cuStreamSynchronize", self._stream, about=f"on {self.device.name}")

    def close(self) -> None:
        with self.device.current():
            call("cuStreamDestroy", self._stream, about=f"on {self.device.name}")


def as_array(address: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """Host memory as an array that owns nothing."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
