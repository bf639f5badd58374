"""HOST:PORT, checked before gRPC sees it."""

from __future__ import annotations

from ..errors import ConfigError


def checked_address(text: str, setting: str, lowest_port: int = 1) -> str:
    """`text` as it came. Raises ConfigError, naming the setting, when it is no HOST:PORT."""
    host, _, port = text.rpartition(":")
    if not host or any(c.isspace() or c in "/,@" for c in host) or (":" in host and not host.startswith("[")):
        raise ConfigError(f"{setting} {text!r} is no HOST:PORT", next_step="write it as in 10.0.0.1:7070 or [::1]:7070")
    if not (port.isascii() and port.isdigit() and len(port) <= 5 and lowest_port <= int(port) <= 65535):
        raise ConfigError(f"{setting} {text!r}: the port must be a number from {lowest_port} to 65535")
    return text
