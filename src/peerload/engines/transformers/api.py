"""`peerload.load` and `peerload.seed`: an existing transformers model, filled from or offered to other instances in place."""

from __future__ import annotations

import logging
import socket
import uuid
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ...config import Config
from ...coordinator.client import CoordinatorClient
from ...errors import CommitError, ConfigError, reason_of
from ...job.load import Job
from ...job.load import load as run
from ...job.rank import Member, Rank
from ...job.seed import Seed
from ...model.catalog import ModelKey
from ...model.layout import Layout
from ...receipt import Receipt
from ..checkpoint import INDEX, SINGLE, Checkpoint, ModelFiles, name_of
from .compared import require_equal
from .live import LiveModel, live_model, unwrapped

log = logging.getLogger(__name__)

Settings = Config | Mapping[str, Any] | str | None
#: What of the weights `seed` compares with the checkpoint whose name they are to have.
CHECKS: Final = ("samples", "all")


def load(
    model: nn.Module,
    config: Settings = None,
    *,
    checkpoint: str | Path | None = None,
    instance: str = "",
    group: dist.ProcessGroup | None = None,
) -> Receipt:
    """Fill the parameters of `model` in place, out of the memory of running seeds, or from the checkpoint on disk as
    `config.fallback` says. Returns when every rank of the instance holds proven bytes.

    The model is one of transformers, with memory on whatever device: whole, split by its tensor- or expert-parallel plan
    (DTensors), or by `fully_shard`. Every rank of `group` (default: all, where torch.distributed is initialised) makes the
    same call. Parameters in another dtype than the checkpoint's are cast.

    config: a `Config`, a mapping of its keys, JSON text or a file's path; None: $PEERLOAD_CONFIG. checkpoint: the model's
    directory (default: where the model or `config.model_name` says it is, if it is there). instance: this instance's name.

    Raises ConfigError, LayoutError (the parameter is named; nothing was written), PlanError, SourcesExhausted,
    CommitError, DeadlineExceeded, VerifyError, HostError, CoordinatorError; on every rank, if on one."""
    settings = settings_of(config)
    with _opened(model, settings, checkpoint, instance, group, find=True) as this:
        live, disk = this.live, this.disk
        with this.together():
            reserve = [disk.offer()] if disk is not None else []
            job = Job(this.rank(settings), reserve, complete=lambda _: live.accept())
            live.settle()
        receipt = run(job)
    log.info("peerload: %s", receipt)
    return receipt


class ModelSeed:
    """A model on offer. `layout`: what this rank offers; `model`: under which name and revision."""

    def __init__(self, this: _Ready, seed: Seed | None) -> None:
        self.layout: Layout = this.live.layout
        self.model: ModelKey = this.model
        self._this, self._seed = this, seed

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the weights in place, on all ranks together: nobody can read the old ones once any rank is in the block,
        and the new ones are announced after it. If the block raises, this rank's weights are offered no more.

        Raises CommitError if another rank could not begin; ConfigError where the revision on offer is the checkpoint's own, which
        changed weights are not."""
        if self._this.stands_for_disk:
            raise ConfigError(
                f"{self.model} means the checkpoint on disk, and its weights are about to change",
                next_step="set `revision` in the configuration to a name of these weights' own",
            )
        with ExitStack() as stack:
            with self._this.together():  # a rank that can't withdraw its old weights leaves no other waiting
                if self._seed is not None:
                    stack.enter_context(self._seed.changing())
            yield
            self._this.live.publish()


@contextmanager
def seed(
    model: nn.Module,
    config: Settings = None,
    *,
    checkpoint: str | Path | None = None,
    instance: str = "",
    group: dist.ProcessGroup | None = None,
    check: str = "samples",
) -> Iterator[ModelSeed]:
    """Offer the weights of `model`, in place, to instances of any layout until the block ends. Arguments as for `load`.

    The weights may change only within `changing()` of what is yielded. Parameters in another dtype than the checkpoint's
    (a trainer's F32 masters) are offered as copies in the checkpoint's, made anew after each change. With `source` off in
    the configuration nothing is offered, and the block runs all the same.

    Without a `revision` in the configuration, the weights are offered as those of the checkpoint. They are compared with it
    first, and refused if they differ: random places of every tensor (check="samples"), or every byte (check="all"). Weights that
    were trained on need a `revision` of their own, and are not compared. Without a checkpoint, `revision` is required.

    Raises ConfigError (for weights that differ too: tensor and elements are named), LayoutError, HostError, CoordinatorError; on
    every rank, if on one, and CommitError on those that could."""
    settings = settings_of(config)
    if check not in CHECKS:
        raise ConfigError(f"check is {check!r}, must be one of {', '.join(CHECKS)}")
    with _opened(model, settings, checkpoint, instance, group, find=False) as this, ExitStack() as stack:
        offered = None
        with this.together():
            this.live.publish()
            if settings.source:
                offered = stack.enter_context(_offer(this, settings, every=check == "all"))
        yield ModelSeed(this, offered)


def _offer(this: _Ready, settings: Config, *, every: bool) -> Seed:
    """A seed, not entered yet, of weights that may be offered."""
    live, rank = this.live, this.rank(settings)
    if this.stands_for_disk:
        assert this.disk is not None, "else it wouldn't"
        require_equal(live.layout, live.address, rank.space, this.disk, every=every, threads=settings.threads)
    return Seed(rank, files=live.files.contents, attributes={"engine": f"transformers {transformers.__version__}"})


@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """This process's part in a load or an offer. stands_for_disk: the model's revision is that of the checkpoint's bytes."""

    model: ModelKey
    live: LiveModel
    member: Member
    client: CoordinatorClient
    disk: Checkpoint | None
    stands_for_disk: bool
    group: dist.ProcessGroup | None

    def rank(self, config: Config) -> Rank:
        live, regions = self.live, self.live.regions(config.registration)
        return Rank(self.model, live.layout, live.address, regions, self.member, config, self.client, str(live.device))

    def together(self) -> AbstractContextManager[None]:
        return _together(self.member.rank, self.member.size, self.group)


@contextmanager
def _opened(
    model: nn.Module,
    config: Config,
    checkpoint: str | Path | None,
    instance: str,
    group: dist.ProcessGroup | None,
    *,
    find: bool,
) -> Iterator[_Ready]:
    """Everything that all ranks must have in common, and this rank's own part. find: as `_told`."""
    inner = unwrapped(model)
    rank, size = (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)
    with CoordinatorClient(config.url) as client:
        with _together(rank, size, group):
            directory = _directory(inner, config, checkpoint)
            disk = None if directory is None else Checkpoint.open(directory)
            told = [_told(inner, config, disk, client, checkpoint, instance, find)] if rank == 0 else [None]
        if size > 1:
            dist.broadcast_object_list(told, group=group, group_src=0)
        (common,) = told
        assert common is not None, "rank 0 has told it"
        with _together(rank, size, group):
            files, catalog = (None, None) if disk is None else (ModelFiles.of(disk.directory), disk.catalog)
            live = live_model(inner, files, catalog, rank=rank)
        member = Member(common.instance, rank, size, common.launch)
        yield _Ready(common.model, live, member, client, disk, disk is not None and not config.revision, group)


@contextmanager
def _together(rank: int, size: int, group: dist.ProcessGroup | None) -> Iterator[None]:
    """What fails on one rank fails on all: the others raise CommitError, rather than wait for it. Over torch.distributed,
    because the ranks have no name yet under which they could agree at the coordinator."""
    problem = None
    try:
        yield
    except BaseException as error:
        problem = reason_of(error)
        raise
    finally:
        said: list[str | None] = [problem]
        if size > 1:
            said = [None] * size
            dist.all_gather_object(said, problem, group=group)
    for other, words in enumerate(said):
        if words is not None:
            raise CommitError(f"rank {other} gave up, so rank {rank} does: {words}")


@dataclass(frozen=True, slots=True)
class _Common:
    """What rank 0 tells the others. launch: new with every call."""

    model: ModelKey
    instance: str
    launch: str


def _told(
    model: PreTrainedModel,
    config: Config,
    disk: Checkpoint | None,
    client: CoordinatorClient,
    checkpoint: str | Path | None,
    instance: str,
    find: bool,
) -> _Common:
    """find: without a checkpoint or a configured revision, take the one that is on offer."""
    launch = uuid.uuid4().hex
    known_as = str(checkpoint or getattr(model.config, "name_or_path", "") or "")
    if disk is not None:
        own = config.model_name or config.revision
        offered = () if own else {holding.model for holding in client.status().holdings}
        key = disk.key(config.model_name, config.revision, known_as=known_as, offered=offered)
    elif name := name_of(config.model_name, known_as):
        key = ModelKey(name, config.revision or (_revision(client, name) if find else ""))
        if not key.revision and not find:
            raise ConfigError(
                f"the checkpoint of {name} isn't at hand, so nobody can tell whether these weights are its",
                next_step="set `revision` in the configuration to a name of these weights, or give the checkpoint's directory",
            )
    else:
        raise ConfigError("the model has neither a name nor a checkpoint", next_step="set model_name in the configuration")
    return _Common(key, instance or f"{socket.gethostname()}-{launch[:8]}", launch)


def _revision(client: CoordinatorClient, name: str) -> str:
    found = sorted({h.model.revision for h in client.status().holdings if h.model.name == name})
    if len(found) > 1:
        raise ConfigError(f"{name} is offered in revisions {', '.join(found)}", next_step="set revision in the configuration")
    return found[0] if found else ""


def _directory(model: PreTrainedModel, config: Config, checkpoint: str | Path | None) -> Path | None:
    """Where the checkpoint lies on disk; None if nobody says so, or it isn't there."""
    if checkpoint is not None:
        return Path(checkpoint)
    for place in (config.model_name, str(getattr(model.config, "name_or_path", "") or "")):
        if place and _is_checkpoint(Path(place)):
            return Path(place)
        if place and not Path(place).exists():
            try:
                found = cached_file(place, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
            except OSError:  # no such name at the Hub either
                continue
            if found is not None and _is_checkpoint(Path(found).parent):
                return Path(found).parent
    return None


def _is_checkpoint(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (SINGLE, INDEX))


def settings_of(config: Settings) -> Config:
    """As a `Config`, whatever form it has. Raises ConfigError."""
    if isinstance(config, Config):
        return config
    if config is None or isinstance(config, str):
        return Config.load(config or "")
    return Config.from_mapping(config)
