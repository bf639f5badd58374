"""One rank loads, and serves."""
