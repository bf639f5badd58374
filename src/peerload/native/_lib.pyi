"""Types of the compiled helper; signatures follow the `.h` files. Pointers are cffi pointers."""

from typing import Protocol

class Pointer(Protocol):
    def __add__(self, items: int) -> Pointer: ...
    def __getitem__(self, item: int) -> int: ...

class _FFI(Protocol):
    def new(self, ctype: str, value: int = ...) -> Pointer: ...
    def from_buffer(self, ctype: str, buffer: object) -> Pointer: ...

class _Lib(Protocol):
    def peerload_copy(
        self, n: int, src: Pointer, dst: Pointer, run: Pointer, count: Pointer, src_step: Pointer, dst_step: Pointer
    ) -> None: ...
    def peerload_copy_mapped(
        self, n: int, src: Pointer, dst: Pointer, run: Pointer, count: Pointer, src_step: Pointer, dst_step: Pointer
    ) -> None: ...
    def peerload_read_process(
        self, pid: int, n: int, src: Pointer, dst: Pointer, run: Pointer, count: Pointer, src_step: Pointer, dst_step: Pointer,
        done: Pointer,
    ) -> int: ...  # fmt: skip
    def peerload_read_file(
        self, fd: int, n: int, src: Pointer, dst: Pointer, run: Pointer, count: Pointer, src_step: Pointer, dst_step: Pointer,
        done: Pointer,
    ) -> int: ...  # fmt: skip
    def peerload_fill(self, dst: int, ndim: int, shape: Pointer, stride: Pointer, pattern: bytes, nbytes: int) -> None: ...
    def peerload_reserve(self, nbytes: int) -> int: ...
    def peerload_map(self, address: int, nbytes: int, fd: int, offset: int) -> int: ...
    def peerload_unmap(self, address: int, nbytes: int) -> int: ...
    def peerload_permit_readers(self) -> int: ...
    def peerload_digest(
        self, n: int, dims: int, key: Pointer, shape: Pointer, itemsize: Pointer, tensor: Pointer, start: Pointer, stop: Pointer,
        address: Pointer, stride: Pointer, out: Pointer,
    ) -> None: ...  # fmt: skip

ffi: _FFI
lib: _Lib
