"""Decoded blobs by digest: what many offers share is fetched and decoded once, and is one object afterwards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from ..errors import CoordinatorError, ManifestError
from ..model.catalog import Catalog
from ..model.layout import Layout
from . import codec
from .codec import Blob, Kind


class BlobMissing(CoordinatorError):
    """The coordinator never had the blob, or restarted and forgot it: put it again."""


#: Gets a blob by digest, or raises.
Fetch = Callable[[str], Blob]


class Blobs:
    """Keeps all it ever decoded: one per load, or per model. Thread-safe; two threads may fetch the same blob at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._catalogs: dict[str, Catalog] = {}
        self._layouts: dict[str, Layout] = {}
        self._digests: dict[str, tuple[npt.NDArray[np.uint64] | None, str]] = {}

    def catalog(self, digest: str, fetch: Fetch) -> Catalog:
        known = self._catalogs.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_catalog(_data(digest, Kind.CATALOG, fetch))
        with self._lock:
            return self._catalogs.setdefault(digest, fresh)

    def layout(self, digest: str, fetch: Fetch) -> Layout:
        known = self._layouts.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_layout(_data(digest, Kind.LAYOUT, fetch), lambda catalog: self.catalog(catalog, fetch))
        with self._lock:
            return self._layouts.setdefault(digest, fresh)

    def digests(self, digest: str, fetch: Fetch) -> tuple[npt.NDArray[np.uint64] | None, str]:
        known = self._digests.get(digest)
        if known is not None:
            return known
        fresh = codec.decode_digests(_data(digest, Kind.DIGESTS, fetch))
        with self._lock:
            return self._digests.setdefault(digest, fresh)

    def files(self, digest: str, fetch: Fetch) -> Mapping[str, bytes]:
        return codec.decode_files(_data(digest, Kind.FILES, fetch))


def _data(digest: str, kind: Kind, fetch: Fetch) -> bytes:
    blob = fetch(digest)
    if blob.kind is not kind:
        raise ManifestError(kind.name.lower(), f"blob {digest[:12]} is a {blob.kind.name}")
    return blob.data
