"""Run the metadata server: who holds which part of which model, and until when. Weights never pass through it.

Example:
  peerload coordinator --listen 0.0.0.0:7070 --store sqlite:/var/lib/peerload/coordinator.db

With the memory store a restart forgets everything, and running seeds announce themselves again within seconds.

"""

from __future__ import annotations

import argparse

from ..console import Console
from ..rpc.server import serve


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", default="127.0.0.1:7070", metavar="HOST:PORT", help="default %(default)s; port 0 takes a free one"
    )
    parser.add_argument(
        "--store", default="memory", metavar="memory|sqlite:PATH", help="what survives a restart; default %(default)s"
    )


def run(args: argparse.Namespace, console: Console) -> int:
    with serve(args.listen, args.store) as coordinator:
        try:
            console.say(f"coordinator listens on {coordinator.address}, store {args.store}; stop it with Ctrl-C")
            console.document({"address": coordinator.address, "store": args.store})
            coordinator.wait()
        except KeyboardInterrupt:
            console.say("stopping")
    return 0
