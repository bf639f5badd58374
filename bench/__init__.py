"""Benchmarks: each is a script, and `peerload.bench.NAME` of an installed package. `peerload bench` runs them."""
