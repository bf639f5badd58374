"""Load what each rank of an instance needs out of running seeds, verify it, and write it as safetensors: one file a rank,
byte-identical to a direct shard of the checkpoint. Needs no copy of the model: seeds publish its configuration.

Examples:
  peerload pull --model my-llama --tp 4 --out shards/ --url coordinator:7070
  peerload pull --model my-llama --tp 4 --rank 2 --out shards/

A rank pulled alone can't prove a tensor of which the seeds announce a larger part than it reads; the receipt says how many
bytes that are. Pull all ranks to prove every byte: exit status 0 then means that all are, unless verify is off.

"""

from __future__ import annotations

import argparse
import time
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from ..console import Console
from ..coordinator.client import CoordinatorClient
from ..deadline import Deadline
from ..errors import ConfigError, SourcesExhausted, VerifyError
from ..model.catalog import ModelKey
from ..receipt import Receipt
from .options import add_config, add_parallel, config_of, parallel_of
from .ranks import layouts_of

#: What the coordinator may take to answer, seconds.
ANSWER_S: Final = 10.0


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="NAME", help="name of the model at the coordinator (see `peerload ls`)")
    parser.add_argument("--rank", type=int, default=None, metavar="R", help="only this rank (default: all ranks)")
    parser.add_argument("--out", required=True, metavar="DIR", type=Path, help="where to write rank-RRRRR-of-NNNNN.safetensors")
    add_parallel(parser)
    add_config(
        parser,
        "url",
        "revision",
        "transport",
        "interface",
        "registration",
        "match",
        "verify",
        "wait_s",
        "deadline_s",
        "staging_bytes",
        "threads",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from ..engines.bare import bare_ranks
    from ..engines.checkpoint import ModelFiles
    from ..engines.shards import writable, write_rank
    from ..job.rank import Member

    config, parallel = config_of(args, fallback="fail"), parallel_of(args)
    deadline = Deadline.after(config.deadline_s)
    size = parallel.tp * parallel.pp
    if args.rank is not None and not 0 <= args.rank < size:
        raise ConfigError(f"--rank is {args.rank}, {parallel} has ranks 0 to {size - 1}")
    writable(args.out)
    with ExitStack() as stack:
        client = stack.enter_context(CoordinatorClient(config.url))
        model = _resolve(client, args.model, config.revision, deadline.within(config.wait_s), deadline)
        offers = client.discover(model, deadline.within(ANSWER_S))
        if not offers:
            raise SourcesExhausted(
                f"the last seed of {model} has just left", next_step="start a seed, or wait for one with --wait-s"
            )
        catalog = offers[0].layout.catalog
        wanted = range(size) if args.rank is None else [args.rank]
        try:
            files = ModelFiles(client.discover_files(model, deadline.within(ANSWER_S)))
            layouts = layouts_of(files, parallel, wanted, catalog, deadline, console)
        except ConfigError as error:
            raise ConfigError(
                f"what the seeds of {model} publish can't be used: {error.message}", next_step=error.next_step
            ) from error
        member = Member(f"pull-{uuid.uuid4().hex[:6]}", size=1 if args.rank is not None else size, launch=uuid.uuid4().hex)
        show = stack.enter_context(console.rank_progress())
        config = config.replace(deadline_s=deadline.remaining_s)
        ranks = stack.enter_context(bare_ranks(layouts, model, member, config, client, on_bytes=show))
        paths = [write_rank(args.out, rank, size) for rank, _ in ranks]
    receipts = [receipt for _, receipt in ranks]
    console.document({"model": str(model), "files": [str(p) for p in paths], "receipts": [r.to_dict() for r in receipts]})
    _show(console, f"{model} as {parallel}", receipts, paths)
    unproven = sum(r.unverified_nbytes for r in receipts)
    if unproven:
        why = "could not be proven by the ranks that were pulled" if config.verifies else "are not proven: verify is off"
        console.say(f"{unproven / 1e6:.1f} MB {why}")
    return VerifyError.exit_code if unproven and config.verifies and args.rank is None else 0


def _show(console: Console, title: str, receipts: Sequence[Receipt], paths: Sequence[Path]) -> None:
    console.table(
        title,
        ("rank", "needed MB", "wire MB", "verified MB", "unproven MB", "operations", "GB/s", "seconds", "file"),
        [
            (
                r.rank,
                f"{r.needed_nbytes / 1e6:.1f}",
                f"{r.wire_nbytes / 1e6:.1f}",
                f"{r.verified_nbytes / 1e6:.1f}",
                f"{r.unverified_nbytes / 1e6:.1f}",
                r.operations,
                f"{r.transfer_gb_per_s:.1f}",
                f"{r.wall_s:.2f}",
                str(path),
            )
            for r, path in zip(receipts, paths, strict=True)
        ],
    )


def _resolve(client: CoordinatorClient, name: str, revision: str, patience: Deadline, deadline: Deadline) -> ModelKey:
    """The model of that name, whatever its revision if there is only one. Waits for a seed of it while there is `patience`."""

    def offered() -> list[ModelKey]:
        return sorted({h.model for h in client.status(deadline.within(ANSWER_S)).holdings})

    def wanted(models: list[ModelKey]) -> list[ModelKey]:
        return [m for m in models if m.name == name and (not revision or m.revision == revision)]

    models = wanted(all_of_them := offered())
    while not models and patience.remaining_s > 0:
        time.sleep(0.2)
        models = wanted(all_of_them := offered())
    if not models:
        known = ", ".join(map(str, all_of_them)) or "nothing"
        raise SourcesExhausted(
            f"nobody offers {name}{'@' + revision if revision else ''} at coordinator {client.url}, which knows {known}",
            next_step="start a seed, or wait for one with --wait-s",
        )
    if len(models) > 1:
        raise ConfigError(
            f"{name} is offered in revisions {', '.join(m.revision for m in models)}", next_step="choose with --revision"
        )
    return models[0]
