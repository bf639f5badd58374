"""GPU memory between processes of one host: the reader maps the source's allocations and copies out of them.

The driver exports allocations, not tensors: a handle stands for a whole block and opens at the block's first byte, wherever
in it the registered memory lies. So a description carries blocks with their handles and regions with their addresses, and an
address of the source becomes ours by the distance between the two places of its block.

A mapped block stays as it was after its owner has freed it or died, until the reader closes it (seen with driver 580; the owner
doesn't get that memory again meanwhile). Nobody vouches for it then: that the owner lives is known from a connection to it, as
with transport local, and that its weights are still those from the fence.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Annotated, Final

import numpy as np

from ..deadline import Deadline
from ..errors import HostError, PlanError, SourceLost, SourceUnreachable
from ..memory.cuda.driver import HANDLE_NBYTES, Block, Device, DriverError, count, reaches, uuid
from ..memory.cuda.mover import Mover, packed, portions
from ..memory.cuda.tables import Lane
from ..memory.region import Region
from ..model.boxes import IntArray
from ..native.columns import Columns
from ..planning.batch import Batch
from .alive import Liveness
from .base import Limits
from .descriptions import Process, check_ranges, check_rows, column, decode, encode, text, whole
from .descriptors import Handover
from .process import boot_id, pid_namespace, start_time
from .regions import RegionTable

#: Bytes that go to host memory (a fence, staged scales) pass through device memory of this size.
TO_HOST_NBYTES: Final = 4 << 20
#: So many runs are sooner copied to host memory one by one.
FEW: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaDescription(Process):
    """What `CudaIpcTransport.describe` says. address, nbytes, block are columns of regions, `block` being the row of the block
    that a region lies in; base, size, handle (hexadecimal) are columns of blocks, all of GPU `gpu`."""

    gpu: Annotated[str, text(r"[!-~]{1,64}")]
    address: Annotated[Sequence[int], column(whole(1))]
    nbytes: Annotated[Sequence[int], column(whole(1))]
    block: Annotated[Sequence[int], column(whole())]
    base: Annotated[Sequence[int], column(whole(1))]
    size: Annotated[Sequence[int], column(whole(1))]
    handle: Annotated[Sequence[str], column(text(rf"[0-9a-f]{{{2 * HANDLE_NBYTES}}}"))]

    def __post_init__(self) -> None:
        check_rows(address=self.address, nbytes=self.nbytes, block=self.block)
        check_rows(base=self.base, size=self.size, handle=self.handle)
        check_ranges("base", self.base, self.size)
        address, nbytes, row = (np.array(column, np.int64) for column in (self.address, self.nbytes, self.block))
        base, size = np.array(self.base, np.int64), np.array(self.size, np.int64)
        if (row >= len(base)).any():
            raise ValueError("address has regions in blocks that aren't there")
        if (address < base[row]).any() or (nbytes > size[row]).any() or (address - base[row] > size[row] - nbytes).any():
            raise ValueError("address has regions outside their blocks")


class CudaIpcTransport:
    """device: the GPU whose memory is offered and filled, "cuda:N". Destinations may also lie in host memory, for small things.
    Keeps the primary context until closed. Raises HostError for a GPU it can't use."""

    name = "cuda_ipc"
    #: One launch takes copies of any shape. A batch costs 0.2 ms of its own, in which 70 MB could move between GPUs.
    limits = Limits(strided=True, operation_nbytes=4096, max_batch_nbytes=8 << 30, same_host=True, pins=True)

    def __init__(self, device: str) -> None:
        self._device = Device(device)
        try:
            self._mover = Mover(self._device)
        except BaseException:
            self._device.close()
            raise
        self._idle = threading.Condition()
        self._jobs = 0
        self._regions: dict[tuple[int, int], Region] = {}
        self._table, self._on_device = RegionTable([], []), np.zeros(0, np.bool_)
        self._handover: Handover | None = None
        self._peers: dict[str, _CudaPeer] = {}
        self._connected = 0
        self._closed = False

    def register(self, regions: Sequence[Region]) -> None:
        """Waits for what the process has asked of the GPU, so that nothing asked before writes to the regions later. Device
        memory that is freed afterwards is forgotten."""
        for region in regions:
            if region.device not in ("cpu", self._device.name):
                raise HostError(f"this transport serves {self._device.name} and host memory, not {region.device}")
            if region.address < 1 or region.nbytes < 1:
                raise HostError(f"a region of {region.nbytes} bytes at {region.address:#x} can't be registered")
            if region.device != "cpu":
                self._device.block(region.address)
        with self._idle:
            self._check_open()
            self._regions.update({(r.address, r.nbytes): r for r in regions})
            rows = list(self._regions.values())
            self._table = RegionTable([r.address for r in rows], [r.nbytes for r in rows])
            self._on_device = np.array([r.device != "cpu" for r in rows], np.bool_)
        self._device.synchronize()

    def describe(self) -> bytes:
        """Raises HostError, naming the region, for device memory that can't be shared with other processes."""
        with self._idle:
            self._check_open()
            if self._handover is None:
                self._handover = Handover(dict)
            gone = [k for k, r in self._regions.items() if r.device != "cpu" and not self._device.holds(r.address)]
            for key in gone:
                del self._regions[key]
            rows = sorted((r for r in self._regions.values() if r.device != "cpu"), key=lambda r: r.address)
        blocks: list[Block] = []
        of: list[int] = []
        for region in rows:
            if not blocks or not blocks[-1].contains(region.address, region.nbytes):
                blocks.append(self._block_of(region))
            of.append(len(blocks) - 1)
        return encode(
            CudaDescription(
                host=boot_id(),
                pid_namespace=pid_namespace(),
                pid=os.getpid(),
                start_time=start_time(os.getpid()),
                socket=self._handover.address,
                token=self._handover.token,
                gpu=uuid(self._device.number),
                address=[r.address for r in rows],
                nbytes=[r.nbytes for r in rows],
                block=of,
                base=[b.address for b in blocks],
                size=[b.nbytes for b in blocks],
                handle=[self._exported(b) for b in blocks],
            )
        )

    def connect(self, description: bytes, source: str, deadline: Deadline) -> str:
        told = decode(CudaDescription, description, source)
        try:
            peer = _CudaPeer(told, source, self._device, deadline)
        except HostError as error:  # the driver's, about memory or a GPU that the source named
            raise SourceUnreachable(source, error.message, next_step=error.next_step) from error
        with self._idle:
            if not self._closed:
                self._connected += 1
                handle = f"{source}#{self._connected}"
                self._peers[handle] = peer
                return handle
        peer.close()
        raise HostError("the transport is closed")

    def read(self, peer: str, batch: Batch, deadline: Deadline) -> None:
        """Before anything moves, raises PlanError for destinations outside our regions and SourceLost for sources outside those
        of the peer."""
        with self._idle:
            self._check_open()
            there, here, on_device = self._peers.get(peer), self._table, self._on_device
            self._jobs += 1
        try:
            if there is None:
                raise PlanError(f"there is no peer {peer!r}")
            ours = here.locate(batch)
            region = there.table.locate_sources(batch, there.source)
            there.live.check()
            self._move(
                replace(batch, src=batch.src + there.shift[region]),
                on_device[ours],
                deadline,
                there.source,
            )
            there.live.check()
        finally:
            with self._idle:
                self._jobs -= 1
                self._idle.notify_all()

    def close(self) -> None:
        with self._idle:
            if self._closed:
                return
            self._closed = True
            self._idle.wait_for(lambda: self._jobs == 0)
            peers, self._peers = self._peers, {}
            handover, self._handover = self._handover, None
        if handover is not None:
            handover.close()
        for peer in peers.values():
            peer.close()
        self._mover.close()
        self._device.close()

    def _move(self, batch: Batch, on_device: np.ndarray[tuple[int], np.dtype[np.bool_]], deadline: Deadline, source: str) -> None:
        """`batch`, whose addresses are all ours."""
        doing = f"reading {len(batch)} copies from {source}"
        try:
            with self._mover.lane() as lane:
                if on_device.all():
                    self._mover.copy(lane, batch, deadline, doing)
                    return
                self._mover.copy(lane, batch.take(np.flatnonzero(on_device)), deadline, doing)
                self._to_host(lane, batch.take(np.flatnonzero(~on_device)), deadline, doing)
        except DriverError as error:
            if error.code == "CUDA_ERROR_OUT_OF_MEMORY":  # ours, for tables
                raise
            raise SourceLost(source, f"its memory can't be read: {error.message}") from error

    def _to_host(self, lane: Lane, batch: Batch, deadline: Deadline, doing: str) -> None:
        """A few runs one by one; else packed on the device, carried over in one piece, and spread here."""
        if len(batch) <= FEW and (batch.count == 1).all():
            deadline.check(doing)
            for src, dst, run in zip(batch.src.tolist(), batch.dst.tolist(), batch.run.tolist(), strict=True):
                lane.stream.download(dst, src, run)
            lane.stream.wait(deadline, doing)
            return
        room = min(TO_HOST_NBYTES, int((-(-batch.sizes // 16) * 16).sum()))
        if room == 0:
            return
        device, host = self._device.allocate(room), np.empty(room, np.uint8)
        try:
            for part in portions(batch, room):
                gather, scatter, nbytes = packed(part, device)
                self._mover.copy(lane, gather, deadline, doing)
                lane.stream.download(host.ctypes.data, device, nbytes)
                lane.stream.wait(deadline, doing)
                spread = replace(scatter, src=scatter.src - device + host.ctypes.data)
                Columns(spread).copy(0, len(spread))
        finally:
            lane.stream.wait()
            self._device.free(device)

    def _block_of(self, region: Region) -> Block:
        """The allocation that a region lies in as a whole. Raises HostError if there is none, or if it can't be exported."""
        where = f"{region.nbytes} bytes at {region.address:#x} on {region.device}"
        found = self._device.block(region.address)
        if not found.exportable:
            raise HostError(
                f"{where} can't be shared with other processes: they weren't allocated with cudaMalloc", next_step=_EXPORTABLE
            )
        if not found.contains(region.address, region.nbytes):
            raise HostError(
                f"{where} reach beyond the allocation of {found.nbytes} bytes at {found.address:#x}",
                next_step="register allocations apart (registration=per-allocation)",
            )
        return found

    def _exported(self, block: Block) -> str:
        try:
            return self._device.export(block.address).hex()
        except DriverError as error:
            raise HostError(
                f"{block.nbytes} bytes at {block.address:#x} on {self._device.name} can't be shared: {error.message}",
                next_step=_EXPORTABLE,
            ) from error

    def _check_open(self) -> None:
        if self._closed:
            raise HostError("the transport is closed")


_EXPORTABLE: Final = (
    "let PyTorch allocate weights with cudaMalloc: no expandable_segments:True and no backend:cudaMallocAsync in "
    "PYTORCH_CUDA_ALLOC_CONF (PYTORCH_ALLOC_CONF), no memory pools made with cuMemCreate (vLLM's sleep mode)"
)


class _CudaPeer:
    """A source whose blocks are mapped here. SourceUnreachable says why not."""

    def __init__(self, told: CudaDescription, source: str, device: Device, deadline: Deadline) -> None:
        self.source: Final = source
        self.table: Final = RegionTable(told.address, told.nbytes)
        self.shift: IntArray = np.zeros(len(told.address), np.int64)  # by region: from its address there to its address here
        with ExitStack() as stack:
            self.live = Liveness(told, source, deadline)
            stack.callback(self.live.close)
            number = _owner(told, source, device)
            if self.live.pid != os.getpid():
                base = [
                    self._opened(device, handle, size, number, stack) for handle, size in zip(told.handle, told.size, strict=True)
                ]
                row = np.array(told.block, np.int64)
                self.shift = (np.array(base, np.int64) - np.array(told.base, np.int64))[row]
            elif number != device.number:
                other = Device(f"cuda:{number}")
                stack.callback(other.close)
                device.enable_peer(other)
            self._stack = stack.pop_all()

    def _opened(self, device: Device, handle: str, nbytes: int, number: int, stack: ExitStack) -> int:
        try:
            address = device.open(bytes.fromhex(handle))
        except DriverError as error:
            raise SourceUnreachable(
                self.source,
                f"its memory on cuda:{number} can't be mapped into {device.name}: {error.message}",
                next_step="run `peerload doctor` on this host; containers have to share the IPC and process namespaces",
            ) from error
        stack.callback(device.shut, address)
        mapped = device.block(address)
        if not mapped.contains(address, nbytes):  # a read beyond it would end this process's context
            raise SourceUnreachable(self.source, f"told of {nbytes} bytes where its memory on cuda:{number} has {mapped.nbytes}")
        return address

    def close(self) -> None:
        """Unmap. The caller vouches that nobody reads."""
        self._stack.close()


def _owner(told: CudaDescription, source: str, device: Device) -> int:
    """The source's GPU as this process counts; one that ours can read."""
    here = count()
    for number in range(here):
        if uuid(number) == told.gpu:
            if not reaches(device.number, number):
                raise SourceUnreachable(
                    source,
                    f"its memory is on cuda:{number}, which {device.name} can't read directly",
                    next_step="see `nvidia-smi topo -p2p r`; virtual machines may have peer access switched off",
                )
            return number
    raise SourceUnreachable(
        source,
        f"its GPU {told.gpu} isn't among the {here} that this process sees",
        next_step="let both processes see both GPUs (CUDA_VISIBLE_DEVICES), each its own one first",
    )
