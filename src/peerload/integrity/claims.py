"""What sources announced (`Claims`) and what target ranks measured (`Measured`), which ranks exchange as bytes."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from ..errors import ManifestError, VerifyError
from ..model.boxes import IntArray, pad_left, volumes
from ..model.catalog import Catalog, TensorSpec, is_derived
from ..model.offer import ALGORITHM, Offer, SourceId
from .digest import PRIME, DigestArray, tensor_keys

_MAGIC: Final = b"PLM1"


@dataclass(frozen=True, slots=True, eq=False)
class Claims:
    """Box start[i]..stop[i] ([n, width]) of catalog row tensor[i] has digest[i], says sources[source[i]]."""

    catalog: Catalog
    tensor: IntArray
    start: IntArray
    stop: IntArray
    digest: DigestArray
    source: IntArray
    sources: tuple[str, ...]

    @classmethod
    def of(cls, catalog: Catalog, offers: Sequence[Offer]) -> Claims:
        """What offers announce about tensors of `catalog`; tensors are matched by name, dtype and shape. Offers without
        digests say nothing."""
        width, heard = catalog.width, [o for o in offers if o.binding.digests is not None]
        columns: list[tuple[IntArray, ...]] = []
        digests: list[DigestArray] = []
        known: dict[int, IntArray] = {}
        for i, offer in enumerate(heard):
            theirs, pieces = offer.layout.catalog, offer.layout.pieces
            if id(theirs) not in known:
                known[id(theirs)] = _rows_of(catalog, theirs)
            tensor = known[id(theirs)][pieces.tensor]
            rows = np.flatnonzero(tensor >= 0)
            cut = max(0, pieces.start.shape[1] - width)
            start, stop = pad_left(pieces.start[rows, cut:], width, 0), pad_left(pieces.stop[rows, cut:], width, 1)
            columns.append((tensor[rows], start, stop, np.full(len(rows), i)))
            assert offer.binding.digests is not None
            digests.append(offer.binding.digests[rows])
        names = tuple(str(o.source) for o in heard)
        if not columns:
            none, boxes = np.zeros(0, np.int64), np.zeros((0, width), np.int64)
            return cls(catalog, none, boxes, boxes, np.zeros(0, np.uint64), none, names)
        tensor, start, stop, source = (np.concatenate(c) for c in zip(*columns, strict=True))
        return cls(catalog, tensor, start, stop, np.concatenate(digests), source, names)

    def __len__(self) -> int:
        return len(self.tensor)


def _rows_of(ours: Catalog, theirs: Catalog) -> IntArray:
    """Our row of each of their tensors, -1 where we have none of that name, dtype and shape."""
    if ours == theirs:
        return np.arange(len(theirs))
    rows = (ours.row.get(spec.name, -1) for spec in theirs)
    return np.array([r if r >= 0 and ours[r] == spec else -1 for r, spec in zip(rows, theirs, strict=True)], np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """Rank rank[i] holds box start[i]..stop[i] of catalog row tensor[i], read from sources[source[i]], with digest[i].

    sources: with the generation that was read; an empty one is a rank's own checkpoint."""

    catalog: Catalog
    rank: IntArray
    tensor: IntArray
    start: IntArray
    stop: IntArray
    digest: DigestArray
    source: IntArray
    sources: tuple[SourceId, ...]

    def __post_init__(self) -> None:
        n, width = len(self.tensor), self.catalog.width
        if not len(self.rank) == len(self.digest) == len(self.source) == n:
            raise ValueError("columns differ in length")
        if not self.start.shape == self.stop.shape == (n, width):
            raise ValueError(f"boxes must have {width} dimensions")

    def __len__(self) -> int:
        return len(self.tensor)

    @property
    def nbytes(self) -> IntArray:
        """[n]"""
        return volumes(self.start, self.stop) * self.catalog.itemsize[self.tensor]

    @classmethod
    def join(cls, parts: Sequence[Measured]) -> Measured:
        """All rows, part after part, so that each rank's keep their order. At least one part; their catalogs may differ in
        derived tensors, of which the whole has all."""
        whole = Catalog.of(dict.fromkeys(spec for part in parts for spec in part.catalog))
        parts = [part._in(whole) for part in parts]
        sources = tuple(dict.fromkeys(source for part in parts for source in part.sources))
        number = {source: i for i, source in enumerate(sources)}
        renumbered = [np.array([number[s] for s in p.sources] or [0], np.int64)[p.source] for p in parts]
        rank, tensor, start, stop = (np.concatenate([getattr(p, c) for p in parts]) for c in ("rank", "tensor", "start", "stop"))
        digest = np.concatenate([p.digest for p in parts])
        return cls(whole, rank, tensor, start, stop, digest, np.concatenate(renumbered), sources)

    def skewed(self) -> frozenset[str]:
        """Instances that were read before and after their weights changed, or they restarted: either one rank in two
        generations, or ranks that have changed a different number of times."""
        found: dict[tuple[str, int], set[str]] = {}
        changes: dict[str, set[int]] = {}
        for source in self.sources:
            found.setdefault((source.instance, source.rank), set()).add(source.generation)
            changes.setdefault(source.instance, set()).add(source.changes)
        skewed = {instance for (instance, _), generations in found.items() if len(generations) > 1}
        return frozenset(skewed | {instance for instance, counts in changes.items() if len(counts) > 1})

    def _in(self, whole: Catalog) -> Measured:
        """The same rows, numbered as in a catalog that has all of ours."""
        start, stop = pad_left(self.start, whole.width, 0), pad_left(self.stop, whole.width, 1)
        tensor = _rows_of(whole, self.catalog)[self.tensor]
        return Measured(whole, self.rank, tensor, start, stop, self.digest, self.source, self.sources)

    def encode(self) -> bytes:
        """For the exchange between ranks: about 10 bytes a row, the digests above all."""
        common, derived = _split(self.catalog)
        sources = [(s.instance, s.rank, s.generation) for s in self.sources]
        fingerprint = _fingerprint(common)
        head = {"algorithm": ALGORITHM, "rows": len(self), "catalog": fingerprint, "derived": derived, "sources": sources}
        text = json.dumps(head).encode()
        tensor = _rows_of(Catalog.of([*common, *derived]), self.catalog)[self.tensor] if derived else self.tensor
        table = np.column_stack([self.rank, tensor, self.source, self.start, self.stop]).astype("<i8")
        # Differences down each column are mostly zeros and small repeats, which pack well.
        packed = zlib.compress(np.diff(table, axis=0, prepend=0).T.tobytes(), 1)
        return b"".join([_MAGIC, struct.pack("<I", len(text)), text, self.digest.astype("<u8").tobytes(), packed])

    @classmethod
    def decode(cls, data: bytes, catalog: Catalog) -> Measured:
        """catalog: of the rank that reads this. Raises VerifyError for bytes that `encode` can't have made, or that are about
        a catalog which differs in more than derived tensors."""
        common, _ = _split(catalog)
        try:
            (size,) = struct.unpack_from("<I", data, len(_MAGIC))
            at = len(_MAGIC) + 4 + size
            head = json.loads(data[at - size : at])
            if head["algorithm"] != ALGORITHM:
                raise VerifyError(f"a rank measured by another digest than {ALGORITHM}: {head['algorithm']!r:.80}")
            n, theirs = max(0, int(head["rows"])), head["catalog"]
            sources = tuple(SourceId(str(name), int(number), str(generation)) for name, number, generation in head["sources"])
            digest = np.frombuffer(data, "<u8", n, at).astype(np.uint64)
            derived = [TensorSpec(str(name), str(dtype), tuple(map(int, shape))) for name, dtype, shape in head["derived"]]
            catalog = Catalog.of([*common, *derived])
            width, shape = 3 + 2 * catalog.width, catalog.shape
            raw = zlib.decompressobj().decompress(data[at + 8 * n :], 8 * n * width + 1) if n else b""
            steps = np.frombuffer(raw, "<i8").reshape(width, n)
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, RecursionError, zlib.error, ManifestError) as error:
            raise VerifyError(f"a rank's measurements are garbled: {type(error).__name__}: {error}") from error
        if not data.startswith(_MAGIC) or theirs != _fingerprint(common):
            raise VerifyError(
                "a rank measured another list of tensors than this one plans with",
                next_step="start all ranks of an instance with the same version, model and revision",
            )
        table = np.cumsum(steps, axis=1, dtype=np.int64)
        rank, tensor, source = table[:3]
        start, stop = table[3 : 3 + catalog.width].T.copy(), table[3 + catalog.width :].T.copy()
        inside = (tensor >= 0) & (tensor < len(catalog)) & (source >= 0) & (source < len(sources))
        inside &= (rank >= 0) & (digest < PRIME)
        if not inside.all() or (start < 0).any() or (stop <= start).any() or (stop > shape[tensor]).any():
            raise VerifyError("a rank's measurements name a box outside its tensor, or a digest out of range")
        return cls(catalog, rank, tensor, start, stop, digest, source, sources)


def _split(catalog: Catalog) -> tuple[Catalog, list[TensorSpec]]:
    """What all ranks of an instance have, and the derived tensors, which may be a rank's own."""
    derived = [spec for spec in catalog if is_derived(spec.name)]
    return (Catalog.of(s for s in catalog if not is_derived(s.name)), derived) if derived else (catalog, derived)


def _fingerprint(catalog: Catalog) -> str:
    return f"{len(catalog)}:{hashlib.blake2b(tensor_keys(catalog).tobytes(), digest_size=16).hexdigest()}"
