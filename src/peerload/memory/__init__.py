"""Bytes on this host: what may be touched, allocated, copied, filled and hashed."""
