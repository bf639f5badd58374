"""The process of one rank: it opens the engine's model, loads, generates, says what it has, and serves until told to stop.

Imported once by the server that ranks are forked from, so that the engine is imported once for all of them.
"""

from __future__ import annotations

import hashlib
import logging
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
import transformers.models.llama.modeling_llama
from transformers import PreTrainedModel

from ..engines.transformers.open import greedy, parameters_of, stock_model
from ..errors import PeerloadError
from ..job.rank import Member
from ..model.catalog import Parallel
from ..testing.processes import wait_for_end
from .events import Failed, Generated, Progress, RankLoaded, RankSpec
from .replica import replica


def run_rank(spec: RankSpec, link: Connection) -> None:
    """Everything a rank does, its errors reported over `link`."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a clean way out
    torch.set_num_threads(1)  # ranks share the cores
    try:
        with ExitStack() as stack:
            if spec.size > 1:
                rendezvous = f"file://{spec.rendezvous}"
                dist.init_process_group("gloo", init_method=rendezvous, rank=spec.rank, world_size=spec.size)
                stack.callback(dist.destroy_process_group)
            model = _from_disk(spec, link) if spec.role == "disk" else _from_peers(spec, link, stack)
            tokens, text = _generate(model, spec)
            link.send(Generated(tokens, text, checksums(model)))
            wait_for_end(link)
    except KeyboardInterrupt:
        return
    except PeerloadError as error:
        traceback.print_exc()
        link.send(Failed(str(error), error.exit_code))
    except Exception as error:  # noqa: BLE001 - the last line of defence of a process: say it, with the traceback
        traceback.print_exc()
        link.send(Failed(f"{type(error).__name__}: {error}", 1))


def _from_disk(spec: RankSpec, link: Connection) -> PreTrainedModel:
    begun_s = _together(spec)
    model = stock_model(spec.model_dir, Parallel(tp=spec.size))
    built_s = time.perf_counter() - begun_s
    _touch(model)
    link.send(RankLoaded(engine_s=built_s, whole_s=time.perf_counter() - begun_s))
    return model


def _from_peers(spec: RankSpec, link: Connection, stack: ExitStack) -> PreTrainedModel:
    before = {"rss": 0}
    begun_s = _together(spec)

    def on_opened() -> None:
        _together(spec)
        before["rss"] = _reset_peak_rss()

    mine = stack.enter_context(
        replica(
            spec.model_dir,
            Parallel(tp=spec.size),
            Member(spec.instance, spec.rank, spec.size, spec.rendezvous),
            spec.config,
            attributes={"engine": f"transformers {transformers.__version__}"},
            on_opened=on_opened,
            on_bytes=_reporter(link),
        )
    )
    _touch(mine.opened.model)
    link.send(
        RankLoaded(
            engine_s=mine.engine_s,
            whole_s=time.perf_counter() - begun_s,
            receipt=mine.receipt,
            rss_before=before["rss"],
            rss_peak=_peak_rss(),
            held_nbytes=mine.opened.layout.nbytes,
        )
    )
    return mine.opened.model


def _together(spec: RankSpec) -> float:
    """Wait for the other ranks, so that all begin at once and figures compare; returns the time."""
    if spec.size > 1:
        dist.barrier()
    return time.perf_counter()


def _touch(model: PreTrainedModel) -> None:
    """Read one element of every page, so that what was only mapped counts as loaded when it is there."""
    for tensor in parameters_of(model).values():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        flat[::4096].sum()


def _generate(model: PreTrainedModel, spec: RankSpec) -> tuple[list[list[int]], list[str]]:
    """Greedy continuations of the prompts, as token ids and as text."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(spec.model_dir)
    tokens = [greedy(model, tokenizer(prompt).input_ids, spec.new_tokens) for prompt in spec.prompts]
    return tokens, [str(tokenizer.decode(ids)) for ids in tokens]


def _reporter(link: Connection) -> Callable[[str, int, int], None]:
    last_s = [0.0]

    def report(_phase: str, done: int, total: int) -> None:
        now_s = time.perf_counter()
        if done >= total or now_s - last_s[0] > 0.1:
            last_s[0] = now_s
            link.send(Progress(done, total))

    return report


def checksums(model: PreTrainedModel) -> dict[str, str]:
    """SHA-256 of this rank's bytes of every parameter and buffer."""
    found = {}
    for name, tensor in parameters_of(model).items():
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        found[name] = hashlib.sha256(flat.numpy().data).hexdigest()
    return found


def _status(field: str) -> int:
    """A field of /proc/self/status in bytes (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _reset_peak_rss() -> int:
    """Resident bytes now, which become the peak so far (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak_rss() -> int:
    return _status("VmHWM")
