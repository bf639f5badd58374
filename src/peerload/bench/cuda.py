"""GPU memory between processes of one host: transport cuda_ipc as a share of the driver's own peer copy, and the digest as a
share of what the memory can be read with. Needs a GPU; with two, also between them.

    peerload bench cuda -- [--gib 4] [--rounds 7]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import numpy as np

from ..config import Config
from ..deadline import Deadline
from ..memory.cuda import driver
from ..memory.cuda.driver import Device, Stream
from ..memory.cuda.kernels import Kernels, compiled
from ..memory.cuda.mover import Pinned
from ..memory.gpu import CudaSpace
from ..memory.region import Region
from ..memory.space import space_on
from ..model.catalog import Catalog, TensorSpec
from ..planning.batch import Batch
from ..testing.gpu import DeviceArena, why_not
from ..testing.source_process import SourceProcess
from ..transport.base import Transport
from ..transport.cuda_ipc import CudaIpcTransport
from ..transport.registry import open_transport

GPU = "cuda:0"


def timed(work: Callable[[], object], rounds: int) -> float:
    """Median seconds; once more to warm up."""
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def one_copy(src: int, dst: int, run: int, count: int = 1, src_step: int = 0, dst_step: int = 0) -> Batch:
    one = np.ones(1, np.int64)
    return Batch(
        src * one, dst * one, run * one, np.array([[1, 1, count]]), np.array([[0, 0, src_step]]), np.array([[0, 0, dst_step]])
    )


def shapes(src: int, dst: int, nbytes: int) -> dict[str, Batch]:
    """The patterns of a model's weights."""
    rng = np.random.default_rng(0)
    mib = np.arange(nbytes >> 20, dtype=np.int64) << 20
    pages = min(100_000, nbytes // 4096)
    there = rng.permutation(nbytes // 4096)[:pages].astype(np.int64) * 4096
    here = rng.permutation(nbytes // 4096)[:pages].astype(np.int64) * 4096
    return {
        "one block": one_copy(src, dst, nbytes),
        "tensors of 1 MiB": Batch.of_runs(src + rng.permutation(mib), dst + mib, np.full(len(mib), 1 << 20)),
        "100,000 pages of 4 KiB": Batch.of_runs(src + there, dst + here, np.full(pages, 4096)),
        "halves of 8 KiB rows": one_copy(src, dst, 4096, nbytes // 8192, 8192, 4096),
        "halves of 512 B rows": one_copy(src, dst, 256, nbytes // 512, 512, 256),
        "one block, odd by one byte": one_copy(src + 1, dst, nbytes // 2),
    }


def parts(transport: Transport, batch: Batch) -> list[Batch]:
    """Batches as lowering would hand them out."""
    rows, _ = batch.cut(transport.limits.max_batch_nbytes)
    size = rows.run * rows.count.prod(axis=1)
    group = (np.cumsum(size) - size) // transport.limits.max_batch_nbytes
    edges = [0, *(1 + np.flatnonzero(np.diff(group))).tolist(), len(rows)]
    return [rows.take(slice(begin, end)) for begin, end in itertools.pairwise(edges)]


def read(transport: Transport, peer: str, batches: list[Batch]) -> None:
    for batch in batches:
        transport.read(peer, batch, Deadline.after(60))


def between(there: str, nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of the driver's copy in this process, of the same out of another process's memory, and of the transport."""
    found: dict[str, float] = {}
    with ExitStack() as stack:
        here = stack.enter_context(closing(DeviceArena(GPU, nbytes)))
        ours = stack.enter_context(closing(DeviceArena(there, nbytes)))
        device, other = Device(GPU), Device(there)
        stack.callback(device.close)
        stack.callback(other.close)
        if there != GPU:
            device.enable_peer(other)
        stream = Stream(device)
        stack.callback(stream.close)
        dst, src = here.allocate(nbytes, 4096), ours.allocate(nbytes, 4096)

        def raw(address: int) -> None:
            stream.move(dst, address, nbytes)
            stream.wait()

        found["driver's copy, one process"] = nbytes / timed(lambda: raw(src), rounds) / 1e9
        ours.close()
        source = stack.enter_context(SourceProcess("cuda_ipc", [nbytes], memory=there, random=False))
        transport = stack.enter_context(closing(CudaIpcTransport(GPU)))
        transport.register([here.region()])
        began = time.perf_counter()
        peer = transport.connect(source.description, "source", Deadline.after(20))
        found["connect, ms"] = 1e3 * (time.perf_counter() - began)
        shift = int(transport._peers[peer].shift[0])
        found["driver's copy, two processes"] = nbytes / timed(lambda: raw(source.address[0] + shift), rounds) / 1e9
        for name, batch in shapes(source.address[0], dst, nbytes).items():
            found[name] = batch.nbytes / timed(partial(read, transport, peer, parts(transport, batch)), rounds) / 1e9
        found |= whole_load(transport, peer, source.address[0], dst, nbytes, rounds)
        landing = np.empty(16, np.uint8)
        transport.register([Region(landing.ctypes.data, landing.nbytes)])
        fence = [one_copy(source.address[0], landing.ctypes.data, 16)]
        found["16 bytes to the host, ms"] = 1e3 * timed(lambda: read(transport, peer, fence), rounds)
        small = [one_copy(source.address[0], dst, 4096)]
        found["a batch of 4 KiB, ms"] = 1e3 * timed(lambda: read(transport, peer, small), rounds)
    return found


def whole_load(transport: CudaIpcTransport, peer: str, src: int, dst: int, nbytes: int, rounds: int) -> dict[str, float]:
    """Reading and hashing 50,000 tensors, most of them scales and norms: milliseconds, and those outside the kernels."""
    space, count = CudaSpace(GPU), 50_000
    kinds = [64, 2048, 8192, nbytes // (count * 2) // 256 * 256]
    elements = np.random.default_rng(0).choice(kinds, count, p=[0.5, 0.2, 0.1, 0.2])
    catalog = Catalog.of(TensorSpec(f"model.layers.{i}.weight", "BF16", (n,)) for i, n in enumerate(elements.tolist()))
    size = 2 * elements
    room = -(-size // 256) * 256
    at = np.cumsum(room) - room
    at = at[at + size <= nbytes]
    batches, n = parts(transport, Batch.of_runs(src + at, dst + at, size[: len(at)])), len(at)
    column = np.zeros((n, 1), np.int64)
    boxes = (np.arange(n), column, column + elements[:n, None], dst + at, column + 2)
    found: dict[str, float] = {}
    steps: dict[str, tuple[Kernels, Callable[[], object]]] = {
        "read": (transport._mover._kernels(), lambda: read(transport, peer, batches)),
        "hashed": (space._mover._kernels(), lambda: space.digest(catalog, *boxes, 0)),
    }
    for name, (kernels, work) in steps.items():
        found[f"{n} tensors {name}, ms"] = 1e3 * timed(work, rounds)
        found[f"  outside the kernels, {name}, ms"] = found[f"{n} tensors {name}, ms"] - 1e3 * on_the_gpu(kernels, work)
    return found


def on_the_gpu(kernels: Kernels, work: Callable[[], object]) -> float:
    """Seconds that the launches of `work` take on the GPU."""
    plain, marks = kernels._launch, []

    def launch(stream: Stream, *args: Any) -> None:  # noqa: ANN401 - as they are handed over
        with stream.device.current():
            begin, end = (driver.call("cuEventCreate", 0)[0] for _ in range(2))
            driver.call("cuEventRecord", begin, stream._stream)
            plain(stream, *args)
            driver.call("cuEventRecord", end, stream._stream)
            marks.append((begin, end))

    kernels._launch = launch  # type: ignore[method-assign, assignment]
    try:
        work()
    finally:
        kernels._launch = plain  # type: ignore[method-assign]
    return sum(float(driver.call("cuEventElapsedTime", *pair)[0]) for pair in marks) / 1e3


def digests(nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of weights hashed, beside the driver's copy within the GPU (which reads and writes each byte)."""
    space, found = space_on(GPU), {}
    with ExitStack() as stack:
        memory = stack.enter_context(closing(DeviceArena(GPU, 2 * nbytes)))
        device = Device(GPU)
        stack.callback(device.close)
        stream = Stream(device)
        stack.callback(stream.close)
        at, to = memory.allocate(nbytes, 4096), memory.allocate(nbytes, 4096)
        noise = np.random.default_rng(0).integers(0, 256, 1 << 26, np.uint8)
        for begin in range(0, nbytes, noise.size):
            memory.write(at + begin, noise.tobytes())

        def raw() -> None:
            stream.move(to, at, nbytes)
            stream.wait()

        found["driver's copy, bytes read and written"] = 2 * nbytes / timed(raw, rounds) / 1e9
        columns = 8192
        rows = nbytes // columns // 2
        whole, zero = np.array([[rows, columns]]), np.zeros((1, 2), np.int64)

        def rate(catalog: Catalog, start: np.ndarray, stop: np.ndarray, address: np.ndarray, stride: np.ndarray) -> float:
            tensor = np.arange(len(catalog)) if len(start) > 1 else np.zeros(1, np.int64)
            size = int(((stop - start).prod(axis=1) * catalog.itemsize[tensor]).sum())
            return size / timed(lambda: space.digest(catalog, tensor, start, stop, address, stride, 0), rounds) / 1e9

        narrow = Catalog.of([TensorSpec("w", "F8_E4M3", (rows, columns - 1024))])
        one, base = np.zeros((1, 2), np.int64), np.array([at])
        bf16, fp8 = (
            Catalog.of([TensorSpec("w", "BF16", (rows, columns))]),
            Catalog.of([TensorSpec("w", "F8_E4M3", (rows, columns))]),
        )
        dense = np.array([[2 * columns, 2]])
        found["dense BF16"] = rate(bf16, zero, whole, base, dense)
        half = np.array([[rows, columns // 2]])
        found["row-parallel half of it, 8 KiB of each row"] = rate(bf16, one, half, base, dense)
        thin = np.array([[rows, 128]])
        found["256 B of each row"] = rate(bf16, one, thin, base, dense)
        found["dense BF16 at an odd address"] = rate(bf16, zero, np.array([[rows - 1, columns]]), base + 2, dense)
        found["transposed FP8"] = rate(fp8, zero, whole, base, np.array([[1, rows]]))
        found["transposed BF16"] = rate(bf16, zero, whole, base, np.array([[2, 2 * rows]]))
        found["transposed FP8, a row of 7,168"] = rate(narrow, zero, whole - [[0, 1024]], base, np.array([[1, rows]]))
        many = nbytes // (1 << 20)
        catalog = Catalog.of(TensorSpec(f"w{i}", "BF16", (512, 1024)) for i in range(many))
        stop = np.tile([512, 1024], (many, 1))
        found["tensors of 1 MiB"] = rate(
            catalog, np.zeros_like(stop), stop, at + (np.arange(many) << 20), np.tile([2048, 2], (many, 1))
        )
        count = 100_000
        small = Catalog.of(TensorSpec(f"s{i}", "F32", (64,)) for i in range(count))
        column, row = np.zeros((count, 1), np.int64), np.arange(count)
        boxes = (row, column, column + 64, at + row * 256, column + 4)
        seconds = timed(lambda: space.digest(small, *boxes, 0), rounds)
        found["100,000 pieces of 256 bytes, ms"] = 1e3 * seconds
    return found


def through_the_host(nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s from pinned memory by the copy engine and by the kernel, and from pageable memory."""
    space, found = space_on(GPU), {}
    with ExitStack() as stack:
        memory = stack.enter_context(closing(DeviceArena(GPU, nbytes)))
        device = Device(GPU)
        stack.callback(device.close)
        stream = Stream(device)
        stack.callback(stream.close)
        pinned = Pinned(device, nbytes)
        stack.callback(pinned.close)
        to = memory.allocate(nbytes, 4096)
        ours = driver.as_array(pinned.address, nbytes)
        ours[:] = 7

        def engine() -> None:
            stream.upload(to, ours)
            stream.wait()

        found["pinned, copy engine"] = nbytes / timed(engine, rounds) / 1e9
        batch = one_copy(pinned.address, to, nbytes)
        found["pinned, kernel"] = nbytes / timed(lambda: space.copy(batch), rounds) / 1e9
        pageable = np.full(nbytes, 7, np.uint8)
        batch_2 = one_copy(pageable.ctypes.data, to, nbytes)
        found["pageable"] = nbytes / timed(lambda: space.copy(batch_2), rounds) / 1e9
        began = time.perf_counter()
        open_transport("files", Config(), GPU).close()
        found["opening files with its landing, ms"] = 1e3 * (time.perf_counter() - began)
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--gib", type=float, default=4.0)
    options.add_argument("--rounds", type=int, default=7)
    told = options.parse_args()
    if why_not():
        print(f"no benchmark: {why_not()}", file=sys.stderr)
        return 1
    nbytes = int(told.gib * (1 << 30))
    device = Device(GPU)
    began = time.perf_counter()
    compiled(*device.capability)
    result: dict[str, object] = {
        "bench": "cuda",
        "gpu": device.model,
        "gpus": driver.count(),
        "nbytes": nbytes,
        "compile_s": round(time.perf_counter() - began, 3),
    }
    tables: dict[str, Callable[[], dict[str, float]]] = {"within one GPU": lambda: between(GPU, nbytes, told.rounds)}
    if not why_not(2):
        tables["between two GPUs"] = lambda: between("cuda:1", nbytes, told.rounds)
    tables["digest"] = lambda: digests(nbytes, told.rounds)
    tables["through the host"] = lambda: through_the_host(min(nbytes, 1 << 30), told.rounds)
    for name, table in tables.items():
        rows = {what: round(value, 2) for what, value in table().items()}
        result[name] = rows
        print(f"-- {name}, GB/s unless it says otherwise")
        for what, value in rows.items():
            print(f"{what:45} {value:10.2f}", flush=True)
    device.close()
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
