"""Removing duplicates and testing membership in fixed shapes, so that an accelerator never waits for a size.

An empty place is marked -1. Only `compact` drops empty places, and only on CPU, where that saves work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_duplicates(items: Tensor) -> Tensor:
    """Sort codes and mark every copy but the first as empty: int64 [m], -1 where empty."""
    ordered = torch.sort(items).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(later, -1)


def row_duplicates(items: Tensor) -> Tensor:
    """`empty_duplicates` within each row, [B, R]."""
    ordered = torch.sort(items, 1).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(later, -1)


def compact(items: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Items, which of their places are empty, and their sources; without the empty places on CPU.

    Elsewhere an empty place keeps a valid code (0), since its embedding is looked up before it is masked.
    """
    empty = items < 0
    if items.device.type == "cpu":
        live = ~empty
        return items[live], empty[live], source[live]
    return items.clamp(min=0), empty, source


def membership(items: Tensor, row: Tensor, item: Tensor, *, rows: int) -> Tensor:
    """Which candidates stand in which row's set, by binary search.

    Args:
        items: candidates, int64 [M], in any order, duplicates allowed.
        row: row of each member, int64 [P].
        item: its item code, int64 [P]; -1 marks an empty place.
        rows: B.

    Returns:
        bool [B, M].
    """
    keys = torch.sort(items).values
    place = torch.searchsorted(keys, item).clamp_(max=max(len(keys) - 1, 0))
    # The first copy of each key takes the mark; members that are no candidate land in one column too many, which is
    # cut off: nothing here has a shape that depends on the data.
    marks = torch.zeros(rows, len(keys) + 1, dtype=torch.bool, device=items.device)
    if len(keys) and len(item):
        marks[row, torch.where(keys[place] == item, place, len(keys))] = True
    return marks[:, torch.searchsorted(keys, items)]


def membership_of_rows(items: Tensor, members: Tensor) -> Tensor:
    """Whether items [B, R] stand among the members [B, S] of their row; bool [B, R]. Empty places (-1) never do."""
    if members.shape[1] == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    ordered = torch.sort(members, 1).values
    place = torch.searchsorted(ordered, items).clamp_(max=members.shape[1] - 1)
    return (ordered.gather(1, place) == items) & (items >= 0)


def known_in_rows(items: Tensor, row: Tensor, item: Tensor) -> Tensor:
    """Whether items [B, R] stand among their row's pairs (row [P], item [P]); bool [B, R]."""
    if len(item) == 0 or items.numel() == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    width = torch.maximum(items.max(), item.max()) + 2
    keys = torch.sort(row * width + item).values
    asked = torch.arange(len(items), device=items.device)[:, None] * width + items
    place = torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)
    return (keys[place] == asked) & (items >= 0)


def as_pairs(known: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Members of rows as (row [P], item [P]), from [B, H] padded with -1 or from such a pair."""
    if isinstance(known, tuple):
        return known
    row = torch.arange(len(known), device=known.device)[:, None].expand_as(known)
    return row.reshape(-1), known.reshape(-1)
