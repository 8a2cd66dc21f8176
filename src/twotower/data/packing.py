"""Sequences of different lengths side by side: groups of similar length, so that little is padded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: The token before the first item of a sequence, and in the places that are padding; no item has this code.
START = -1
#: What a further group costs in an encoder, in tokens: a few dozen operations are started once more.
GROUP_COST = 256


@dataclass(frozen=True)
class Windows:
    """How the sequences of a training batch were drawn: without replacement, every choice as likely.

    Attributes:
        drawn: S, windows in the batch.
        total: W, windows in all.
        rows: of all windows together.
    """

    drawn: int
    total: int
    rows: int


@dataclass(frozen=True, eq=False)
class Packed:
    """Sequences in groups of similar length, each group a rectangle that is padded on the right.

    A causal encoder looks to the left alone, so padding on the right changes nothing of what stands before it.

    Attributes:
        tokens: int64 [P], the input items of all groups one after the other, row by row; -1 for the start of a sequence
            and for padding.
        positions: int64 [P], place of each token within its sequence, 0 for the start.
        shapes: (sequences, longest) of each group; their products sum to P.
        rows: int64 [B], which tokens' outputs are wanted, ascending; for training those of every token that is no
            padding.
        windows: how the sequences were drawn; None where they are not a training batch.
        gaps: int64 [P], code of the time since the item before (gaps.py), 0 where there is none within the sequence;
            None where times are not read.
    """

    tokens: Tensor
    positions: Tensor
    shapes: tuple[tuple[int, int], ...]
    rows: Tensor
    windows: Windows | None = None
    gaps: Tensor | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Packed:
        """The same on a device."""
        return replace(
            self,
            tokens=self.tokens.to(device, non_blocking=non_blocking),
            positions=self.positions.to(device, non_blocking=non_blocking),
            rows=self.rows.to(device, non_blocking=non_blocking),
            gaps=None if self.gaps is None else self.gaps.to(device, non_blocking=non_blocking),
        )

    def parts(self, tokens: int) -> list[Packed]:
        """The same sequences in several packs of at most so many tokens, or one sequence; outputs in the same order."""
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
    """Sequences in groups of similar length, with the fewest tokens: padding and `cost` for each group.

    By dynamic programming over the distinct lengths: the best groups of the i shortest end in one group of all lengths
    j..i, padded to the longest.

    Args:
        lengths: [S], above 0.
        cost: of one more group, in tokens.

    Returns:
        Numbers of the sequences of each group, shortest group first; within a group as they came.

    Example:
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
    """Pack the sequences item_codes[starts : starts + lengths], each with the start token before it.

    Token t of a sequence is the item before its place t, so its output may tell item t and has seen items 0..t-1 alone.

    Args:
        starts: [S], where each begins.
        lengths: [S], tokens of each, at least 1; the tokens are the start and the first `length - 1` items.
        item_codes: what they are cut from.
        last_only: whether the output of each sequence's last token alone is wanted, instead of every token's.
        gaps: the code of the gap before each item, beside `item_codes`. That of a sequence's first item is not looked
            at: what lies before it is not.
        groups: numbers of the sequences that are padded together; `length_groups` where None.

    Returns:
        The packed sequences; the numbers of the sequences in the order they were packed in, int64 [S]; and of each
        output, int64 [B], the place in `item_codes` that follows its token.
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
            told = present & (place > 1)
            codes[told] = np.asarray(gaps)[at[told] - 1]
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
    """Pack rectangles of histories, int64 [B, L], -1 on the left; the output after the newest item of each is wanted.

    `gaps` int64 [B, L]: codes of the gap before each item.

    Returns:
        The packed histories, and for each row of `history` its place among the outputs, int64 [B].
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
    """Tokens of each group, padding included."""
    return [sequences * longest for sequences, longest in shapes]
