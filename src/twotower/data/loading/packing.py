"""Packing of sequences of different lengths: groups of similar length, to keep the padding small."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: The start token of a sequence, also used for padding; no item has this code.
START = -1
#: Cost of one more group in an encoder, in tokens: the launch of a few dozen more operations.
GROUP_COST = 256


@dataclass(frozen=True)
class Windows:
    """How the windows (or questions) of a training batch were drawn: uniformly, without replacement.

    Attributes:
        drawn: S, number of windows in the batch.
        total: W, number of windows in total.
        rows: number of rows of all windows together; its expectation if windows are drawn at random.
    """

    drawn: int
    total: int
    rows: float


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences in groups of similar length, each group a rectangle padded on the right.

    A causal encoder attends only to the left, so padding on the right does not change the outputs before it.

    Attributes:
        tokens: int64 [P], the input items of all groups concatenated, row by row; -1 for the start of a sequence and
            for padding.
        positions: int64 [P], position of each token within its sequence, 0 for the start.
        shapes: (sequences, longest) of each group; their products sum to P.
        rows: int64 [B], the tokens whose outputs are needed, ascending; in training all tokens except padding.
        windows: how the sequences were drawn; None if this is not a training batch.
        gaps: int64 [P], code of the time since the previous item (gaps.py), 0 if the sequence has no previous item;
            None if times are not read.
    """

    tokens: Tensor
    positions: Tensor
    shapes: tuple[tuple[int, int], ...]
    rows: Tensor
    windows: Windows | None = None
    gaps: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """Move to a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            gaps=None if self.gaps is None else self.gaps.to(device, non_blocking=non_blocking),
        )

    def parts(self, tokens: int) -> list[Packed]:
        """Split into packs of at most this many tokens, or of one sequence; the outputs stay in the same order."""
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

    Dynamic programming over the distinct lengths: the best grouping of the i shortest lengths ends with one group of
    lengths j..i, padded to the longest.

    Args:
        lengths: [S], above 0.
        cost: cost of one more group, in tokens.

    Returns:
        Sequence numbers of each group, shortest group first; within a group in input order.

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
    """Pack the sequences item_codes[starts : starts + lengths], each with the start token in front.

    Token t of a sequence is the item before position t, so its output may predict item t: it has seen only items
    0..t-1.

    Args:
        starts: [S], first position of each sequence in `item_codes`.
        lengths: [S], tokens of each, at least 1; the tokens are the start and the first `length - 1` items.
        item_codes: the item codes that the sequences are slices of.
        last_only: request only the output of each sequence's last token, instead of every token's.
        gaps: code of the gap before each item, parallel to `item_codes`. The gap of a sequence's first item is ignored,
            because the item before it is not in the sequence.
        groups: numbers of the sequences that are padded together; None: use `length_groups`.

    Returns:
        The packed sequences; the sequence numbers in packing order, int64 [S]; and for each output the position in
        `item_codes` that follows its token, int64 [B].
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

    `gaps` int64 [B, L]: code of the gap before each item.

    Returns:
        The packed histories, and for each row of `history` its position among the outputs, int64 [B].
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
    """Count the tokens of each group, padding included."""
    return [sequences * longest for sequences, longest in shapes]
