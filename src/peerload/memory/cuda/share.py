"""Can GPU memory be shared between processes here? Tried with two: this one exports, a child of it maps and reads.

Run as a module it is the child: GPU and handle as arguments, the bytes it reads on standard output."""

from __future__ import annotations

import subprocess
import sys
from typing import Final

import numpy as np

from ...errors import HostError
from .driver import Device, Stream

CONTENT: Final = b"peerload's bytes"
#: A block of its own, so that nothing else is shared.
NBYTES: Final = 2 << 20
#: Two contexts are made, which takes a second or two on a busy host.
PATIENCE_S: Final = 60.0


def share(name: str) -> None:
    """Raises HostError, with what failed, if another process can't read memory of GPU `name`."""
    device = Device(name)
    try:
        address = device.allocate(NBYTES)
        try:
            device.write(address, CONTENT)
            command = [sys.executable, "-m", __name__, name, device.export(address).hex()]
            try:
                done = subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False)
            except subprocess.TimeoutExpired as error:
                raise HostError(f"a process that was to read memory of {name} hasn't answered for {PATIENCE_S:.0f} s") from error
            if done.returncode or done.stdout != CONTENT:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                raise HostError(f"another process can't read memory of {name}: {said[-1] if said else 'it read other bytes'}")
        finally:
            device.free(address)
    finally:
        device.close()


def _read(name: str, handle: str) -> bytes:
    device, found = Device(name), np.empty(len(CONTENT), np.uint8)
    address = device.open(bytes.fromhex(handle))
    stream = Stream(device)
    stream.download(found.ctypes.data, address, found.nbytes)
    stream.wait()
    device.shut(address)
    return found.tobytes()


if __name__ == "__main__":
    try:
        sys.stdout.buffer.write(_read(*sys.argv[1:]))
    except HostError as refused:
        sys.exit(refused.message)
