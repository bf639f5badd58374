"""Who reads which box from whom. Pure: no I/O."""
