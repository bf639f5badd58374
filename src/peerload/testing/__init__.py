"""Layout generators, strategies, oracles and conformance classes: shipped, for tests of this package and of others."""
