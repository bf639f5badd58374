"""Benchmarks, run by `peerload bench NAME`. Each is a module that runs as a script and ends in one line of JSON."""
