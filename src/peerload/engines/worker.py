"""One rank of an inference engine: its weights in, from peers or disk, and out again to others.

What the loader plug-ins of vLLM and SGLang share. The engine builds its model; `load` traces the engine's own loader on it,
fills the parameters as that loader would have, and leaves the engine to post-process them; `serve` then offers what
post-processing has left alone. Targets fill the layout of load time too and run their own post-processing, so kernels see
what they would have seen after a load from disk.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from torch import Tensor, nn

from ..config import Config
from ..errors import ConfigError, LayoutError, ManifestError, PeerloadError
from ..layout.loader import Traced, trace_loader
from ..load import Job, Member, load
from ..manifest import ModelKey, Parallel
from ..memory import placed, regions_for
from ..receipt import Receipt
from ..rpc.client import CoordinatorClient
from ..seed import Seed
from ..transport.base import Region
from ..transport.registry import opened_transports
from .checkpoint import Checkpoint, ModelFiles
from .loaded import Loaded, device_of

log = logging.getLogger(__name__)

#: What an engine's model does with checkpoint tensors: its own `load_weights`.
LoadWeights = Callable[[nn.Module, Iterable[tuple[str, Tensor]]], object]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which rank this is. `engine` is its name and version, as in "vllm 0.32.0"; `launch` is the same for all ranks of one
    life of the instance, and new in the next."""

    engine: str
    instance: str
    launch: str
    parallel: Parallel
    rank: int
    size: int

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.size} ({self.engine}, {self.parallel})"


class Worker:
    """Use: `load` before the engine's post-processing, `serve` after it, `close` in the end. Not thread-safe.

    directory: the checkpoint. load_weights: the model's own loader, as the engine calls it. load_all: the engine's own load of
    everything from disk, for models that can't be followed. finish: what the engine computes out of loaded parameters while it
    loads (absorbed MLA weights), to be run again when the bytes are there; None if it has no such step."""

    def __init__(
        self,
        identity: Identity,
        config: Config,
        directory: Path,
        *,
        load_weights: LoadWeights,
        load_all: Callable[[nn.Module], object],
        finish: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self._identity, self._config, self._directory = identity, config, directory
        self._load_weights, self._load_all, self._finish = load_weights, load_all, finish
        self._stack = ExitStack()
        self._loaded: tuple[ModelKey, Loaded] | None = None

    def load(self, model: nn.Module) -> Receipt | None:
        """Fill the parameters of `model`, of which nothing has been loaded yet. None if its engine loaded all of them from
        disk because it can't be followed. Raises what `peerload.load` raises."""
        begun_s = time.perf_counter()
        try:
            checkpoint = Checkpoint.open(self._directory)
            traced = self._trace(model, checkpoint)
        except (LayoutError, ConfigError, ManifestError) as error:
            self._refuse(error)
            self._load_all(model)
            return None
        traced_s = time.perf_counter() - begun_s
        layout = traced.layout
        log.info(
            "%s: %d bytes of %d parameters are %d pieces of %d checkpoint tensors (traced in %.2f s)", self._identity,
            layout.buffer_nbytes.sum(), len(layout.buffer_names), len(layout.pieces), len(np.unique(layout.pieces.tensor)),
            traced_s,
        )  # fmt: skip
        key = checkpoint.key(self._config.model_name, self._config.revision)
        receipt = self._fill(key, checkpoint, traced)
        if receipt.left:
            self._derive(model, checkpoint, traced, receipt.left)
        if traced.hidden and self._finish is not None:
            self._finish(model)
        self._report(receipt)
        if self._config.source:
            config = self._config
            self._loaded = key, Loaded.of(traced, retain_nbytes=config.retain_bytes, threads=config.threads)
        return receipt

    def serve(self, model: nn.Module) -> Seed | None:
        """Offer what the engine's post-processing has left of what was loaded, until `close`. None if that isn't wanted or
        there is nothing to offer."""
        if self._loaded is None:
            return None
        (key, loaded), self._loaded = self._loaded, None
        offered = loaded.offered(model, threads=self._config.threads)
        if not len(offered.layout.pieces):
            log.warning("%s: not a seed: post-processing has rewritten every parameter", self._identity)
            return None
        client = self._stack.enter_context(CoordinatorClient(self._config.url))
        self._stack.callback(offered.memory.clear)  # after the transports, which read it
        transports = self._stack.enter_context(opened_transports(self._config, loaded.space.device))
        for transport in transports.values():
            transport.register(_regions(offered.memory, self._config))
        seed = Seed(
            key, offered.layout, offered.address, coordinator=client, transports=transports,
            instance=self._identity.instance, files=ModelFiles.of(self._directory).contents,
            attributes={"engine": self._identity.engine}, space=loaded.space, digests=self._config.verify,
            threads=self._config.threads,
        )  # fmt: skip
        self._stack.enter_context(seed)
        log.info("%s: seed %s of %s: %s", self._identity, self._identity.instance, key, offered)
        return seed

    def close(self) -> None:
        """Offer nothing any more. Safe to call twice."""
        self._stack.close()

    def _trace(self, model: nn.Module, checkpoint: Checkpoint) -> Traced:
        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> object:
            return self._load_weights(model, weights)

        who = self._identity
        traced = trace_loader(model, load_weights, checkpoint.catalog, parallel=who.parallel, rank=who.rank, engine=who.engine)
        if traced.hidden and self._finish is None:
            path, how = next(iter(traced.hidden.items()))
            raise LayoutError(
                f"{path}: {how}, and {who.engine} has no step that would compute it again"
                + (f" ({len(traced.hidden) - 1} more like it)" if len(traced.hidden) > 1 else ""),
                next_step="let the engine load this model itself",
            )
        return traced

    def _refuse(self, error: PeerloadError) -> None:
        """Whether the engine's own load is an answer to `error`. All ranks come to the same conclusion by themselves."""
        if self._config.fallback != "disk":
            raise error
        log.warning(
            "%s: %s; %s loads everything from disk, and this instance won't be a seed", self._identity, error.message,
            self._identity.engine,
        )  # fmt: skip

    def _fill(self, key: ModelKey, checkpoint: Checkpoint, traced: Traced) -> Receipt:
        who, config = self._identity, self._config
        tensors = [traced.tensors[name] for name in traced.layout.buffer_names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        member = Member(who.instance, who.rank, who.size, who.launch)
        progress = _Progress(who)
        with CoordinatorClient(config.url) as client, opened_transports(config, device_of(tensors)) as transports:
            job = Job(
                key, traced.layout, address, _regions(tensors, config), member, transports, config, coordinator=client,
                reserve=[checkpoint.offer()], derives=config.fallback == "disk", on_bytes=progress,
            )  # fmt: skip
            return load(job)

    def _derive(self, model: nn.Module, checkpoint: Checkpoint, traced: Traced, names: Iterable[str]) -> None:
        """Have the engine make what it computes from the checkpoint while it loads, and no seed has."""
        derived = [traced.derived[name] for name in names]
        wanted = sorted({name for d in derived for name in d.covers})
        log.info(
            "%s: %d derived tensors that no seed has (%s: %s) are made by %s from %d checkpoint tensors on disk", self._identity,
            len(derived), derived[0].parameter, derived[0].reason, self._identity.engine, len(wanted),
        )  # fmt: skip
        self._load_weights(model, _stored(checkpoint, wanted))

    def _report(self, receipt: Receipt) -> None:
        who = self._identity
        for name, read in receipt.sources.items():
            log.info("%s: %d bytes from %s (%d operations)", who, read.nbytes, name, read.operations)
        total = receipt.needed_nbytes or 1
        log.info(
            "%s: %.2f GB/s on the wire (%d bytes, %.3fx what is needed); %.1f %% verified by digest; %s; %.2f s in all",
            who, receipt.transfer_gb_per_s, receipt.wire_nbytes, receipt.overhead, 100 * receipt.verified_nbytes / total,
            ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in receipt.seconds.items()), receipt.wall_s,
        )  # fmt: skip


class _Progress:
    """A log line every two seconds at most."""

    def __init__(self, who: Identity) -> None:
        self._who, self._next_s = who, time.monotonic() + 2.0

    def __call__(self, phase: str, done: int, wanted: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + 2.0
            log.info("%s: %s: %.0f %% of %d bytes", self._who, phase, 100 * done / max(1, wanted), wanted)


def _regions(tensors: Iterable[Tensor], config: Config) -> list[Region]:
    return regions_for([placed(t) for t in tensors], config.registration)


def _stored(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, read from disk by safetensors."""
    file = {t.spec.name: checkpoint.files.path[t.file] for t in checkpoint.tensors}
    for name in names:
        with safe_open(file[name], "pt") as opened:
            yield name, opened.get_tensor(name)
