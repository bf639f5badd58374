"""Which checkpoint element each byte of an engine's parameters holds."""
