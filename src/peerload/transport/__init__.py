"""Ways to read another process's memory, or a file, into ours."""
