"""For all tests: processes they start hear Ctrl-C, also where a shell's background job was born deaf to it."""

from __future__ import annotations

import signal

signal.signal(signal.SIGINT, signal.default_int_handler)
