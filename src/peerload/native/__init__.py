"""The C helper: `from peerload.native._lib import ffi, lib`. Its functions run without the interpreter lock.

What each function promises stands in the `.h` files here, which are both the C prototypes and the cffi declarations.
"""
