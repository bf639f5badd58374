"""Rewrites of quantized weights that don't depend on how a model is split, and how a target takes their results.

An engine's post-processing requantizes some weights. Where it does so block by block, or with scales that every rank has, the
result R(x) of a checkpoint tensor x has x's shape and can be cut like x. So R(x) is a logical tensor of its own: seeds offer
it, targets plan for it. A target puts R(x) into its load-time tensors with scales from which its engine's unmodified
post-processing makes the same bytes again (a right inverse).

Nobody is asked whether an engine applies a recipe. A seed compares its memory with R(x), which it computes while it loads; a
target compares its memory with what arrived (`settle`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ..integrity.digest import DigestArray, fold
from ..memory.space import Space, digest_layout
from ..model.boxes import IntArray
from ..model.catalog import Catalog, TensorSpec
from ..model.layout import Layout, Pieces
from ..tracing.described import Derived
from ..tracing.trace import Traced

#: Rows and columns of a block that has one scale (DeepSeek-V3 technical report, section 3.3).
BLOCK: Final = 128
#: The largest value of float8_e4m3fn.
_MOST: Final = 448.0
#: What DeepGEMM takes for a block's largest value if that is less.
_LEAST: Final = 1e-4
#: The distance of a prepared scale from the power of two that it stands for; float8 has three bits of mantissa and forgets it.
_ASIDE: Final = 2.0**-8
#: Bytes of temporary memory for each element that is requantized: three of float32 and the result, rounded up.
_TEMPORARY_NBYTES: Final = 16


class Placement(NamedTuple):
    """Pieces of one buffer as columns: row in the layout; matrix, first row and first column in the buffer's tensor; height and
    width."""

    piece: IntArray
    matrix: IntArray
    row: IntArray
    column: IntArray
    height: IntArray
    width: IntArray


class Recipe(Protocol):
    """How one kind of post-processing rewrites a weight and its scales. Stateless."""

    name: str
    changes_scales: bool

    def units(self, layout: Layout, weight: Placement, scale: Placement, sizes: tuple[torch.Size, torch.Size]) -> _Units | None:
        """What belongs together, or None if these two tensors are nothing for this recipe."""

    def apply(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """R of weight [m, rows, columns] and its part of the scales: new tensors of the same shapes."""

    def prepare(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The scales that R turns, together with `weight`, which is R's result, into R's result again."""


class _Units(NamedTuple):
    """name: of R of each of the weight's and scale's pieces. cuts: first and last row of the parts that `apply` takes apart from
    each other, and the scales of each, as a slice of the scale's last but one dimension."""

    weight_names: list[str]
    scale_names: list[str]
    cuts: list[tuple[int, int, slice]]


class BlockScales:
    """Scales of blocks of 128 x 128 become powers of two (UE8M0), and weights follow, through float32 as in vLLM
    (`requant_weight_ue8m0_inplace`)."""

    name = "UE8M0 blocks"
    changes_scales = True

    def units(self, layout: Layout, weight: Placement, scale: Placement, sizes: tuple[torch.Size, torch.Size]) -> _Units | None:
        """Every piece begins and ends where a block does, and its scales lie where it lies."""
        if len(sizes[0]) != len(sizes[1]):
            return None
        (*many, rows, columns), (*others, high, wide) = sizes
        if many != others or (high, wide) != (-(-rows // BLOCK), -(-columns // BLOCK)) or len(weight.piece) != len(scale.piece):
            return None
        pieces, catalog = layout.pieces, layout.catalog
        begin, end = pieces.start[weight.piece, -2:], pieces.stop[weight.piece, -2:]
        whole = catalog.shape[pieces.tensor[weight.piece], -2:]
        corner = np.stack([weight.row, weight.column], axis=1)
        if (begin % BLOCK).any() or (corner % BLOCK).any() or ((end % BLOCK != 0) & (end != whole)).any():
            return None
        place = [np.lexsort((p.column, p.row, p.matrix)) for p in (weight, scale)]
        w, s = weight.piece[place[0]], scale.piece[place[1]]
        same = [
            weight.matrix[place[0]] == scale.matrix[place[1]],
            weight.row[place[0]] == scale.row[place[1]] * BLOCK,
            weight.column[place[0]] == scale.column[place[1]] * BLOCK,
            (pieces.start[w, -2:] == pieces.start[s, -2:] * BLOCK).all(axis=1),
            (-(-pieces.stop[w, -2:] // BLOCK) == pieces.stop[s, -2:]).all(axis=1),
        ]
        if not np.all(same) or not all(
            _belongs(layout.tensor_of(b), layout.tensor_of(a)) for a, b in zip(w.tolist(), s.tolist(), strict=True)
        ):
            return None
        names = [[f"{layout.tensor_of(p).name} as {self.name}" for p in part.piece.tolist()] for part in (weight, scale)]
        return _Units(names[0], names[1], [(0, rows, slice(0, high))])

    def apply(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """[m, rows, columns] and [m, blocks down, blocks across]; rows begin with a block."""
        rows, columns = weight.shape[1:]
        values = weight.float() * _spread(scale, rows, columns)
        largest = _largest(values).clamp(_LEAST)
        made = torch.pow(2.0, torch.ceil(torch.log2(largest / _MOST)))
        return (values * _spread(1.0 / made, rows, columns)).to(weight.dtype), made

    def prepare(self, weight: Tensor, scale: Tensor) -> Tensor:
        """A block's largest value is at least 224 of its scale. One of 224 exactly may have been rounded down to it, so it is
        moved up; all others move down, away from the next power of two."""
        return torch.where(_largest(weight) > _MOST / 2, scale * (1 - _ASIDE), scale * (1 + _ASIDE))


class OneScale:
    """Tensors that are fused in one parameter, each with a scale of its own, get the largest of their scales (FP8 per tensor:
    query, key and value; gate and up; the same of each expert). vLLM's `requantize_with_max_scale` goes through float16."""

    name = "one scale"
    changes_scales = False

    def units(self, layout: Layout, weight: Placement, scale: Placement, sizes: tuple[torch.Size, torch.Size]) -> _Units | None:
        """As many tensors side by side as there are scales, in the same rows of every expert's matrix."""
        (*many, _, columns), shape = sizes
        if len(shape) != len(many) + 1 or list(shape[:-1]) != many or shape[-1] < 2:
            return None
        count, matrices = shape[-1], int(np.prod(many, dtype=np.int64))
        if len(scale.piece) != count * matrices or (weight.column != 0).any() or (weight.width != columns).any():
            return None
        entries = zip(scale.row.tolist(), scale.column.tolist(), scale.piece.tolist(), strict=True)  # a row for each matrix
        scales = {(m, i): layout.tensor_of(p) for m, i, p in entries}
        ranges: dict[tuple[int, int], tuple[int, int]] = {}
        for k in np.lexsort((weight.row, weight.matrix)).tolist():
            m, first, height = int(weight.matrix[k]), int(weight.row[k]), int(weight.height[k])
            name = layout.tensor_of(int(weight.piece[k]))
            index = next((i for i in range(count) if (m, i) in scales and _belongs(scales[m, i], name)), None)
            if index is None:
                return None
            low, high = ranges.get((m, index), (first, first))
            if high != first:
                return None
            ranges[m, index] = low, first + height
        cuts = [ranges.get((0, i)) for i in range(count)]
        if None in cuts or any(ranges.get((m, i)) != cuts[i] for m in range(matrices) for i in range(count)):
            return None
        fused = [", ".join(scales[m, i].name for i in range(count)) for m in range(matrices)]
        names = [
            f"{layout.tensor_of(p).name} with {self.name} of {fused[m]}"
            for p, m in zip(weight.piece.tolist(), weight.matrix.tolist(), strict=True)
        ]
        return _Units(names, [], [(*cut, slice(i, i + 1)) for i, cut in enumerate(cuts) if cut is not None])

    def apply(self, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Scale: [m, 2], this tensor's own and the largest."""
        own, largest = scale[:, :1, None], scale[:, 1:, None]
        values = (weight.float() * own).half().float()
        return (values * (1.0 / largest)).clamp(-_MOST, _MOST).to(weight.dtype), scale

    def prepare(self, weight: Tensor, scale: Tensor) -> Tensor:
        del weight
        return scale.amax(dim=-1, keepdim=True).expand_as(scale)


#: Those of vLLM.
RECIPES: Final[tuple[Recipe, ...]] = (BlockScales(), OneScale())


@dataclass(frozen=True, slots=True, eq=False)
class Rewritable:
    """A weight and its scales, buffers `weight` and `scale` of a layout, that `recipe` rewrites together. rewritten: the name of
    R by piece, for the pieces that it changes. covers: the checkpoint tensors in the two buffers."""

    recipe: Recipe
    weight: int
    scale: int
    part: Placement
    cuts: tuple[tuple[int, int, slice], ...]
    rewritten: Mapping[int, str]
    covers: tuple[str, ...]

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.rewritten.values())

    def digests(
        self, layout: Layout, weight: Tensor, scale: Tensor, space: Space, *, staging_nbytes: int, threads: int
    ) -> dict[int, int]:
        """Of R of each piece, by its row, where weight and scale are as the engine's loader leaves them. layout: one whose pieces
        are named as `rewritten` says. Uses at most `staging_nbytes` for a while, or what a row of blocks takes."""
        low, high = np.zeros(len(layout.pieces), np.uint64), np.zeros(len(layout.pieces), np.uint64)

        def add(rows: IntArray, found: DigestArray) -> None:
            np.add.at(low, rows, found & np.uint64(0xFFFFFFFF))
            np.add.at(high, rows, found >> np.uint64(32))

        made = torch.empty_like(scale)
        for chunk in self._chunks(weight, scale, staging_nbytes):
            values, scales = self.recipe.apply(chunk.weight, chunk.scale)
            if self.recipe.changes_scales:
                _of(made, weight.ndim)[chunk.matrices, chunk.blocks] = scales
            add(*self._digest(layout, chunk, values, space, threads))
        if self.recipe.changes_scales:
            rows = np.flatnonzero(layout.pieces.buffer == self.scale)
            address = np.zeros(len(layout.buffer_names), np.int64)
            address[self.scale] = made.data_ptr()
            add(rows, digest_layout(space, layout, address, rows=rows, threads=threads))
        rows = np.array(sorted(self.rewritten), np.int64)
        return dict(zip(rows.tolist(), fold(low[rows], high[rows]).tolist(), strict=True))

    def prepare(self, weight: Tensor, scale: Tensor, staging_nbytes: int) -> None:
        """Put R's right inverse into load-time tensors that hold R's results."""
        if not self.recipe.changes_scales:
            scale.data.copy_(self.recipe.prepare(weight, scale.data))
            return
        for chunk in self._chunks(weight, scale, staging_nbytes):
            _of(scale.data, weight.ndim)[chunk.matrices, chunk.blocks] = self.recipe.prepare(chunk.weight, chunk.scale)

    def _chunks(self, weight: Tensor, scale: Tensor, staging_nbytes: int) -> Iterator[_Chunk]:
        """The weight in parts: several whole matrices, or some rows of blocks of one."""
        values, scales = _of(weight.data, weight.ndim), _of(scale.data, weight.ndim)
        most = max(1, staging_nbytes // _TEMPORARY_NBYTES)  # elements
        columns = values.shape[2]
        for first, last, which in self.cuts:
            rows = min(last - first, max(BLOCK, most // columns // BLOCK * BLOCK))
            matrices = max(1, most // (rows * columns)) if rows == last - first else 1
            for m in range(0, len(values), matrices):
                several = slice(m, min(m + matrices, len(values)))
                for begin in range(first, last, rows):
                    end = min(begin + rows, last)
                    if self.recipe.changes_scales:
                        blocks = slice(begin // BLOCK, -(-end // BLOCK))
                        own = scales[several, blocks]
                    else:
                        blocks = which
                        all_ = scales[several].reshape(-1, scales.shape[-1])
                        own = torch.cat([all_[:, which], all_.amax(dim=1, keepdim=True)], dim=1)
                    yield _Chunk(several, begin, blocks, values[several, begin:end], own)

    def _digest(self, layout: Layout, chunk: _Chunk, values: Tensor, space: Space, threads: int) -> tuple[IntArray, DigestArray]:
        part, pieces = self.part, layout.pieces
        height, columns = values.shape[1:]
        top = np.maximum(part.row, chunk.row)
        bottom = np.minimum(part.row + part.height, chunk.row + height)
        inside = (part.matrix >= chunk.matrices.start) & (part.matrix < chunk.matrices.stop) & (top < bottom)
        which = np.flatnonzero(inside)
        rows = part.piece[which]
        start, stop = pieces.start[rows], pieces.stop[rows]
        stop[:, -2] = start[:, -2] + (bottom - part.row)[which]
        start[:, -2] += (top - part.row)[which]
        matrix = part.matrix[which] - chunk.matrices.start
        address = values.data_ptr() + (matrix * height + top[which] - chunk.row) * columns + part.column[which]
        stride = np.zeros_like(start)
        stride[:, -2:] = columns, 1
        return rows, space.digest(layout.catalog, pieces.tensor[rows], start, stop, address, stride, threads)


class _Chunk(NamedTuple):
    matrices: slice
    row: int
    blocks: slice
    weight: Tensor
    scale: Tensor


def groups_of(traced: Traced, recipes: Sequence[Recipe]) -> list[Rewritable]:
    """What these recipes may rewrite, going by dtypes, shapes, alignment, and the names of scales, which begin with their
    weight's. Two recipes may name the same weight. A weight that is cut inside a block has none."""
    layout, found = traced.layout, []
    siblings: dict[str, list[int]] = {}
    for row, name in enumerate(layout.buffer_names):
        siblings.setdefault(name.rpartition(".")[0], []).append(row)
    order = np.argsort(layout.pieces.buffer, kind="stable")
    edges = np.searchsorted(layout.pieces.buffer[order], np.arange(len(layout.buffer_names) + 1))
    tensors = [traced.tensors[name] for name in layout.buffer_names]

    def part(row: int, tensor: Tensor) -> Placement | None:
        return _part(layout, order[edges[row] : edges[row + 1]], tensor)

    for rows in siblings.values():
        weights = [r for r in rows if tensors[r].dtype == torch.float8_e4m3fn and tensors[r].ndim in (2, 3)]
        scales = [r for r in rows if tensors[r].dtype == torch.float32 and tensors[r].ndim >= 1]
        for w in weights:
            first = part(w, tensors[w])
            for s in scales if first is not None else ():
                second = part(s, tensors[s])
                if first is None or second is None:
                    continue
                for recipe in recipes:
                    units = recipe.units(layout, first, second, (tensors[w].shape, tensors[s].shape))
                    if units is not None:
                        found.append(_group(layout, recipe, (w, s), first, second, units))
    return found


def _group(
    layout: Layout, recipe: Recipe, buffers: tuple[int, int], weight: Placement, scale: Placement, units: _Units
) -> Rewritable:
    rewritten = dict(zip(weight.piece.tolist(), units.weight_names, strict=True))
    if recipe.changes_scales:
        rewritten |= dict(zip(scale.piece.tolist(), units.scale_names, strict=True))
    covers = tuple(sorted({layout.tensor_of(p).name for p in (*weight.piece.tolist(), *scale.piece.tolist())}))
    return Rewritable(recipe, *buffers, weight, tuple(units.cuts), rewritten, covers)


def _part(layout: Layout, rows: IntArray, tensor: Tensor) -> Placement | None:
    """Pieces of a tensor that consists of boxes of matrices; None if it has other parts too, or isn't dense."""
    size, pieces = tensor.element_size(), layout.pieces
    height, width = (tensor.shape[-2] if tensor.ndim > 1 else 1), tensor.shape[-1]
    shape = (pieces.stop - pieces.start)[rows]
    if not tensor.is_contiguous() or not len(rows) or shape.shape[1] < 2 or shape.prod(axis=1).sum() != tensor.numel():
        return None
    stride = pieces.stride[rows]
    straight = ((shape[:, -1] == 1) | (stride[:, -1] == size)) & ((shape[:, -2] == 1) | (stride[:, -2] == width * size))
    if not straight.all() or (shape[:, :-2] != 1).any():
        return None
    matrix, rest = np.divmod(pieces.offset[rows] // size, height * width)
    row, column = np.divmod(rest, width)
    return Placement(rows, matrix, row, column, shape[:, -2], shape[:, -1])


def renamed(layout: Layout, names: Mapping[int, str]) -> Layout:
    """The same layout, of whose pieces some hold R of what they held: its name by piece."""
    if not names:
        return layout
    known = dict(layout.catalog.row)
    specs: list[TensorSpec] = list(layout.catalog)
    tensor = layout.pieces.tensor.copy()
    for piece, name in names.items():
        if name not in known:
            known[name] = len(specs)
            specs.append(layout.tensor_of(piece)._replace(name=name))
        tensor[piece] = known[name]
    p = layout.pieces
    pieces = Pieces(tensor, p.start, p.stop, p.buffer, p.offset, p.stride)
    return replace(layout, catalog=Catalog.of(specs), pieces=pieces)


def names_of(groups: Iterable[Rewritable]) -> dict[int, str]:
    """The name of R by piece, of several groups."""
    return {piece: name for group in groups for piece, name in group.rewritten.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Taking:
    """Of a model's groups those that are `taken`: their parameters are to be filled with R's results."""

    traced: Traced
    groups: Sequence[Rewritable]
    taken: Sequence[Rewritable]

    @classmethod
    def of(cls, traced: Traced, groups: Sequence[Rewritable], held: frozenset[str]) -> Taking:
        """Those of which seeds hold R's results and don't hold what they were made of. held: names of logical tensors."""
        taken: dict[int, Rewritable] = {}
        for group in groups:
            if group.names <= held and not held.issuperset(group.covers):
                taken.setdefault(group.weight, group)
        return cls(traced, groups, list(taken.values()))

    @property
    def layout(self) -> Layout:
        return renamed(self.traced.layout, names_of(self.taken))

    @property
    def derived(self) -> dict[str, Derived]:
        """R's results, too: if nobody has them, the engine itself fills these parameters out of the checkpoint."""
        names = self.traced.layout.buffer_names
        more = {
            name: Derived(names[g.weight], g.covers, f"as post-processing leaves it: {g.recipe.name}")
            for g in self.taken
            for name in g.names
        }
        return {**self.traced.derived, **more}

    def without(self, left: Iterable[str]) -> Taking:
        """The engine itself has filled the groups of these."""
        names = frozenset(left)
        return replace(self, taken=[g for g in self.taken if not g.names & names])

    def arrived(self, digests: Mapping[int, int], left: Iterable[str]) -> dict[int, int]:
        """Of digests by piece, measured when the bytes arrived, those that still count: the engine has filled the groups of
        `left` itself."""
        gone = names_of(self.taken).keys() - names_of(self.without(left).taken).keys()
        return {row: digest for row, digest in digests.items() if row not in gone}

    @property
    def replaced(self) -> dict[str, str]:
        """What has not come as the checkpoint has it, with the reason."""
        return {name: f"came as post-processing leaves it: {g.recipe.name}" for g in self.taken for name in g.covers}

    @property
    def others(self) -> list[Rewritable]:
        """What has been loaded as the checkpoint has it."""
        weights = {g.weight for g in self.taken}
        return [g for g in self.groups if g.weight not in weights]

    def prepare(self, staging_nbytes: int) -> None:
        """Put R's right inverse into the parameters that hold R's results."""
        names = self.traced.layout.buffer_names
        for g in self.taken:
            g.prepare(self.traced.tensors[names[g.weight]], self.traced.tensors[names[g.scale]], staging_nbytes)


def suffices(groups: Iterable[Rewritable], held: frozenset[str], gone: frozenset[str]) -> bool:
    """Do seeds hold every group, as the checkpoint has it or as a recipe makes it, or have they given it up?"""
    groups = list(groups)
    there = {g.weight for g in groups if g.names <= held or (held | gone).issuperset(g.covers)}
    return {g.weight for g in groups} == there


def _belongs(scale: TensorSpec, weight: TensorSpec) -> bool:
    return scale.name != weight.name and scale.name.startswith(weight.name)


def _of(tensor: Tensor, ndim: int) -> Tensor:
    """As a stack of matrices, a scale like its weight of `ndim` dimensions."""
    return tensor if ndim == 3 else tensor.unsqueeze(0)


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :rows, :columns]


def _largest(values: Tensor) -> Tensor:
    """[m, blocks down, blocks across] of each block's largest absolute value, as float32."""
    m, rows, columns = values.shape
    down, across = -(-rows // BLOCK), -(-columns // BLOCK)
    whole = torch.zeros((m, down * BLOCK, across * BLOCK), dtype=torch.float32, device=values.device)
    whole[:, :rows, :columns] = values.float().abs()
    return whole.view(m, down, BLOCK, across, BLOCK).amax(dim=(2, 4))
