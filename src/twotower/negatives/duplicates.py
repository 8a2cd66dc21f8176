"""Duplicate removal and membership tests in fixed shapes, so that an accelerator never waits for a size.

An empty slot is marked -1. Only `compact` drops empty slots, and only on the CPU, where that saves work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def empty_duplicates(items: Tensor) -> Tensor:
    """Sort codes and replace every copy but the first with -1; int64 [m]."""
    ordered = torch.sort(items).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[1:] = ordered[1:] == ordered[:-1]
    return ordered.masked_fill(later, -1)


def row_duplicates(items: Tensor) -> Tensor:
    """Apply `empty_duplicates` within each row, [B, R]."""
    ordered = torch.sort(items, 1).values
    later = torch.zeros_like(ordered, dtype=torch.bool)
    later[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
    return ordered.masked_fill(later, -1)


def compact(items: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return items, a mask of their empty slots, and their sources; on the CPU the empty slots are dropped.

    On an accelerator an empty slot gets a valid code (0), since its embedding is looked up before it is masked.
    """
    empty = items < 0
    if items.device.type == "cpu":
        live = ~empty
        return items[live], empty[live], source[live]
    return items.clamp(min=0), empty, source


def membership(items: Tensor, row: Tensor, item: Tensor, *, rows: int) -> Tensor:
    """Find which candidates belong to which row's set, by binary search.

    Args:
        items: candidates, int64 [M], in any order, duplicates allowed.
        row: row of each member, int64 [P].
        item: its item code, int64 [P]; -1 marks an empty slot.
        rows: B.

    Returns:
        bool [B, M].
    """
    keys = torch.sort(items).values
    place = torch.searchsorted(keys, item).clamp_(max=max(len(keys) - 1, 0))
    # Mark the first copy of each key. Members that are not candidates go to an extra column, which is dropped, so that
    # no shape depends on the data.
    marks = torch.zeros(rows, len(keys) + 1, dtype=torch.bool, device=items.device)
    if len(keys) and len(item):
        marks[row, torch.where(keys[place] == item, place, len(keys))] = True
    return marks[:, torch.searchsorted(keys, items)]


def membership_of_rows(items: Tensor, members: Tensor) -> Tensor:
    """Test whether items [B, R] are among the members [B, S] of their row; bool [B, R], False for empty slots (-1)."""
    if members.shape[1] == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    ordered = torch.sort(members, 1).values
    place = torch.searchsorted(ordered, items).clamp_(max=members.shape[1] - 1)
    return (ordered.gather(1, place) == items) & (items >= 0)


def known_in_rows(items: Tensor, row: Tensor, item: Tensor) -> Tensor:
    """Test whether items [B, R] are among the pairs (row [P], item [P]) of their row; bool [B, R]."""
    if len(item) == 0 or items.numel() == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    width = torch.maximum(items.max(), item.max()) + 2
    keys = torch.sort(row * width + item).values
    wanted = torch.arange(len(items), device=items.device)[:, None] * width + items
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return (keys[place] == wanted) & (items >= 0)


def as_pairs(known: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return row members as (row [P], item [P]), given [B, H] padded with -1 or already as such a pair."""
    if isinstance(known, tuple):
        return known
    row = torch.arange(len(known), device=known.device)[:, None].expand_as(known)
    return row.reshape(-1), known.reshape(-1)
