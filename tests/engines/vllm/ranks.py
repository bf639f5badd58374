"""Instances of vLLM's model, loader and post-processing without its scheduler, a forked process for each rank, with stand-ins for
what only a GPU has.

For block-FP8 the kernel choice of a Hopper GPU with DeepGEMM, whose transform of 128 x 128 scales returns them as they are; for
FP8 per tensor the kernel that quantizes, in torch."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from peerload.config import Config
from peerload.engines.recipes import RECIPES
from peerload.engines.vllm import offline as engine
from peerload.engines.worker import Identity, Launch, NotFollowed, Worker
from peerload.model.catalog import Parallel
from peerload.tracing.reachable import reachable_tensors

FORK = multiprocessing.get_context("fork")
#: A rank that takes longer than this hangs, seconds.
PATIENCE_S = 240.0
#: Copies of the small tensors that post-processing replaces; no weight of a test's model fits.
RETAIN_NBYTES = 4096


@dataclass
class Outcome:
    """What a rank has come to: sha256 of every tensor by path, where its bytes came from, why vLLM has loaded it from disk, the
    names of R that it took, what it said."""

    sha256: dict[str, str]
    sources: set[str] = field(default_factory=set)
    reason: str = ""
    log: str = ""


class Ranks:
    """An instance, started by `with`; its ranks load at once. sabotage: called in every process before it begins."""

    def __init__(
        self, directory: Path, parallel: Parallel, url: str, sabotage: Callable[[], object] | None = None, **config: object
    ) -> None:
        """url: of a coordinator; empty: vLLM loads from disk by itself. Seeds copy scales only."""
        number = uuid.uuid4().hex
        launch = Launch(f"tp{parallel.tp}-{number[:8]}", number)
        told = Config(url=url, deadline_s=120.0, retain_bytes=RETAIN_NBYTES, **config) if url else None  # type: ignore[arg-type]
        self._ranks: list[tuple[multiprocessing.context.ForkProcess, Connection]] = []
        for rank in range(parallel.tp):
            ours, theirs = FORK.Pipe()
            identity = Identity(engine.VERSION, launch, parallel, rank, parallel.tp)
            process = FORK.Process(target=_run, args=(theirs, directory, identity, told, sabotage), daemon=True)
            self._ranks.append((process, ours))

    def __enter__(self) -> Ranks:
        for process, _ in self._ranks:
            process.start()
        return self

    def outcomes(self) -> list[Outcome]:
        """[ranks], once all have loaded; they are seeds from then on."""
        found = []
        for process, pipe in self._ranks:
            assert pipe.poll(PATIENCE_S), "a rank hangs"
            found.append(pipe.recv())
            assert isinstance(found[-1], Outcome), found[-1]
            assert process.is_alive()
        return found

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process, pipe in self._ranks:
            if process.is_alive():
                pipe.send("end")
                process.join(20)
                process.kill()
                process.join()


def _run(
    pipe: Connection, directory: Path, identity: Identity, config: Config | None, sabotage: Callable[[], object] | None
) -> None:
    torch.set_num_threads(1)
    try:
        stand_in()
        if sabotage is not None:
            sabotage()
        outcome, worker = _loaded(directory, identity, config)
        pipe.send(outcome)
        pipe.recv()
        if worker is not None:
            worker.close()
    except BaseException as error:
        pipe.send(repr(error))
        raise


def _loaded(directory: Path, identity: Identity, config: Config | None) -> tuple[Outcome, Worker | None]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("peerload").addHandler(handler)
    logging.getLogger("peerload").setLevel(logging.DEBUG)
    with engine.rank_of(directory, identity.parallel, identity.rank) as vllm:
        reason = ""
        if config is not None:
            model = engine.build(vllm, "cpu")
            worker = Worker(identity, config, lambda: directory, engine_loader=engine.load_weights, recipes=RECIPES)
            try:
                receipt = worker.load(model)
                engine.postprocess(model, vllm)
                worker.settle(model)
                worker.serve(model)
            except NotFollowed as error:
                reason = error.message
            else:
                sources = {"disk" if name.startswith("disk:") else "peer" for name in receipt.sources}
                sources |= {"engine"} if receipt.left else set()
                return Outcome(_sha256(model), sources, log="\n".join(said)), worker
        model = engine.build(vllm, "cpu")
        engine.load_weights(model, load_file(directory / "model.safetensors").items())
        engine.postprocess(model, vllm)
        return Outcome(_sha256(model), {"disk"}, reason, "\n".join(said)), None


def _sha256(model: nn.Module) -> dict[str, str]:
    """Handles of oneDNN are addresses."""
    tensors = reachable_tensors(model).items()
    return {path: _sha256_of(t) for path, t in tensors if not t.is_meta and "handler_tensor" not in path}


def _sha256_of(tensor: Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    form = f"{tuple(tensor.shape)} {tensor.stride()} {tensor.dtype} ".encode()
    return hashlib.sha256(form + flat.numpy().tobytes()).hexdigest()


def stand_in() -> None:
    """In this process, for good."""
    import vllm._custom_ops as ops
    import vllm.model_executor.kernels.linear as linear
    import vllm.model_executor.kernels.linear.scaled_mm.deep_gemm as gemm
    import vllm.model_executor.layers.fused_moe.oracle.fp8 as oracle
    import vllm.model_executor.layers.quantization.fp8 as fp8
    import vllm.model_executor.layers.quantization.utils.fp8_utils as utils

    torch._dynamo.config.disable = True
    ops.scaled_fp8_quant = _quantized
    ops._supports_onednn = False  # which packs weights out of sight, and frees them
    gemm.is_deep_gemm_supported = gemm.is_deep_gemm_e8m0_used = utils.is_deep_gemm_e8m0_used = lambda: True
    utils.transform_sf_into_required_layout = lambda sf, **_: sf
    kernel = gemm.DeepGemmFp8BlockScaledMMKernel
    kernel.is_supported = kernel.can_implement = classmethod(lambda *_: (True, None))
    for platform in list(linear._POSSIBLE_FP8_BLOCK_KERNELS):
        linear._POSSIBLE_FP8_BLOCK_KERNELS[platform] = [kernel]
    backend = oracle.Fp8MoeBackend.TRITON
    fp8.convert_to_fp8_moe_kernel_format = _of_triton(oracle.convert_to_fp8_moe_kernel_format, backend)
    fp8.make_fp8_moe_kernel = lambda **_: None
    fp8.select_fp8_moe_backend = lambda **_: (backend, object)


def _of_triton(convert: Callable[..., object], backend: object) -> Callable[..., object]:
    def converted(fp8_backend: object = None, **more: object) -> object:
        del fp8_backend
        return convert(fp8_backend=backend, **more)

    return converted


def _quantized(values: Tensor, scale: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return (values.float() * (1.0 / scale.float())).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale


class Directory:
    """A coordinator in a process of its own: gRPC doesn't survive a fork, so this process mustn't have begun with it."""

    def __init__(self) -> None:
        self._pipe, theirs = FORK.Pipe()
        self._process = FORK.Process(target=_coordinate, args=(theirs,), daemon=True)

    def __enter__(self) -> str:
        self._process.start()
        return str(self._pipe.recv())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.join()


def _coordinate(pipe: Connection) -> None:
    from peerload.coordinator.server import serve

    with serve("127.0.0.1:0") as coordinator:
        pipe.send(coordinator.address)
        pipe.recv()
