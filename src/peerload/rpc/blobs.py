"""Decoded blobs by digest: what many offers share is fetched and decoded once, and is one object afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..errors import ManifestError
from ..manifest import Catalog, Layout
from . import codec
from .codec import Blob, Kind


class Blobs:
    """`fetch` gets a blob by digest, or raises. Keeps all it ever decoded: one per load, or per model. Thread-safe;
    two threads may fetch the same blob at the same time."""

    def __init__(self, fetch: Callable[[str], Blob]) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._catalogs: dict[str, Catalog] = {}
        self._layouts: dict[str, Layout] = {}
        self._digests: dict[str, npt.NDArray[np.uint64]] = {}

    def catalog(self, digest: str) -> Catalog:
        known = self._catalogs.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_catalog(self._data(digest, Kind.CATALOG))
        with self._lock:
            return self._catalogs.setdefault(digest, fresh)

    def layout(self, digest: str) -> Layout:
        known = self._layouts.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_layout(self._data(digest, Kind.LAYOUT), self.catalog)
        with self._lock:
            return self._layouts.setdefault(digest, fresh)

    def digests(self, digest: str) -> npt.NDArray[np.uint64]:
        known = self._digests.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_digests(self._data(digest, Kind.DIGESTS))
        with self._lock:
            return self._digests.setdefault(digest, fresh)

    def files(self, digest: str) -> Mapping[str, bytes]:
        return codec.decode_files(self._data(digest, Kind.FILES))

    def _data(self, digest: str, kind: Kind) -> bytes:
        blob = self._fetch(digest)
        if blob.kind is not kind:
            raise ManifestError(kind.name.lower(), f"blob {digest[:12]} is a {blob.kind.name}")
        return blob.data
