"""GPU memory between real processes."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

import numpy as np
import pytest
from gpu_support import needs_gpus

from peerload.config import Config
from peerload.deadline import Deadline
from peerload.errors import DeadlineExceeded, HostError, SourceLost, SourceUnreachable
from peerload.memory.arena import Arena
from peerload.memory.cuda.driver import Device, Stream
from peerload.memory.cuda.share import share
from peerload.memory.region import Region
from peerload.planning.batch import Batch
from peerload.testing.gpu import DeviceArena
from peerload.testing.source_process import SourceProcess, content
from peerload.testing.transport_conformance import Destination, Source, TransportConformance, strided
from peerload.transport.base import Transport
from peerload.transport.cuda_ipc import CudaDescription, CudaIpcTransport
from peerload.transport.descriptions import decode
from peerload.transport.probes import probe
from peerload.transport.registry import open_transport, open_transports

pytestmark = needs_gpus()
GPU = "cuda:0"


class TestOneGpu(TransportConformance):
    """Two processes on one GPU."""

    there = GPU

    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        with SourceProcess("cuda_ipc", nbytes, memory=self.there, registration=registration) as process:
            yield process

    def reader(self) -> Transport:
        return CudaIpcTransport(GPU)

    def destination(self, nbytes: int) -> Destination:
        return DeviceArena(GPU, nbytes)


@needs_gpus(2)
class TestTwoGpus(TestOneGpu):
    there = "cuda:1"


class TestIntoHostMemory(TestOneGpu):
    def destination(self, nbytes: int) -> Destination:
        return Arena(nbytes)


class TestPyTorchAllocates(TestOneGpu):
    there = f"torch {GPU}"

    @contextmanager
    def source(self, nbytes: Sequence[int], registration: str) -> Iterator[Source]:
        # What PyTorch allocates lies in as many blocks as it likes: never in one arena.
        registration = "per-allocation" if registration == "arena" else registration
        with SourceProcess("cuda_ipc", nbytes, memory=self.there, registration=registration) as process:
            yield process

    @pytest.mark.parametrize("row", [0])
    def test_source_bytes_outside_the_regions_are_refused(self, row: int) -> None:
        """One byte before a tensor is another tensor's, or nobody's; the other rows lie inside PyTorch's block."""
        with self.scene("per-tensor", [4096]) as scene, pytest.raises(Exception, match=r"src\["):
            scene.read(strided(scene.source.address[0] - 1, scene.here, 10, [], [], []))


def test_hundreds_of_small_tensors_that_share_blocks_each_keep_their_place() -> None:
    """PyTorch puts tensors below 1 MiB into blocks of 2 MiB: a handle opens at the block, not at the tensor."""
    sizes = [1000 + 7 * i for i in range(400)] + [3 << 20, 1 << 19]
    with ExitStack() as stack:
        memory = stack.enter_context(closing(DeviceArena(GPU, sum(sizes) + 64 * len(sizes))))
        source = stack.enter_context(SourceProcess("cuda_ipc", sizes, memory=f"torch {GPU}", registration="per-tensor"))
        reader = stack.enter_context(closing(CudaIpcTransport(GPU)))
        here = [memory.allocate(n) for n in sizes]
        reader.register([memory.region()])
        told = decode(CudaDescription, source.description, "source")
        assert len(told.base) < len(sizes) / 10, "the tensors don't share blocks: this test shows nothing"
        peer = reader.connect(source.description, "source", Deadline.after(20))
        columns = (np.array(column, np.int64) for column in (source.address, here, sizes))
        reader.read(peer, Batch.of_runs(*columns), Deadline.after(20))
        for i, (address, nbytes) in enumerate(zip(here, sizes, strict=True)):
            assert memory.read(address, nbytes) == content(i, nbytes).tobytes(), f"tensor {i}"


DESCRIBING = """
import sys, torch
from peerload.errors import HostError
from peerload.memory.placing import placed, regions_for
from peerload.transport.cuda_ipc import CudaIpcTransport
tensors = [torch.full((n,), 7, dtype=torch.uint8, device="cuda:0") for n in (1000, 30 << 20)]
transport = CudaIpcTransport("cuda:0")
transport.register(regions_for([placed(t) for t in tensors], sys.argv[1]))
try:
    transport.describe()
except HostError as error:
    print(error)
"""


@pytest.mark.parametrize("registration", ["per-tensor", "per-allocation"])
@pytest.mark.parametrize("allocator", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_memory_that_cant_be_shared_is_refused_by_name(allocator: str, registration: str) -> None:
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": allocator, "PYTORCH_ALLOC_CONF": allocator}
    command = [sys.executable, "-c", DESCRIBING, registration]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "on cuda:0 can't be shared with other processes" in done.stdout
    assert "PYTORCH_CUDA_ALLOC_CONF" in done.stdout


LANDING = """
import base64, sys, torch
import numpy as np
from peerload.planning.batch import Batch
from peerload.deadline import Deadline
from peerload.memory.placing import placed, regions_for
from peerload.transport.cuda_ipc import CudaIpcTransport
address, nbytes = int(sys.argv[2]), int(sys.argv[3])
tensor = torch.zeros(nbytes, dtype=torch.uint8, device="cuda:0")
transport = CudaIpcTransport("cuda:0")
transport.register(regions_for([placed(tensor)], "per-allocation"))
peer = transport.connect(base64.b64decode(sys.argv[1]), "source", Deadline.after(20))
transport.read(peer, Batch.of_runs(*(np.array([x]) for x in (address, tensor.data_ptr(), nbytes))), Deadline.after(20))
print(torch.equal(tensor.cpu(), torch.from_numpy(np.random.default_rng(0).integers(0, 256, nbytes, np.uint8))))
"""


def test_memory_that_cant_be_shared_can_still_be_filled() -> None:
    nbytes = 50 << 20
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    with SourceProcess("cuda_ipc", [nbytes], memory=GPU) as source:
        told = [base64.b64encode(source.description).decode(), str(source.address[0]), str(nbytes)]
        command = [sys.executable, "-c", LANDING, *told]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "True\n", done.stderr


@pytest.mark.parametrize("there", [GPU, pytest.param("cuda:1", marks=needs_gpus(2))])
def test_long_runs_beside_short_ones(there: str) -> None:
    """Long runs go another way (the copy engines) than the rest of their batch."""
    nbytes = 80 << 20
    with ExitStack() as stack:
        source = stack.enter_context(SourceProcess("cuda_ipc", [nbytes], memory=there))
        memory = stack.enter_context(closing(DeviceArena(GPU, nbytes)))
        reader = stack.enter_context(closing(CudaIpcTransport(GPU)))
        here, src = memory.allocate(nbytes, 4096), source.address[0]
        reader.register([memory.region()])
        parts = [
            strided(src + 3, here, (33 << 20) + 1, [], [], []),
            strided(src + (40 << 20), here + (36 << 20), 1000, [500], [2000], [1000]),
            strided(src + (42 << 20), here + (40 << 20), 36 << 20, [], [], []),
            strided(src, here + (78 << 20), 17, [], [], []),
        ]
        batch = Batch.joined(*parts)
        reader.read(reader.connect(source.description, "source", Deadline.after(20)), batch, Deadline.after(20))
        must, held = content(0, nbytes), np.frombuffer(memory.read(here, nbytes), np.uint8)
        expected = np.zeros(nbytes, np.uint8)
        for s, d, n in zip(*batch.runs(), strict=True):
            expected[d - here : d - here + n] = must[s - src : s - src + n]
        assert np.array_equal(held, expected)


def test_within_one_process() -> None:
    with ExitStack() as stack:
        there, here = (stack.enter_context(closing(DeviceArena(GPU, 1 << 20))) for _ in range(2))
        offering, reading = (stack.enter_context(closing(CudaIpcTransport(GPU))) for _ in range(2))
        check_pair(offering, reading, there, here)


@needs_gpus(2)
def test_within_one_process_between_gpus() -> None:
    with ExitStack() as stack:
        there, here = (stack.enter_context(closing(DeviceArena(f"cuda:{n}", 1 << 20))) for n in (1, 0))
        offering, reading = (stack.enter_context(closing(CudaIpcTransport(f"cuda:{n}"))) for n in (1, 0))
        check_pair(offering, reading, there, here)


def check_pair(offering: Transport, reading: Transport, there: DeviceArena, here: DeviceArena) -> None:
    src, dst = there.allocate(100_000), here.allocate(100_000)
    there.write(src, content(5, 100_000).tobytes())
    offering.register([there.region()])
    reading.register([here.region()])
    peer = reading.connect(offering.describe(), "myself", Deadline.after(20))
    reading.read(peer, strided(src, dst, 100_000, [], [], []), Deadline.after(20))
    assert here.read(dst, 100_000) == content(5, 100_000).tobytes()
    offering.close()
    with pytest.raises(SourceLost):
        reading.read(peer, strided(src, dst, 100_000, [], [], []), Deadline.after(20))


@needs_gpus(2)
def test_a_gpu_that_isnt_visible_here_is_named() -> None:
    code = """
import base64, sys
from peerload.deadline import Deadline
from peerload.errors import SourceUnreachable
from peerload.transport.cuda_ipc import CudaIpcTransport
try:
    CudaIpcTransport("cuda:0").connect(base64.b64decode(sys.argv[1]), "source", Deadline.after(20))
except SourceUnreachable as error:
    print(error)
"""
    with SourceProcess("cuda_ipc", [4096], memory=GPU) as source:
        command = [sys.executable, "-c", code, base64.b64encode(source.description).decode()]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert "isn't among the 1 that this process sees" in done.stdout
    assert "CUDA_VISIBLE_DEVICES" in done.stdout


def test_another_host_is_named() -> None:
    with SourceProcess("cuda_ipc", [4096], memory=GPU) as source, closing(CudaIpcTransport(GPU)) as reader:
        elsewhere = source.description.replace(b'"host":"', b'"host":"x')
        with pytest.raises(SourceUnreachable, match="another host"):
            reader.connect(elsewhere, "source", Deadline.after(20))


def test_a_source_that_tells_of_more_memory_than_it_has_is_refused() -> None:
    """A kernel that reads beyond what is mapped would end the reader's CUDA context."""
    with SourceProcess("cuda_ipc", [4 << 20], memory=GPU) as source, closing(CudaIpcTransport(GPU)) as reader:
        told = json.loads(source.description)
        told["size"] = [1 << 40]
        told["nbytes"] = [(1 << 40) - (told["address"][0] - told["base"][0])]
        with pytest.raises(SourceUnreachable, match="told of 1099511627776 bytes"):
            reader.connect(json.dumps(told).encode(), "source", Deadline.after(20))


def test_memory_of_a_dead_source_stays_mapped_until_its_reader_closes() -> None:
    """Reading it would not crash; the transport refuses because nobody vouches for it."""
    nbytes = 4 << 20
    with ExitStack() as stack:
        source = stack.enter_context(SourceProcess("cuda_ipc", [nbytes], memory=GPU))
        told = decode(CudaDescription, source.description, "source")
        device = Device(GPU)
        stack.callback(device.close)
        base = device.open(bytes.fromhex(told.handle[0]))
        source.kill()
        stream, found = Stream(device), np.zeros(nbytes, np.uint8)
        stack.callback(stream.close)
        stream.download(found.ctypes.data, base + source.address[0] - told.base[0], nbytes)
        stream.wait()
        assert np.array_equal(found, content(0, nbytes))
        device.shut(base)


def test_freed_memory_is_forgotten_and_what_is_left_described() -> None:
    with closing(CudaIpcTransport(GPU)) as transport, closing(DeviceArena(GPU, 4 << 20)) as kept:
        kept.allocate(1 << 20)
        gone = DeviceArena(GPU, 4 << 20)
        gone.allocate(1 << 20)
        transport.register([kept.region(), gone.region()])
        assert len(decode(CudaDescription, transport.describe(), "self").address) == 2
        gone.close()
        assert decode(CudaDescription, transport.describe(), "self").address == (kept.address,)


def test_a_region_of_no_device_memory_is_refused() -> None:
    with closing(CudaIpcTransport(GPU)) as transport, Arena(4096) as host:
        with pytest.raises(HostError, match="cuMemGetAddressRange"):
            transport.register([Region(host.address, 4096, GPU)])
        with pytest.raises(HostError, match="not cuda:7"):
            transport.register([Region(host.address, 4096, "cuda:7")])
    with pytest.raises(HostError, match="cuda:99"):
        CudaIpcTransport("cuda:99")


def test_a_deadline_in_the_middle_leaves_nobody_writing() -> None:
    """When DeadlineExceeded has been raised, memory doesn't change any more."""
    nbytes = 1 << 30
    with ExitStack() as stack:
        source = stack.enter_context(SourceProcess("cuda_ipc", [nbytes], memory=GPU))
        memory = stack.enter_context(closing(DeviceArena(GPU, nbytes)))
        reader = stack.enter_context(closing(CudaIpcTransport(GPU)))
        here = memory.allocate(nbytes)
        reader.register([memory.region()])
        peer = reader.connect(source.description, "source", Deadline.after(20))
        ticks = iter(range(1_000_000))
        deadline = Deadline(at_s=3.0, clock=lambda: float(next(ticks)))
        with pytest.raises(DeadlineExceeded):
            reader.read(peer, strided(source.address[0] + 1, here, nbytes - 1, [], [], []), deadline)
        before = memory.read(here, nbytes)
        assert memory.read(here, nbytes) == before


def test_the_registry_gives_a_gpu_what_it_needs() -> None:
    share(GPU)
    assert probe("cuda_ipc").available
    opened = open_transports(Config(), GPU)
    assert list(opened) == ["cuda_ipc", "files"]
    for transport in opened.values():
        transport.close()
    open_transport("files", Config(), GPU).close()
