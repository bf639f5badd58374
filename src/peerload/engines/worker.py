"""One rank of an inference engine: its weights in, from peers or disk, and out again to others.

What the loader plug-ins of vLLM and SGLang share. The engine builds its model; `load` traces the engine's own loader on it,
fills the parameters as that loader would have, and leaves the engine to post-process them; `serve` then offers what
post-processing has left alone. Targets fill the layout of load time too and run their own post-processing, so kernels see
what they would have seen after a load from disk.
"""

from __future__ import annotations

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from safetensors import safe_open
from torch import Tensor, nn

from ..config import Config
from ..deadline import Deadline
from ..errors import ConfigError, CoordinatorError, DeadlineExceeded, LayoutError, ManifestError, PeerloadError
from ..layout.coverage import require_covered
from ..layout.loader import Traced, trace_loader
from ..load import Job, Member, load
from ..manifest import Catalog, ModelKey, Parallel, is_derived
from ..memory import placed, regions_for
from ..receipt import Receipt, readable
from ..rpc.client import CoordinatorClient
from ..seed import Seed
from ..transport.base import Region
from ..transport.registry import opened_transports
from .checkpoint import Checkpoint, ModelFiles
from .loaded import Loaded, device_of

log = logging.getLogger(__name__)

#: Seconds between two lines of progress.
PROGRESS_S = 2.0


class NotFollowed(LayoutError):
    """This model can't come from peers; its engine may build it anew and load it from disk. All ranks raise it or none."""


class Launch(NamedTuple):
    """What rank 0 tells all ranks, so that they do the same. `number` is that of one life of the instance, and new in the next;
    `alone` says why the instance has to do without a coordinator, if it has."""

    instance: str
    number: str
    alone: str = ""

    @classmethod
    def now(cls, config: Config) -> Self:
        number, alone = uuid.uuid4().hex, ""
        try:
            with CoordinatorClient(config.url) as client:
                client.status()
        except (CoordinatorError, DeadlineExceeded) as error:
            alone = error.message
        return cls(f"{socket.gethostname()}-{number[:8]}", number, alone)


@dataclass(frozen=True, slots=True)
class Identity:
    """Which rank of which instance this is. `engine` is its name and version, as in "vllm 0.32.0"."""

    engine: str
    launch: Launch
    parallel: Parallel
    rank: int
    size: int

    @property
    def instance(self) -> str:
        return self.launch.instance


class Worker:
    """Use: `load` before the engine's post-processing, `serve` after it, `close` in the end. Not thread-safe.

    directory: the checkpoint. load_weights: the model's own loader, as the engine calls it. finish: what the engine computes
    out of loaded parameters while it loads (absorbed MLA weights), to be run again when the bytes are there; None if it has
    no such step."""

    def __init__(
        self,
        identity: Identity,
        config: Config,
        directory: Path,
        *,
        load_weights: Callable[[nn.Module, Iterable[tuple[str, Tensor]]], object],
        finish: Callable[[nn.Module], object] | None = None,
    ) -> None:
        self._identity, self._config, self._directory = identity, config, directory
        self._load_weights, self._finish = load_weights, finish
        self._stack = ExitStack()
        self._loaded: tuple[ModelKey, Loaded] | None = None

    def load(self, model: nn.Module) -> Receipt:
        """Fill the parameters of `model`, of which nothing has been loaded yet. Raises what `peerload.load.load` raises; and
        where that leaves a choice (`fallback`), NotFollowed, after which the model must not be used."""
        problem: PeerloadError | None = None
        try:
            key, catalog, checkpoint = self._source()
            traced = self._trace(model, catalog)
        except (LayoutError, ConfigError, ManifestError, CoordinatorError) as error:
            if self._config.fallback != "disk":
                raise
            problem = error
        self._agree_to_load(problem)
        receipt = self._fill(key, checkpoint, traced)
        if receipt.left:
            assert checkpoint is not None, "nothing is left without one"
            self._derive(model, checkpoint, traced, receipt.left)
        if self._finish is not None:  # whatever the trace saw of it: kernels of its own escape it
            self._finish(model)
        self._report(receipt)
        if self._config.source:
            config = self._config
            self._loaded = key, Loaded.of(traced, retain_nbytes=config.retain_bytes, threads=config.threads)
        return receipt

    def serve(self, model: nn.Module) -> Seed | None:
        """Offer what the engine's post-processing has left of what was loaded, until `close`. None if that isn't wanted, there
        is nothing to offer, or it can't be offered: a replica that is complete serves all the same."""
        try:
            return self._serve(model)
        except PeerloadError as error:
            log.warning("peerload: rank %d is no seed: %s", self._identity.rank, error.message)
            self.close()
            return None

    def _serve(self, model: nn.Module) -> Seed | None:
        if self._loaded is None:
            return None
        (key, loaded), self._loaded = self._loaded, None
        offered = loaded.offered(model, threads=self._config.threads)
        if not len(offered.layout.pieces):
            self._say("no seed: post-processing has rewritten every parameter")
            return None
        client = self._stack.enter_context(CoordinatorClient(self._config.url))
        self._stack.callback(offered.memory.clear)  # after the transports, which read it
        transports = self._stack.enter_context(opened_transports(self._config, loaded.space.device))
        for transport in transports.values():
            transport.register(_regions(offered.memory, self._config))
        seed = Seed(
            key, offered.layout, offered.address, coordinator=client, transports=transports,
            instance=self._identity.instance, files=self._files(),
            attributes={"engine": self._identity.engine}, space=loaded.space, digests=self._config.verifies,
            threads=self._config.threads,
        )  # fmt: skip
        self._stack.enter_context(seed)
        self._say("seed %s of %s, each rank with %s", self._identity.instance, key, offered)
        return seed

    def close(self) -> None:
        """Offer nothing any more. Safe to call twice."""
        self._stack.close()

    def _agree_to_load(self, problem: PeerloadError | None) -> None:
        """Raise NotFollowed on every rank if one of them has a `problem`: they go the same way, or the engine hangs."""
        who, told = self._identity, [problem.message if problem else ""]
        if who.size > 1 and not who.launch.alone:
            with CoordinatorClient(self._config.url) as client:
                group, deadline = f"{who.instance}/{who.launch.number}/trace", Deadline.after(self._config.deadline_s)
                told = [said.decode() for said in client.agree(group, 0, who.rank, who.size, told[0].encode(), deadline)]
        for rank, reason in enumerate(told):
            if reason:
                raise NotFollowed(f"rank {rank}: {reason}" if len(told) > 1 else reason) from problem

    def _files(self) -> Mapping[str, bytes]:
        """The model's small files, for targets that have none."""
        try:
            return ModelFiles.of(self._directory).contents
        except ConfigError:
            return {}

    def _source(self) -> tuple[ModelKey, Catalog, Checkpoint | None]:
        """What is loaded: the model, its checkpoint's tensors, and the checkpoint itself if this host has it. Where it hasn't, a
        seed of the model and revision that the configuration names says which tensors there are."""
        config = self._config
        if self._identity.launch.alone:
            raise CoordinatorError(self._identity.launch.alone, next_step="start it, or give its url")
        try:
            checkpoint = Checkpoint.open(self._directory)
        except ConfigError:
            if not (config.model_name and config.revision):
                raise
        else:
            return checkpoint.key(config.model_name, config.revision), checkpoint.catalog, checkpoint
        key = ModelKey(config.model_name, config.revision)
        problem = f"{self._directory} is no checkpoint, and nobody offers {key}"
        with CoordinatorClient(config.url) as client:
            try:
                offers = client.wait_for(key, Deadline.after(config.wait_s), bool)
            except DeadlineExceeded as error:
                raise ConfigError(problem, next_step="start a seed, or give it time with wait_s") from error
        return key, Catalog.of(spec for spec in offers[0].layout.catalog if not is_derived(spec.name)), None

    def _trace(self, model: nn.Module, catalog: Catalog) -> Traced:
        begun_s, who = time.perf_counter(), self._identity

        def load_weights(weights: Iterable[tuple[str, Tensor]]) -> object:
            return self._load_weights(model, weights)

        traced = trace_loader(model, load_weights, catalog, parallel=who.parallel, rank=who.rank, engine=who.engine)
        require_covered(traced, model, who.engine)
        if traced.hidden and self._finish is None:
            path, how = next(iter(traced.hidden.items()))
            more = f" ({len(traced.hidden) - 1} more like it)" if len(traced.hidden) > 1 else ""
            raise LayoutError(f"{path}: {how}, and {who.engine} has no step of its own that would make it again{more}")
        layout = traced.layout
        self._say(
            "%s is %s, %d ranks, %s; %d parameters of a rank hold parts of %d checkpoint tensors, %d derived (traced in %.2f s)",
            who.instance, who.engine, who.size, who.parallel, len(layout.buffer_names),
            len(np.unique(layout.pieces.tensor)) - len(traced.derived), len(traced.derived), time.perf_counter() - begun_s,
        )  # fmt: skip
        return traced

    def _fill(self, key: ModelKey, checkpoint: Checkpoint | None, traced: Traced) -> Receipt:
        who, config = self._identity, self._config
        tensors = [traced.tensors[name] for name in traced.layout.buffer_names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        member = Member(who.instance, who.rank, who.size, who.launch.number)
        with CoordinatorClient(config.url) as client, ExitStack() as stack:
            try:
                transports = stack.enter_context(opened_transports(config, device_of(tensors)))
                regions = _regions(tensors, config)
            except PeerloadError as error:
                if who.size > 1:  # the others are on their way to the first vote of the load
                    client.abort(member.group, 0, who.rank, who.size, error.message)
                raise
            job = Job(
                key, traced.layout, address, regions, member, transports, config, coordinator=client,
                reserve=[checkpoint.offer()] if checkpoint else [],
                derives=checkpoint is not None and config.fallback == "disk", on_bytes=_Progress(self._say),
            )  # fmt: skip
            return load(job)

    def _derive(self, model: nn.Module, checkpoint: Checkpoint, traced: Traced, names: Sequence[str]) -> None:
        """Have the engine make what it computes from the checkpoint while it loads, and no seed has."""
        derived = [traced.derived[name] for name in names]
        wanted = sorted({name for d in derived for name in d.covers})
        self._say(
            "no seed has %d derived tensors (%s: %s): %s makes them from %d checkpoint tensors on disk",
            len(derived), derived[0].parameter, derived[0].reason, self._identity.engine, len(wanted),
        )  # fmt: skip
        self._load_weights(model, _stored(checkpoint, wanted))

    def _report(self, receipt: Receipt) -> None:
        """What came from where, how fast, and whether it is proven."""
        found: dict[str, int] = {}
        for name, read in receipt.instance.items():
            source = name.rpartition("/rank ")[0] or name
            found[source] = found.get(source, 0) + read.nbytes
        for source, nbytes in sorted(found.items(), key=lambda item: -item[1]):
            self._say("%s from %s", readable(nbytes), source)
        self._say(
            "rank %d: %s in %.2f s at %.2f GB/s, %.3fx of what it needs on the wire (%s)", receipt.rank,
            readable(receipt.needed_nbytes), receipt.wall_s, receipt.transfer_gb_per_s, receipt.overhead,
            ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in receipt.seconds.items() if seconds >= 0.005),
        )  # fmt: skip
        more = "" if receipt.verified_nbytes == receipt.needed_nbytes else f" ({receipt.proof})"
        self._say(
            "rank %d: %.1f %% of its bytes verified by the seeds' digests%s; %d of %d ranks have committed", receipt.rank,
            100 * receipt.verified_nbytes / max(1, receipt.needed_nbytes), more, self._identity.size, self._identity.size,
        )  # fmt: skip

    def _say(self, text: str, *values: object) -> None:
        """Rank 0 speaks for the instance; the others only to who debugs."""
        log.log(logging.INFO if self._identity.rank == 0 else logging.DEBUG, f"peerload: {text}", *values)


class _Progress:
    """A line now and then."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say, self._next_s = say, time.monotonic() + PROGRESS_S

    def __call__(self, phase: str, done: int, wanted: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + PROGRESS_S
            self._say("%s: %.0f %% of %s", phase, 100 * done / max(1, wanted), readable(wanted))


def _regions(tensors: Iterable[Tensor], config: Config) -> list[Region]:
    return regions_for([placed(t) for t in tensors], config.registration)


def _stored(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, read from disk by safetensors."""
    file = {t.spec.name: checkpoint.files.path[t.file] for t in checkpoint.tensors}
    for name in names:
        with safe_open(file[name], "pt") as opened:
            yield name, opened.get_tensor(name)
