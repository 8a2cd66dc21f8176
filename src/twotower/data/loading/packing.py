"""Packing of sequences into groups of similar length, to keep the padding small."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Code of the start token of a sequence and of padding; no item has this code.
START = -1
#: Cost of an additional group in an encoder, in tokens: the launch overhead of a few dozen operations.
GROUP_COST = 256


class ItemUnits:
    """The number of windows or questions of an epoch that contain each item, counted at first use.

    Args:
        count: function that returns the number for each item, float64 [N].
    """

    def __init__(self, count: Callable[[], NDArray[np.float64]]) -> None:
        self._count = count
        self._counts: Tensor | None = None

    def of(self, items: Tensor) -> Tensor:
        """Return the number of windows or questions with each of these items, float64, same shape as `items`."""
        if self._counts is None:
            self._counts = torch.from_numpy(self._count())
        if self._counts.device != items.device:
            self._counts = self._counts.to(items.device)
        return self._counts[items]


@dataclass(frozen=True)
class Windows:
    """How the windows (or questions) of a training batch were drawn, uniformly and without replacement.

    Attributes:
        drawn: S, number of windows in the batch.
        total: W, number of all windows.
        rows: number of rows of all windows, or its expectation if the windows themselves are random.
        holding: number of windows that contain each item; None if no window contains an item twice, so that counting
            rows is enough.
    """

    drawn: int
    total: int
    rows: float
    holding: ItemUnits | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences in groups of similar length; each group is a rectangle padded on the right.

    A causal encoder attends only to the left, so padding on the right does not change the outputs of a sequence.

    Attributes:
        tokens: int64 [P], the input items of all groups, concatenated row by row; -1 for the start of a sequence and
            for padding.
        positions: int64 [P], the position of each token in its sequence, 0 for the start.
        shapes: (number of sequences, length of the longest) of each group; their products sum to P.
        rows: int64 [B], ascending positions of the tokens whose outputs are needed; in training, all tokens except
            padding.
        windows: how the sequences were drawn; None if this is not a training batch.
        gaps: int64 [P], code of the time since the previous item (gaps.py), 0 if the sequence has no previous item;
            None if times are not used.
    """

    tokens: Tensor
    positions: Tensor
    shapes: tuple[tuple[int, int], ...]
    rows: Tensor
    windows: Windows | None = None
    gaps: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """Move the tensors to a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            gaps=None if self.gaps is None else self.gaps.to(device, non_blocking=non_blocking),
        )

    def parts(self, tokens: int) -> list[Packed]:
        """Split into packs of at most this many tokens, or of one longer sequence; the output order is unchanged."""
        found, start = [], 0
        for sequences, longest in self.shapes:
            each = max(tokens // longest, 1)
            for first in range(0, sequences, each):
                count = min(each, sequences - first)
                begin, end = start + first * longest, start + (first + count) * longest
                wanted = torch.searchsorted(self.rows, torch.tensor([begin, end], device=self.rows.device)).tolist()
                found.append(
                    Packed(
                        tokens=self.tokens[begin:end],
                        positions=self.positions[begin:end],
                        shapes=((count, longest),),
                        rows=self.rows[wanted[0] : wanted[1]] - begin,
                        gaps=None if self.gaps is None else self.gaps[begin:end],
                    )
                )
            start += sequences * longest
        return found


def length_groups(lengths: NDArray[np.integer[Any]], *, cost: int = GROUP_COST) -> list[NDArray[np.int64]]:
    """Group sequences of similar length so that the tokens, including padding, plus `cost` per group are minimal.

    Uses dynamic programming over the distinct lengths: the best grouping of the i shortest lengths ends with a group of
    the lengths j..i, padded to the longest.

    Args:
        lengths: [S], each above 0.
        cost: cost of an additional group, in tokens.

    Returns:
        The sequence numbers of each group, shortest sequences first; input order within a group.

    Example:
        >>> import numpy as np
        >>> from twotower.data.loading.packing import length_groups
        >>> [group.tolist() for group in length_groups(np.array([100, 3, 100, 2]), cost=1)]
        [[1, 3], [0, 2]]
    """
    distinct, inverse, counts = np.unique(lengths, return_inverse=True, return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    best = np.zeros(len(distinct) + 1, dtype=np.int64)
    first = np.zeros(len(distinct) + 1, dtype=np.int64)
    for stop in range(1, len(distinct) + 1):
        price = best[:stop] + cost + (before[stop] - before[:stop]) * int(distinct[stop - 1])
        first[stop] = int(price.argmin())
        best[stop] = price[first[stop]]
    groups, stop = [], len(distinct)
    while stop > 0:
        groups.append(np.flatnonzero((inverse >= first[stop]) & (inverse < stop)))
        stop = int(first[stop])
    return groups[::-1]


def pack(
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    item_codes: NDArray[np.integer[Any]],
    *,
    last_only: bool,
    gaps: NDArray[np.integer[Any]] | None = None,
    groups: list[NDArray[np.int64]] | None = None,
) -> tuple[Packed, NDArray[np.int64], NDArray[np.int64]]:
    """Pack the sequences item_codes[starts : starts + lengths], each preceded by the start token.

    Token t of a sequence is the item before position t. Its output depends only on items 0..t-1, so it may predict
    item t.

    Args:
        starts: [S], the first position of each sequence in `item_codes`.
        lengths: [S], number of tokens of each sequence, at least 1: the start token and the first `length - 1` items.
        item_codes: the item codes of which the sequences are slices.
        last_only: whether to request only the output of each sequence's last token, instead of every token's.
        gaps: code of the gap before each item, parallel to `item_codes`. The gap before a sequence's first item is
            ignored, because the previous item is not in the sequence.
        groups: for each group, the numbers of its sequences; None to use `length_groups`.

    Returns:
        The packed sequences; the sequence numbers in packing order, int64 [S]; and, for each output, the position of
        the next item in `item_codes`, int64 [B].
    """
    groups = length_groups(lengths) if groups is None else groups
    nothing = np.empty(0, dtype=np.int64)
    order = np.concatenate([nothing, *groups])
    tokens, positions, wanted, follow, shapes, since, done = [], [], [], [], [], [], 0
    for group in groups:
        longest = int(lengths[group].max())
        place = np.broadcast_to(np.arange(longest), (len(group), longest))
        at = starts[group, None] + place
        present = place < lengths[group, None]
        is_item = present & (place > 0)
        codes = np.full(at.shape, START, dtype=np.int64)
        codes[is_item] = np.asarray(item_codes)[at[is_item] - 1]
        chosen = np.flatnonzero(place == lengths[group, None] - 1 if last_only else present)
        tokens.append(codes.reshape(-1))
        positions.append(place.reshape(-1))
        wanted.append(done + chosen)
        follow.append(at.reshape(-1)[chosen])
        if gaps is not None:
            codes = np.zeros(at.shape, dtype=np.int64)
            has_gap = present & (place > 1)
            codes[has_gap] = np.asarray(gaps)[at[has_gap] - 1]
            since.append(codes.reshape(-1))
        shapes.append((len(group), longest))
        done += at.size
    packed = Packed(
        tokens=torch.from_numpy(np.concatenate([nothing, *tokens])),
        positions=torch.from_numpy(np.concatenate([nothing, *positions])),
        shapes=tuple(shapes),
        rows=torch.from_numpy(np.concatenate([nothing, *wanted])),
        gaps=torch.from_numpy(np.concatenate(since)) if since else None,
    )
    return packed, order, np.concatenate([nothing, *follow])


def pack_histories(history: Tensor, gaps: Tensor | None = None) -> tuple[Packed, Tensor]:
    """Pack a rectangle of histories, int64 [B, L], padded with -1 on the left; request the output after the last item.

    `gaps`, int64 [B, L], contains the code of the gap before each item.

    Returns:
        The packed histories, and the output position of each row of `history`, int64 [B].
    """
    codes = history.cpu().numpy()
    counts = (codes >= 0).sum(1)
    width = codes.shape[1]
    starts = np.arange(len(codes), dtype=np.int64) * width + width - counts
    since = None if gaps is None else gaps.cpu().numpy().reshape(-1)
    packed, order, _ = pack(starts, counts.astype(np.int64) + 1, codes.reshape(-1), last_only=True, gaps=since)
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return packed.to(history.device), torch.from_numpy(place).to(history.device)


def token_counts(shapes: Sequence[tuple[int, int]]) -> list[int]:
    """Count the tokens of each group, including padding."""
    return [sequences * longest for sequences, longest in shapes]
