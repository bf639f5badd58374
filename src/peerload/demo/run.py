"""The story: a coordinator, a seed instance, a target of another TP size, and the same target loaded from disk to compare."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..config import Config
from ..console import Console
from ..errors import ConfigError, HostError
from ..limits import memcpy_gb_per_s
from .instance import Event, Instance, RankSpec

log = logging.getLogger(__name__)

PROMPTS = ("The weights of a model are", "Two replicas and a third that")
#: Importing an engine on a slow machine takes this long at most, seconds.
START_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """What happened. `target` and `seed`: events "loaded" by rank; tokens by prompt; checksums by rank and parameter."""

    model: str
    model_nbytes: int
    seed_tp: int
    target_tp: int
    transport: str
    memcpy_gb_per_s: float
    memcpy_threads: int
    seed: list[Event]
    target: list[Event]
    disk_s: float
    differing: list[str]
    tokens_equal: bool
    tokens: list[list[int]]
    text: list[str]
    wall_s: float

    @property
    def equal(self) -> bool:
        return self.tokens_equal and not self.differing

    def receipts(self) -> list[Mapping[str, object]]:
        return [json.loads(str(event["receipt"])) for event in self.target]


def tell(console: Console, seed_tp: int, target_tp: int, model: str, config: Config, new_tokens: int) -> Story:
    """Do it all, for real, in processes that are gone when this returns. `model`: a directory, or empty to make one."""
    begun_s = time.perf_counter()
    with ExitStack() as stack:
        room = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peerload-demo-")))
        directory = Path(model) if model else room / "demo-llama"
        if model and not (directory / "config.json").is_file():
            raise ConfigError(f"{model} has no config.json", next_step="give a directory with a config and safetensors files")
        threads = len(os.sched_getaffinity(0))
        if not model:
            _make_checkpoint(console, directory)
        nbytes = sum(p.stat().st_size for p in directory.glob("*.safetensors"))
        limit = memcpy_gb_per_s()
        console.say(f"limit: this machine copies {limit:.1f} GB/s with {threads} threads")
        url = stack.enter_context(coordinator(room))
        console.say(f"coordinator listens on {url}")
        config = config.replace(url=url, model_name=config.model_name or directory.resolve().name)
        spec = RankSpec(
            role="peer", instance="seed", rank=0, size=seed_tp, model_dir=str(directory), config=config, rendezvous="", log_path="",
            prompts=PROMPTS, new_tokens=new_tokens,
        )  # fmt: skip
        seed = stack.enter_context(_shown(console, spec, room, f"seed TP{seed_tp}: loads from disk, then offers its memory"))
        seed_loaded = seed.wait_for("loaded", START_S)
        seed.wait_for("generated", START_S)
        target_spec = dataclasses.replace(spec, instance="target", size=target_tp, config=config.replace(fallback="fail"))
        with _shown(console, target_spec, room, f"target TP{target_tp}: loads from the seed's memory") as target:
            target_loaded = target.wait_for("loaded", START_S)
            target_said = target.wait_for("generated", START_S)
        seed.stop()
        disk_spec = dataclasses.replace(target_spec, role="disk", instance="disk")
        with _shown(console, disk_spec, room, f"baseline TP{target_tp}: the engine's own load from disk") as disk:
            disk_loaded = disk.wait_for("loaded", START_S)
            disk_said = disk.wait_for("generated", START_S)
    return Story(
        model=directory.resolve().name, model_nbytes=nbytes, seed_tp=seed_tp, target_tp=target_tp, transport=config.transport,
        memcpy_gb_per_s=limit, memcpy_threads=threads, seed=seed_loaded, target=target_loaded,
        disk_s=max(float(str(e["seconds"])) for e in disk_loaded), differing=_differing(target_said, disk_said),
        tokens_equal=target_said[0]["tokens"] == disk_said[0]["tokens"], tokens=target_said[0]["tokens"],  # type: ignore[arg-type]
        text=target_said[0]["text"], wall_s=time.perf_counter() - begun_s,  # type: ignore[arg-type]
    )  # fmt: skip


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
def _shown(console: Console, spec: RankSpec, room: Path, title: str) -> Iterator[Instance]:
    """A running instance, with its progress on the console."""
    console.say(title)
    with console.rank_progress() as show:

        def on_event(rank: int, event: Event) -> None:
            if event["kind"] == "progress":
                show(rank, int(str(event["done"])), int(str(event["total"])))

        with Instance(spec, room, on_event) as instance:
            yield instance


def _differing(ours: list[Event], theirs: list[Event]) -> list[str]:
    """Parameters and buffers whose bytes differ between two instances, or that only one has, as `rank 1: name`."""
    found = []
    for rank, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        mine, other = a["checksums"], b["checksums"]
        assert isinstance(mine, dict), "checksums come by name"
        assert isinstance(other, dict), "checksums come by name"
        found += [f"rank {rank}: {name}" for name in sorted(mine.keys() | other.keys()) if mine.get(name) != other.get(name)]
    return found
