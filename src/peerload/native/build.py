"""Describes the extension `peerload.native._lib` to cffi. Run by setup.py; never imported by the package.

To add a C file: write NAME.c and NAME.h (plain prototypes and comments, no preprocessor lines) and list NAME below.
"""

from pathlib import Path

import cffi

PARTS = ["copy", "digest", "tables"]

root = Path("src/peerload/native")
headers = [root / f"{part}.h" for part in PARTS]
builder = cffi.FFI()
for header in headers:
    builder.cdef(header.read_text(encoding="utf-8"))
builder.set_source(
    "peerload.native._lib",
    "#include <stdint.h>\n" + "".join(f'#include "{header.name}"\n' for header in headers),
    sources=[str(root / f"{part}.c") for part in PARTS],
    include_dirs=[str(root)],
    depends=[str(header) for header in headers],
    extra_compile_args=["-O3", "-std=gnu11", "-Wall"],
)
