"""Serve a checkpoint's weights from memory, without an engine: each rank of the given layout is loaded (from running seeds if
there are any, else from disk) and offered until Ctrl-C. What a rank holds follows from the model's own parallel plan. If another
process takes the place of a rank, the seed ends with status 1.

Example:
  peerload seed --checkpoint /models/my-llama --tp 2 --url coordinator:7070

"""

from __future__ import annotations

import argparse
import uuid
from contextlib import ExitStack
from queue import SimpleQueue

from ..console import Console
from ..deadline import Deadline
from ..errors import LeaseSuperseded
from .options import add_config, add_parallel, config_of, parallel_of
from .ranks import layouts_of


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a directory with config.json and safetensors files")
    parser.add_argument("--instance", default="", metavar="NAME", help="name of this instance (default: seed- and random digits)")
    add_parallel(parser)
    add_config(
        parser,
        "url",
        "model_name",
        "revision",
        "transport",
        "interface",
        "registration",
        "match",
        "verify",
        "fallback",
        "wait_s",
        "deadline_s",
        "threads",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    from ..coordinator.client import CoordinatorClient
    from ..engines.bare import bare_ranks
    from ..engines.checkpoint import Checkpoint, ModelFiles
    from ..job.rank import Member, kept_open
    from ..job.seed import Seed
    from ..transport.registry import opened_transports

    config, parallel = config_of(args), parallel_of(args)
    deadline = Deadline.after(config.deadline_s)
    checkpoint = Checkpoint.open(args.checkpoint)
    files = ModelFiles.of(args.checkpoint)
    model = checkpoint.key(config.model_name, config.revision)
    instance = args.instance or f"seed-{uuid.uuid4().hex[:6]}"
    size = parallel.tp * parallel.pp
    console.say(f"{instance}: working out what {size} ranks of {model} hold")
    layouts = layouts_of(files, parallel, range(size), checkpoint.catalog, deadline, console)
    ended: SimpleQueue[LeaseSuperseded] = SimpleQueue()
    with ExitStack() as stack:
        client = stack.enter_context(CoordinatorClient(config.url))
        show = stack.enter_context(console.rank_progress())
        member = Member(instance, size=size, launch=uuid.uuid4().hex)
        timed = config.replace(deadline_s=deadline.remaining_s)
        loading = bare_ranks(layouts, model, member, timed, client, reserve=[checkpoint.offer()], on_bytes=show)
        ranks = stack.enter_context(loading)
        serving = kept_open(stack.enter_context(opened_transports(config)))
        for bare, receipt in ranks:
            rank = bare.rank(model, member, config, client, serving)
            about = {"engine": "none"}
            seed = Seed(rank, files=files.contents, attributes=about, proven=receipt.digests, on_ended=ended.put)
            stack.enter_context(seed)
        held = sum(bare.layout.nbytes for bare, _ in ranks)
        receipts = [r.to_dict() for _, r in ranks]
        try:
            console.say(f"{instance} offers {model} as {parallel}: {size} ranks, {held / 1e6:.0f} MB; stop it with Ctrl-C")
            console.document(
                {"instance": instance, "model": str(model), "parallel": str(parallel), "bytes": held, "receipts": receipts}
            )
            raise ended.get()
        except KeyboardInterrupt:
            console.say(f"{instance}: withdrawing")
            return 0
