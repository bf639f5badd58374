"""Small models of real architectures: configuration and tensors as published checkpoints have them, derived by rule.

    family.py    what a family is, and how its files are written
    decoder.py   what decoders share
    dense.py     Llama and those named like it
    older.py     GPT-2, OPT, GPT-NeoX, Falcon
    sparse.py    routed experts
    named.py     all of them, by name

For tests that need an engine's own classes and loaders, not a model that answers well. A probe takes seconds, and every size
divides as engines split it over up to four ranks: the vocabulary leaves padding on the last one, FP8 blocks and quantization
groups of 128 end where a rank's part ends. `tests/unit/test_families.py` compares the unquantized catalogs with what
transformers would save.
"""

from ..rules import Sizes
from .dense import llama
from .family import Family, write_family
from .named import FAMILIES
from .sparse import qwen3_moe

__all__ = ["FAMILIES", "Family", "Sizes", "llama", "qwen3_moe", "write_family"]
