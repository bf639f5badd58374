"""One rank of an inference engine: its weights in, from peers or disk, and out again to others.

What the loader plug-ins of vLLM and SGLang share. The engine builds its model; `load` traces the engine's own loader on it,
fills the parameters as that loader would have, and leaves the engine to post-process them; `serve` then offers what
post-processing has left alone. Targets fill the layout of load time too and run their own post-processing, so kernels see
what they would have seen after a load from disk.
"""

from __future__ import annotations

import gc
import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..config import Config
from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import (
    ConfigError,
    CoordinatorError,
    DeadlineExceeded,
    LayoutError,
    PeerloadError,
    VerifyError,
    reason_of,
)
from ..job.exchange import Group
from ..job.load import Job, load
from ..job.rank import Member, Rank
from ..job.seed import Seed
from ..memory.placing import placed, regions_for
from ..memory.region import Region
from ..model.catalog import Catalog, ModelKey, Parallel, is_derived
from ..receipt import Receipt, readable
from ..tracing.coverage import require_covered
from ..tracing.trace import Traced, trace_loader
from .checkpoint import Checkpoint, ModelFiles
from .intact import Loaded, device_of
from .recipes import Recipe, Taking, groups_of
from .settle import Said, Unsettled, held_by_seeds
from .versions import warn_unless_tested

log = logging.getLogger(__name__)

T = TypeVar("T")

#: Seconds between two lines of progress.
PROGRESS_S = 2.0
#: Characters of the line that says why an engine loads from disk.
_REASON = 1000


class NotFollowed(PeerloadError):
    """This load from peers has failed, and `fallback` is "disk": the engine builds its model anew and loads it itself. All ranks
    of an instance raise it, or none."""


class Launch(NamedTuple):
    """What rank 0 tells all ranks, so that they do the same. `number` is that of one life of the instance, and new in the next;
    `alone` says why the instance has to do without a coordinator, if it has; `offered`: the models that seeds hold."""

    instance: str
    number: str
    alone: str = ""
    offered: tuple[ModelKey, ...] = ()

    @classmethod
    def now(cls, config: Config) -> Self:
        number, alone, offered = uuid.uuid4().hex, "", set[ModelKey]()
        try:
            with CoordinatorClient(config.url) as client:
                offered = {holding.model for holding in client.status().holdings}
        except PeerloadError as error:  # whichever it is, all ranks wait to hear of it
            alone = error.message
        return cls(f"{socket.gethostname()}-{number[:8]}", number, alone, tuple(sorted(offered)))

    def require_coordinator(self, config: Config) -> None:
        """Raises on all ranks alike when there is none: NotFollowed, or CoordinatorError if `config` forbids the disk. For
        engines to call before they build a model."""
        if self.alone:
            kind = NotFollowed if config.fallback == "disk" else CoordinatorError
            raise kind(self.alone, next_step="start it, or give its url")


class World(Protocol):
    """The engine's own group of all ranks of the instance."""

    rank_in_group: int
    world_size: int

    def broadcast_object(self, value: object) -> Any:  # noqa: ANN401 - what rank 0 gives
        """The value of rank 0, on every rank. Collective."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Which rank of which instance this is. `engine` is its name and version, as in "vllm 0.32.0"."""

    engine: str
    launch: Launch
    parallel: Parallel
    rank: int
    size: int

    @classmethod
    def agreed(cls, engine: str, config: Config, world: World, parallel: Parallel) -> Self:
        """This process's, with the launch that rank 0 tells all. Collective: all ranks of the instance call it."""
        launch = world.broadcast_object(Launch.now(config) if world.rank_in_group == 0 else None)
        return cls(engine, Launch(*launch), parallel, world.rank_in_group, world.world_size)

    @property
    def instance(self) -> str:
        return self.launch.instance

    @property
    def member(self) -> Member:
        return Member(self.instance, self.rank, self.size, self.launch.number)


class Worker:
    """Use: `load` before the engine's post-processing, `settle` and `serve` after it, `close` in the end. Not thread-safe.

    directory: finds the checkpoint, and may download it; if that fails on one rank, all ranks hear of it. known_as: what the
    engine calls the model, a name or a path. engine_loader: the model's own loader, as the engine calls it. finish: what the
    engine computes out of loaded parameters while it loads (absorbed MLA weights), to be run again when the bytes are there;
    None if it has no such step. recipes: what its post-processing may do to weights."""

    def __init__(
        self,
        identity: Identity,
        config: Config,
        directory: Callable[[], Path],
        *,
        engine_loader: Callable[[nn.Module, Iterable[tuple[str, Tensor]]], object],
        finish: Callable[[nn.Module], object] | None = None,
        known_as: str = "",
        recipes: Sequence[Recipe] = (),
    ) -> None:
        self._identity, self._config, self._find, self._known_as = identity, config, directory, known_as
        self._recipes = recipes
        self._engine_loader, self._finish = engine_loader, finish
        self._stack = ExitStack()
        self._loaded: tuple[ModelKey, Loaded] | None = None
        self._unsettled: Unsettled | None = None
        self._settles = False  # does any rank hold what recipes have made?

    @cached_property
    def _directory(self) -> Path:
        return self._find()

    def load(self, model: nn.Module) -> Receipt:
        """Fill the parameters of `model`, of which nothing has been loaded yet. All ranks return, or all raise, and then the
        model must not be used: NotFollowed if the engine may load it from disk (`fallback`), else what went wrong here, or
        CommitError with what went wrong on another rank."""
        with self._or_from_disk():
            return self._load(model)

    @contextmanager
    def _or_from_disk(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._loaded, self._unsettled, self._settles = None, None, False
            if self._config.fallback != "disk":
                raise
            if not isinstance(error, PeerloadError):
                log.exception(
                    "peerload: rank %d failed", self._identity.rank
                )  # ours or the engine's bug, and no reason not to serve
            raise NotFollowed("; ".join(map(str.strip, reason_of(error).splitlines()))[:_REASON]) from error

    def _load(self, model: nn.Module) -> Receipt:
        if self._identity.rank == 0:
            warn_unless_tested(self._identity.engine)
        deadline, waiting = Deadline.after(self._config.deadline_s), Deadline.after(self._config.wait_s)
        with CoordinatorClient(self._config.url) as client:
            with self._together(client, "begin", deadline) as said:
                key, catalog, checkpoint = self._source(client, deadline)
                said.key = str(key)
                traced = self._trace(model, catalog)
                # What the loader computes out of weights, it must not compute out of those that a recipe has made.
                groups = [] if traced.hidden else groups_of(traced, self._recipes)
                proven = self._config.verifies
                held = held_by_seeds(client, key, groups, waiting, deadline, proven=proven) if groups else {}
                said.seeds = frozenset(held) if groups else None
            with self._together(client, "choose", deadline) as choosing:
                choice = Taking.of(traced, groups, frozenset().union(*(held.get(seed, ()) for seed in said.seeds or ())))
                choosing.recipes = bool(choice.taken)
                left = self._config.replace(deadline_s=deadline.remaining_s, wait_s=waiting.remaining_s)
                job = self._job(model, key, checkpoint, choice, left, client)
            self._settles = choosing.recipes
            receipt = load(job)
        self._report(receipt)
        digests = choice.arrived(receipt.digests, receipt.left)
        if self._loaded is not None:
            self._loaded[1].prove(digests)
        if self._unsettled is not None:
            self._unsettled.prove(digests)
        return receipt

    def settle(self, model: nn.Module) -> None:
        """After the engine's post-processing, and before the model is used: has it left what came from seeds in post-processed
        form as they had it? All ranks return, or all raise as `load` does."""
        if not self._settles:
            return
        unsettled, self._unsettled = self._unsettled, None
        with self._or_from_disk(), CoordinatorClient(self._config.url) as client:
            with self._together(client, "settle", Deadline.after(self._config.deadline_s)) as said:
                said.problem = unsettled.problem(model, threads=self._config.threads) if unsettled is not None else ""
            if said.problem:
                raise VerifyError(
                    f"{self._identity.instance}, {said.problem}",
                    next_step="allow fallback=disk, or load from a seed that runs the same kernels",
                )
        self._say("what came in post-processed form is as the seeds have it, on all ranks")

    def give_up(self, error: BaseException) -> None:
        """The engine's post-processing has failed here: ranks that wait in `settle` hear of it."""
        if not self._settles:
            return
        self._settles, who = False, self._identity
        with CoordinatorClient(self._config.url) as client:
            deadline = Deadline.after(self._config.deadline_s)
            Group(f"{who.member.group}/settle", who.rank, who.size, client, deadline).abort(error)

    def serve(self, model: nn.Module) -> Seed | None:
        """Offer what the engine's post-processing has left of what was loaded, until `close`. None if that isn't wanted, there
        is nothing to offer, or it can't be offered: a replica that is complete serves all the same."""
        return self._unless_it_fails(lambda: self._serve(model))

    def _unless_it_fails(self, step: Callable[[], T | None]) -> T | None:
        """A step towards being a seed. If it fails, this rank is none, but its weights are complete and it serves."""
        try:
            return step()
        except PeerloadError as error:
            log.warning("peerload: rank %d is no seed: %s", self._identity.rank, error.message)
        except Exception:  # memory for copies, a bug: nothing of it is a reason to end a replica that works
            log.exception("peerload: rank %d is no seed", self._identity.rank)
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
        regions = _regions(offered.memory, self._config)
        member, device = self._identity.member, loaded.space.device
        rank = Rank(key, offered.layout, offered.address, regions, member, self._config, client, device)
        seed = Seed(rank, files=self._files(), attributes={"engine": self._identity.engine}, proven=offered.proven)
        self._stack.enter_context(seed)
        self._say("seed %s of %s, each rank with %s", self._identity.instance, key, offered)
        return seed

    def close(self) -> None:
        """Offer nothing any more. Safe to call twice."""
        self._stack.close()

    @contextmanager
    def _together(self, client: CoordinatorClient, step: str, deadline: Deadline) -> Iterator[Said]:
        """If the block fails on one rank, it fails on all: the others raise CommitError with the reason, and none of them waits
        for a load that won't begin. The block says what it has to say; afterwards, that is what all ranks say together."""
        who, said = self._identity, Said()
        group = Group(f"{who.member.group}/{step}", who.rank, who.size, client, deadline)
        try:
            yield said
            heard = group.tell(said.encode())
        except BaseException as error:
            group.abort(error)
            raise
        said.join(heard)

    def _files(self) -> Mapping[str, bytes]:
        """The model's small files, for targets that have none."""
        try:
            return ModelFiles.of(self._directory).contents
        except ConfigError:
            return {}

    def _source(self, client: CoordinatorClient, deadline: Deadline) -> tuple[ModelKey, Catalog, Checkpoint | None]:
        """What is loaded: the model, its checkpoint's tensors, and the checkpoint itself if this host has it. Where it hasn't, a
        seed of the model and revision that the configuration names says which tensors there are."""
        config, launch = self._config, self._identity.launch
        launch.require_coordinator(config)
        try:
            checkpoint = Checkpoint.open(self._directory)
        except ConfigError:
            if not (config.model_name and config.revision):
                raise
        else:
            key = checkpoint.key(config.model_name, config.revision, known_as=self._known_as, offered=launch.offered)
            return key, checkpoint.catalog, checkpoint
        key = ModelKey(config.model_name, config.revision)
        problem = f"{self._directory} is no checkpoint, and nobody offers {key}"
        try:
            offers = client.wait_for(key, deadline.within(config.wait_s), bool)
        except DeadlineExceeded as error:
            raise ConfigError(problem, next_step="start a seed, or give it time with wait_s") from error
        return key, Catalog.of(spec for spec in offers[0].layout.catalog if not is_derived(spec.name)), None

    def _trace(self, model: nn.Module, catalog: Catalog) -> Traced:
        begun_s, who = time.perf_counter(), self._identity

        def feed(weights: Iterable[tuple[str, Tensor]]) -> object:
            return self._engine_loader(model, weights)

        traced = trace_loader(model, feed, catalog, parallel=who.parallel, rank=who.rank, engine=who.engine)
        require_covered(traced, model, who.engine)
        if traced.hidden and self._finish is None:
            path, how = next(iter(traced.hidden.items()))
            more = f" ({len(traced.hidden) - 1} more like it)" if len(traced.hidden) > 1 else ""
            raise LayoutError(f"{path}: {how}, and {who.engine} has no step of its own that would make it again{more}")
        layout = traced.layout
        self._say(
            "%s is %s, %d ranks, %s; %d parameters of a rank hold parts of %d checkpoint tensors, %d derived (traced in %.2f s)",
            who.instance,
            who.engine,
            who.size,
            who.parallel,
            len(layout.buffer_names),
            len(np.unique(layout.pieces.tensor)) - len(traced.derived),
            len(traced.derived),
            time.perf_counter() - begun_s,
        )
        return traced

    def _job(
        self,
        model: nn.Module,
        key: ModelKey,
        checkpoint: Checkpoint | None,
        choice: Taking,
        config: Config,
        client: CoordinatorClient,
    ) -> Job:
        """This rank's load. config: with what is left of the deadlines."""
        traced = choice.traced
        tensors = [traced.tensors[name] for name in traced.layout.buffer_names]
        address = np.array([t.data_ptr() for t in tensors], np.int64)
        device = device_of(tensors)
        regions, member = _regions(tensors, config), self._identity.member

        def complete(left: tuple[str, ...]) -> None:
            if left:
                assert checkpoint is not None, "nothing is left without one"
                self._derive(model, checkpoint, choice, left)
            come = choice.without(left)
            if come.taken:
                self._unsettled = Unsettled.of(come, threads=config.threads)
            if config.source:  # before the engine's last step, which targets take themselves
                limits = {"retain_nbytes": config.retain_bytes, "staging_nbytes": config.staging_bytes, "threads": config.threads}
                self._loaded = self._unless_it_fails(lambda: (key, Loaded.of(come, **limits)))
            come.prepare(config.staging_bytes)
            if self._finish is not None:  # whatever the trace saw of it: kernels of its own escape it
                self._finish(model)

        return Job(
            Rank(key, choice.layout, address, regions, member, config, client, device),
            reserve=[checkpoint.offer()] if checkpoint else [],
            derives=checkpoint is not None and config.fallback == "disk",
            on_bytes=_ProgressLine(self._say),
            complete=complete,
        )

    def _derive(self, model: nn.Module, checkpoint: Checkpoint, choice: Taking, names: Sequence[str]) -> None:
        """Have the engine make what it computes from the checkpoint while it loads, and no seed has."""
        known = choice.derived
        derived = [known[name] for name in names]
        wanted = sorted({name for d in derived for name in d.covers})
        self._say(
            "no seed has %d derived tensors (%s: %s): %s makes them from %d checkpoint tensors on disk",
            len(derived),
            derived[0].parameter,
            derived[0].reason,
            self._identity.engine,
            len(wanted),
        )
        self._engine_loader(model, _stored(checkpoint, wanted))

    def _report(self, receipt: Receipt) -> None:
        """What came from where, how fast, and whether it is proven."""
        found: dict[str, int] = {}
        for name, read in receipt.instance.items():
            source = name.rpartition("/rank ")[0] or name
            found[source] = found.get(source, 0) + read.nbytes
        for source, nbytes in sorted(found.items(), key=lambda item: -item[1]):
            self._say("%s from %s", readable(nbytes), source)
        self._say(
            "rank %d: %s in %.2f s at %.2f GB/s, %.3fx of what it needs on the wire (%s)",
            receipt.rank,
            readable(receipt.needed_nbytes),
            receipt.wall_s,
            receipt.transfer_gb_per_s,
            receipt.overhead,
            ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in receipt.seconds.items() if seconds >= 0.005),
        )
        more = "" if receipt.verified_nbytes == receipt.needed_nbytes else f" ({receipt.proof})"
        self._say(
            "rank %d: %.1f %% of its bytes verified by the seeds' digests%s; %d of %d ranks have committed",
            receipt.rank,
            100 * receipt.verified_nbytes / max(1, receipt.needed_nbytes),
            more,
            self._identity.size,
            self._identity.size,
        )

    def _say(self, text: str, *values: object) -> None:
        """Rank 0 speaks for the instance; the others only to who debugs."""
        log.log(logging.INFO if self._identity.rank == 0 else logging.DEBUG, f"peerload: {text}", *values)


class _ProgressLine:
    """A line now and then."""

    def __init__(self, say: Callable[..., None]) -> None:
        self._say, self._next_s = say, time.monotonic() + PROGRESS_S

    def __call__(self, phase: str, done: int, wanted: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + PROGRESS_S
            self._say("%s: %.0f %% of %s", phase, 100 * done / max(1, wanted), readable(wanted))


def free_given_up() -> None:
    """Free the memory of a model that nothing refers to any more, before it is built anew. Its parameters and their loaders hold
    each other."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _regions(tensors: Iterable[Tensor], config: Config) -> list[Region]:
    return regions_for([placed(t) for t in tensors], config.registration)


def _stored(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """The named tensors, read from disk by safetensors."""
    file = {t.spec.name: checkpoint.files.path[t.file] for t in checkpoint.tensors}
    for name in names:
        with safe_open(file[name], "pt") as opened:
            yield name, opened.get_tensor(name)
