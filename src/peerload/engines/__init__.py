"""Inference engines and checkpoints: the only importers of vendors' engines."""
