"""The story: a coordinator, a seed instance, a target of another TP size, and the same target loaded from disk to compare."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..console import Console
from ..errors import ConfigError, HostError, PeerloadError
from ..memory.speed import fresh_gb_per_s, memcpy_gb_per_s
from ..receipt import Receipt
from .events import Event, Generated, Progress, RankLoaded, RankSpec
from .instance import DemoInstance

log = logging.getLogger(__name__)

PROMPTS = ("The weights of a model are", "Two replicas and a third that")
#: Importing an engine on a slow machine takes this long at most, seconds.
START_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happened. target: by rank. disk_s: the engine's own load of the slowest rank. differing: parameters and buffers
    whose bytes are not those of the disk baseline, as `rank 1: name`. tokens, text: by prompt, of the target."""

    model: str
    model_nbytes: int
    seed_tp: int
    target_tp: int
    memcpy_gb_per_s: float
    fresh_gb_per_s: float
    target: list[RankLoaded]
    disk_s: float
    differing: list[str]
    tokens_equal: bool
    tokens: list[list[int]]
    text: list[str]
    wall_s: float

    @property
    def equal(self) -> bool:
        return self.tokens_equal and not self.differing

    @property
    def receipts(self) -> list[Receipt]:
        return [event.receipt for event in self.target if event.receipt is not None]


def tell(console: Console, seed_tp: int, target_tp: int, model: str, config: Config, new_tokens: int) -> Story:
    """Do it all, for real, in processes that are gone when this returns. `model`: a directory, or empty to make one."""
    begun_s = time.perf_counter()
    with ExitStack() as stack:
        room = stack.enter_context(_room())
        directory = Path(model) if model else room / "demo-llama"
        if model and not (directory / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json", next_step="give a directory with a config and safetensors files")
        threads = len(os.sched_getaffinity(0))
        if not model:
            _make_checkpoint(console, directory)
        nbytes = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
        limit, fresh = memcpy_gb_per_s(), fresh_gb_per_s()
        console.say(
            f"limits: {threads} threads here copy {limit:.1f} GB/s, and {fresh:.1f} GB/s into memory that was never touched"
        )
        url = stack.enter_context(coordinator(room))
        console.say(f"coordinator listens on {url}")
        config = config.replace(url=url, model_name=config.model_name or directory.resolve().name)
        spec = RankSpec(
            role="peer",
            instance="seed",
            rank=0,
            size=seed_tp,
            model_dir=str(directory),
            config=config,
            prompts=PROMPTS,
            new_tokens=new_tokens,
        )
        seed = stack.enter_context(_shown(console, spec, room, f"seed TP{seed_tp}: loads from disk, then offers its memory"))
        seed.wait_for(Generated, START_S)
        target_spec = dataclasses.replace(spec, instance="target", size=target_tp, config=config.replace(fallback="fail"))
        with _shown(console, target_spec, room, f"target TP{target_tp}: loads from the seed's memory") as target:
            target_loaded, target_said = target.wait_for(RankLoaded, START_S), target.wait_for(Generated, START_S)
        seed.close()
        disk_spec = dataclasses.replace(target_spec, role="disk", instance="disk")
        with _shown(console, disk_spec, room, f"baseline TP{target_tp}: the engine's own load from disk") as disk:
            disk_loaded, disk_said = disk.wait_for(RankLoaded, START_S), disk.wait_for(Generated, START_S)
    return Story(
        model=directory.resolve().name,
        model_nbytes=nbytes,
        seed_tp=seed_tp,
        target_tp=target_tp,
        memcpy_gb_per_s=limit,
        fresh_gb_per_s=fresh,
        target=target_loaded,
        disk_s=max(event.engine_s for event in disk_loaded),
        differing=_differing(target_said, disk_said),
        tokens_equal=target_said[0].tokens == disk_said[0].tokens,
        tokens=target_said[0].tokens,
        text=target_said[0].text,
        wall_s=time.perf_counter() - begun_s,
    )


@contextmanager
def _room() -> Iterator[Path]:
    """A folder for checkpoint, store and logs, gone afterwards unless something failed: then the logs say what."""
    room = Path(tempfile.mkdtemp(prefix="peerload-demo-"))
    try:
        yield room
    except PeerloadError:
        for file in room.rglob("*.safetensors"):
            file.unlink()
        raise
    except BaseException:
        shutil.rmtree(room, ignore_errors=True)
        raise
    shutil.rmtree(room)


def _make_checkpoint(console: Console, directory: Path) -> None:
    from ..testing.checkpoints import make_checkpoint

    console.say("making a Llama checkpoint (real config and tokenizer, seeded random weights) ...")
    with contextlib.redirect_stdout(sys.stderr):
        make_checkpoint(directory, "llama", "demo")


@contextmanager
def coordinator(room: Path) -> Iterator[str]:
    """A coordinator in a process of its own, on a free port; yields HOST:PORT."""
    with (room / "coordinator.log").open("w") as errors:
        command = [
            sys.executable,
            "-m",
            "peerload",
            "coordinator",
            "--listen",
            "127.0.0.1:0",
            "--store",
            f"sqlite:{room}/db",
            "--json",
        ]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None, "a pipe was asked for"
            line = process.stdout.readline()
            if not line:
                raise HostError("the coordinator did not start", next_step=f"read {errors.name}")
            yield str(json.loads(line)["address"])
        finally:
            process.terminate()
            process.wait(10)


@contextmanager
def _shown(console: Console, spec: RankSpec, room: Path, title: str) -> Iterator[DemoInstance]:
    """A running instance, with its progress on the console."""
    console.say(title)
    with console.rank_progress() as show:

        def on_event(rank: int, event: Event) -> None:
            if isinstance(event, Progress):
                show(rank, event.done, event.total)

        with DemoInstance(spec, room, on_event) as instance:
            yield instance


def _differing(ours: Sequence[Generated], theirs: Sequence[Generated]) -> list[str]:
    """Parameters and buffers whose bytes differ between two instances, or that only one has, as `rank 1: name`."""
    found = []
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        names = sorted(a.checksums.keys() | b.checksums.keys())
        found += [f"rank {rank}: {name}" for name in names if a.checksums.get(name) != b.checksums.get(name)]
    return found
