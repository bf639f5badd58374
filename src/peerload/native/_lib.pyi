"""Types of the compiled helper; signatures follow the `.h` files. Pointers are cffi pointers."""

from typing import NewType, Protocol

Pointer = NewType("Pointer", object)

class _FFI(Protocol):
    def cast(self, ctype: str, value: int) -> Pointer: ...
    def from_buffer(self, ctype: str, buffer: object, require_writable: bool = ...) -> Pointer: ...

class _Lib(Protocol):
    def peerload_copy(
        self, n: int, src: Pointer, dst: Pointer, run: Pointer, count: Pointer, src_step: Pointer, dst_step: Pointer
    ) -> None: ...
    def peerload_digest(
        self, n: int, dims: int, key: Pointer, shape: Pointer, itemsize: Pointer, tensor: Pointer, start: Pointer,
        stop: Pointer, address: Pointer, stride: Pointer, out: Pointer,
    ) -> None: ...

ffi: _FFI
lib: _Lib
