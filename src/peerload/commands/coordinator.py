"""Run the metadata server: who holds which part of which model, and until when. Weights never pass through it.

Example:
  peerload coordinator --listen 0.0.0.0:7070 --store sqlite:/var/lib/peerload/coordinator.db

The store remembers leases and votes. With SQLite (the default) a restart loses nothing. With `--store memory` a restart forgets
everything: running seeds announce themselves again within seconds, and loads in progress fail at once with a clear error. One
thing memory can't prevent: if the coordinator restarts while the ranks of an instance hear how their last vote ended, some of
them may go on to serve while the others fail.

"""

from __future__ import annotations

import argparse
import resource

from ..config import state_folder
from ..console import Console
from ..coordinator.server import serve
from ..errors import HostError

_CONNECTIONS = 1 << 16


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--listen", default="127.0.0.1:7070", metavar="HOST:PORT", help="default %(default)s; port 0 takes a free one"
    )
    parser.add_argument(
        "--store",
        metavar="memory|sqlite:PATH",
        help="what survives a restart: memory forgets leases and votes; default "
        "sqlite:$XDG_STATE_HOME/peerload/coordinator.db, where $XDG_STATE_HOME is ~/.local/state unless set",
    )


def run(args: argparse.Namespace, console: Console) -> int:
    store = _default_store() if args.store is None else args.store
    _allow_many_connections()
    with serve(args.listen, store) as coordinator:
        try:
            console.say(f"coordinator listens on {coordinator.address}, store {store}; stop it with Ctrl-C")
            console.document({"address": coordinator.address, "store": store})
            coordinator.wait()
        except KeyboardInterrupt:
            console.say("stopping")
    return 0


def _default_store() -> str:
    try:
        return f"sqlite:{state_folder() / 'coordinator.db'}"
    except RuntimeError as error:  # this user has no home
        raise HostError(f"no folder for the store: {error}", next_step="name one with --store sqlite:PATH") from error


def _allow_many_connections() -> None:
    """Each rank is a connection, and many systems allow 1024 descriptors unless asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _CONNECTIONS if hard == resource.RLIM_INFINITY else min(hard, _CONNECTIONS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
