"""The corrected softmax with Triton kernels on CUDA devices, with the same results as `TiledEvaluation`.

Nothing here waits for the device: shapes depend on the numbers of rows, candidates and pairs alone.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.tiled.forms import SoftmaxSums, TiledSoftmax, TileLoss, log2_unit
from twotower.losses.tiled.inputs import LossInputs
from twotower.negatives import NegativeMask

#: Environment variable: "auto" or "off".
SETTING = "TWOTOWER_TRITON"
#: Rows and candidates of a tile.
ROWS, COLUMNS = 64, 64
#: Largest supported width of float32 and of bfloat16 products: at twice these widths, the operands of a tile's products
#: need 192 KiB or more of shared memory.
WIDEST, WIDEST_LOW = 128, 256
#: Maximum number of tiles: a mask has an offset for each.
MOST_TILES = 1 << 25
#: Programs per multiprocessor; with fewer tiles than programs, a tile's inner loop is split.
PROGRAMS = 2
MOST_SPLITS = 64


def is_supported(form: TileLoss, inputs: LossInputs) -> bool:
    """Return whether the kernels can evaluate a loss, given checked inputs in the precision of the sums.

    The kernels are used for the softmax and refined logQ in float32 on a CUDA device of compute capability 8.0 or
    higher, for widths up to 128 (256 under bfloat16 autocast), at most 2^25 tiles of 64 by 64, and masks without rules,
    if Triton is installed. TWOTOWER_TRITON=off turns them off.

    Raises:
        InputError: TWOTOWER_TRITON has an unknown value.
    """
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", "off"):
        raise InputError(f"{SETTING}: expected auto or off, found {setting!r}")
    query = inputs.query
    return (
        setting == "auto"
        and query.device.type == "cuda"
        and fits(form, inputs)
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
        and torch.version.hip is None
        and _is_installed()
        and not KernelState.failed
    )


def fits(form: TileLoss, inputs: LossInputs) -> bool:
    """Return whether the kernels support the loss, the precision, the width and the mask."""
    query, mask = inputs.query, inputs.mask
    return (
        isinstance(form, TiledSoftmax)
        and query.dtype == torch.float32
        and 1 <= query.shape[1] <= (WIDEST_LOW if inputs.low_precision else WIDEST)
        and len(query) > 0
        and len(inputs.candidates) > 0
        and -(-len(query) // ROWS) * -(-len(inputs.candidates) // COLUMNS) <= MOST_TILES
        and inputs.bias is None
        and inputs.multiplicity is None
        and (mask is None or (isinstance(mask, NegativeMask) and mask.eligible is None))
    )


def kernel_or_none(form: TileLoss, inputs: LossInputs, *, needs_grad: bool) -> KernelEvaluation | None:
    """Evaluate a loss with the kernels; return None if they do not support it or do not run on this machine."""
    if not is_supported(form, inputs):
        return None
    assert isinstance(form, TiledSoftmax)
    try:
        return KernelEvaluation(form, inputs, needs_grad=needs_grad)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        KernelState.failed = True
        text = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"the Triton softmax kernel does not run on this machine, so tiles are used instead ({text:.300}); set "
            f"{SETTING}=off to hide this",
            stacklevel=2,
        )
        return None


class KernelState:
    """Whether the kernels have failed in this process."""

    failed = False


@dataclass(frozen=True)
class HitTiles:
    """The hits of a mask, sorted by the tile that they are in; candidates are in the order of their items.

    Attributes:
        order: the candidate at each place, int64 [M]; None if candidates keep their order.
        group: place of the first copy of each place's item, int32 [M].
        first: tile of the first copy of the item of each tile's first candidate, int32 [tiles].
        offsets: first hit of each tile, row tile by row tile, int32 [row tiles * tiles + 1].
        row: row of each hit, int32 [P].
        hit: `group` of the item of each hit, int32 [P].
    """

    order: Tensor | None
    group: Tensor
    first: Tensor
    offsets: Tensor
    row: Tensor
    hit: Tensor

    @classmethod
    def of(cls, mask: NegativeMask) -> HitTiles:
        """Sort the pairs of a mask; pairs of items that are not candidates come last and are in no tile."""
        rows, columns = ROWS, COLUMNS
        count, device = mask.size, mask.pairs[0][0].device if mask.pairs else torch.device("cpu")
        place = torch.arange(count, device=device)
        group = place
        order: Tensor | None = None
        keys: Tensor | None = None
        if mask.items is not None:
            keys, order = torch.sort(mask.items, stable=True)
            group = torch.searchsorted(keys, keys)
        tiles, row_tiles = -(-count // columns), -(-mask.rows // rows)
        last = row_tiles * tiles
        of_tiles, of_rows, of_items = [], [], []
        for row, item in mask.pairs:
            at = item
            if keys is not None:
                at = torch.searchsorted(keys, item).clamp_(max=count - 1)
                is_candidate = keys[at] == item
            else:
                is_candidate = (item >= 0) & (item < count)
            tile = row // rows * tiles + at // columns
            of_tiles.append(torch.where(is_candidate, tile, last))
            of_rows.append(row)
            of_items.append(at)
        empty = place.new_empty(0)
        tile, by_tile = torch.sort(torch.cat([empty, *of_tiles]), stable=True)
        row, item = torch.cat([empty, *of_rows])[by_tile], torch.cat([empty, *of_items])[by_tile]
        offsets = torch.searchsorted(tile, torch.arange(last + 1, device=device))
        return cls(
            order,
            group.int(),
            (group[::columns] // columns).int(),
            offsets.int(),
            row.int(),
            item.int(),
        )


class KernelEvaluation:
    """Value and gradients of a softmax, with the attributes of `TiledEvaluation`.

    With m_b the largest logit of row b, the first kernel computes m, sum_j e^(l_bj - m_b) and sum_j e^(l_bj - m_b) v_j;
    per-row candidates and the positive, which are few, are added here. The second kernel computes the candidates'
    gradient.

    Args:
        form: the softmax or refined logQ.
        inputs: checked inputs in float32; the query is already divided by the temperature.
        needs_grad: whether gradients are computed.
        splits: number of parts of the inner loops of both kernels; None for enough to occupy the device.
    """

    def __init__(
        self, form: TiledSoftmax, inputs: LossInputs, *, needs_grad: bool, splits: tuple[int, int] | None = None
    ) -> None:
        self.inputs, self.needs_grad = inputs, needs_grad
        assert inputs.weights is not None and not isinstance(inputs.mask, Tensor)
        query, candidates = inputs.query, inputs.candidates
        hits = None if inputs.mask is None or not inputs.mask.pairs else HitTiles.of(inputs.mask)
        shift = _shift(inputs)
        if hits is not None and hits.order is not None:
            candidates = candidates.index_select(0, hits.order)
            shift = None if shift is None else shift.index_select(0, hits.order)
        self._launch = _Launch(query, candidates, shift, hits, low=inputs.low_precision, splits=splits)
        largest, total, gathered = self._launch.sums()
        # One number per row: double precision costs nothing.
        log_sum = total.double().log() + largest.double() / log2_unit(torch.float32)
        row_logits = self._row_logits()
        if row_logits is not None:
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(row_logits.double(), 1))
        positive = inputs.positive
        if positive is None:
            assert inputs.positive_places is not None
            positive = inputs.candidates.index_select(0, inputs.positive_places)
        own = (query * positive).sum(1)
        if inputs.own_offset is not None:
            own = own - inputs.own_offset.to(own.dtype)
        sums = SoftmaxSums(own, inputs.row_offset, 0.0, form.log_left)
        # The margin log Z - s_y decides value and gradient; it is computed from logarithms, which do not overflow.
        self.losses, own_grad = sums.finish_at(log_sum)
        weights = inputs.weights.to(query.dtype)
        self.total_loss = (inputs.weights.double() * self.losses).sum().to(query.dtype)
        if not needs_grad:
            return
        # P(j|x) = e^l_j / (Z + e^s_y) = -own_grad e^(l_j - m) e^(m - log Z), the last factor at most 1.
        wrong = -own_grad * weights
        is_masked = torch.isneginf(largest)
        share = (largest.double() / log2_unit(torch.float32) - log_sum).exp().masked_fill(is_masked, 0.0)
        scale = wrong * share.to(query.dtype)
        self.query_grad = gathered * scale[:, None] - positive * wrong[:, None]
        found = self._launch.candidates_grad(largest.masked_fill(is_masked, 0.0), scale)
        if hits is not None and hits.order is not None:
            found = torch.empty_like(found).index_copy_(0, hits.order, found)
        self.candidates_grad = found
        self.row_grad: Tensor | None = None
        if row_logits is not None and inputs.row_candidates is not None:
            probability = (row_logits.double() - torch.where(torch.isneginf(log_sum), 0.0, log_sum)[:, None]).exp()
            toward = probability.to(query.dtype) * wrong[:, None]
            self.query_grad = self.query_grad + torch.bmm(toward[:, None, :], inputs.row_candidates)[:, 0]
            self.row_grad = toward[:, :, None] * query[:, None, :]
        self.positive_grad = query * -wrong[:, None]
        if inputs.positive_places is not None:
            self.candidates_grad.index_add_(0, inputs.positive_places, self.positive_grad)
        self.bias_grad = torch.zeros((), dtype=torch.float64, device=query.device)

    def total(self) -> Tensor:
        """Return the weighted sum of the rows' losses."""
        return self.total_loss

    def _row_logits(self) -> Tensor | None:
        """Return the corrected logits of per-row candidates, [B, R], -inf where masked; None if there are none."""
        inputs = self.inputs
        if inputs.row_candidates is None:
            return None
        logits = torch.bmm(inputs.row_candidates, inputs.query[:, :, None])[:, :, 0]
        if inputs.row_log_expected_count is not None:
            logits = logits - inputs.row_log_expected_count.to(logits.dtype)
        return logits if inputs.row_mask is None else logits.masked_fill(inputs.row_mask, -torch.inf)


class _Launch:
    """The two kernels on one batch; `sums` and `candidates_grad` run them."""

    def __init__(
        self,
        query: Tensor,
        candidates: Tensor,
        shift: Tensor | None,
        hits: HitTiles | None,
        *,
        low: bool,
        splits: tuple[int, int] | None,
    ) -> None:
        self.query, self.candidates = (_rounded(one, low=low) for one in (query, candidates))
        self.rows, self.width = query.shape
        self.count = len(candidates)
        self.tiles, self.row_tiles = -(-self.count // COLUMNS), -(-self.rows // ROWS)
        self.splits = splits or tuple(
            _splits(one, other, query.device)
            for one, other in ((self.row_tiles, self.tiles), (self.tiles, self.row_tiles))
        )
        nothing = torch.zeros(1, dtype=torch.int32, device=query.device)
        hit_tensors = (hits.group, hits.first, hits.offsets, hits.row, hits.hit) if hits is not None else (nothing,) * 5
        self.given = (self.query, self.candidates, self.query if shift is None else shift, *hit_tensors)
        self.constants: dict[str, Any] = {
            "D": self.width,
            "WIDTH": max(16, 1 << (self.width - 1).bit_length()),
            "R": ROWS,
            "C": COLUMNS,
            "HAS_SHIFT": shift is not None,
            # Without pairs the tensors of hits would be empty, which a kernel cannot take.
            "HAS_MASK": hits is not None and len(hits.row) > 0,
            "PRECISION": _precision(),
            "num_warps": 4,
            "num_stages": 2 if self.width * self.query.element_size() <= 256 else 1,
        }

    def sums(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return per row, for logits l in units of log 2: m = max l [B], sum 2^(l - m) [B], sum 2^(l - m) v [B, D]."""
        (splits, _), each = self.splits, -(-self.tiles // self.splits[0])
        shape = (splits, self.rows)
        largest, total = (self.query.new_empty(shape, dtype=torch.float32) for _ in range(2))
        gathered = self.query.new_empty(*shape, self.width, dtype=torch.float32)
        with _current(self.query):
            kernels()._sums_kernel[(self.row_tiles, splits)](
                *self.given,
                largest,
                total,
                gathered,
                self.rows,
                self.count,
                self.tiles,
                each,
                log2_unit(torch.float32),
                **self.constants,
            )
        if splits == 1:
            return largest[0], total[0], gathered[0]
        top = largest.amax(0)
        scale = torch.where(torch.isneginf(largest), 0.0, (largest - top).exp2())
        return top, (total * scale).sum(0), (gathered * scale[:, :, None]).sum(0)

    def candidates_grad(self, largest: Tensor, weight: Tensor) -> Tensor:
        """Return sum_b w_b 2^(l_bj - m_b) q_b of each candidate, [M, D], given m in units of log 2 and w, [B] each."""
        (_, splits), each = self.splits, -(-self.row_tiles // self.splits[1])
        found = self.query.new_empty(splits, self.count, self.width, dtype=torch.float32)
        with _current(self.query):
            kernels()._candidates_kernel[(self.tiles, splits)](
                *self.given,
                largest.contiguous(),
                weight.contiguous(),
                found,
                self.rows,
                self.count,
                self.tiles,
                self.row_tiles,
                each,
                log2_unit(torch.float32),
                **self.constants,
            )
        return found[0] if splits == 1 else found.sum(0)


def _current(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the device of a tensor the current one, on which Triton runs."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def _rounded(vectors: Tensor, *, low: bool) -> Tensor:
    """Return vectors in the type of the products; the interpreter converts bfloat16 wrongly, so it gets float32."""
    if low:
        vectors = vectors.to(torch.bfloat16)
    return vectors.contiguous() if vectors.device.type == "cuda" else vectors.float().contiguous()


def _shift(inputs: LossInputs) -> Tensor | None:
    """Return the numbers subtracted from the candidates' logits, float32 [M]; infinity for empty slots."""
    shift = None if inputs.log_expected_count is None else inputs.log_expected_count.to(torch.float32)
    mask = inputs.mask
    if isinstance(mask, NegativeMask) and mask.empty is not None:
        shift = torch.zeros_like(mask.empty, dtype=torch.float32) if shift is None else shift
        shift = shift.masked_fill(mask.empty, torch.inf)
    return None if shift is None else shift.contiguous()


def _splits(tiles: int, loop: int, device: torch.device) -> int:
    """Return the number of parts of a loop, so that all multiprocessors have work."""
    wanted = PROGRAMS * _multiprocessors(device.index or 0) if device.type == "cuda" else 1
    return max(min(wanted // max(tiles, 1), loop, MOST_SPLITS), 1)


@cache
def _multiprocessors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _precision() -> str:
    """Return the precision of float32 products, as set by `torch.set_float32_matmul_precision`.

    For "highest", a product is the sum of three in TF32, with an error close to that of float32: products in float32
    itself do not use the matrix units.
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def kernels() -> ModuleType:
    """Import the kernels on first use."""
    return importlib.import_module("twotower.losses.tiled.triton_kernel")
