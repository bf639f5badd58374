"""The oracle of the trace: a real load of coded values, read back element by element."""
