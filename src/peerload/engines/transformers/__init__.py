"""transformers: `peerload.load` and `peerload.seed`, and its layouts without an instance."""
