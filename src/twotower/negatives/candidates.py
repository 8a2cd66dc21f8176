"""Pooling of sources: items, their expected counts and their masks, made together so that they cannot disagree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twotower.errors import InputError
from twotower.negatives.sources import Request, Source, log_complement


@dataclass(frozen=True)
class Candidates:
    """The candidates of one batch, shared by its rows.

    Attributes:
        items: codes, int64 [M].
        log_expected_count: log kappa_j of each candidate, pooled over all sources, float32 [M]. After `collapse()`
            exp(-log_expected_count) is the weight of all copies of the item together.
        hits: bool [B, M], True where a candidate is no negative for the row: its own positive (accidental hit), a
            known positive, or a place left empty by the removal of duplicates.
        multiplicity: how many drawn copies each candidate stands for, int64 [M] (1 before `collapse()`).
        source: which source of the pool brought the candidate, int64 [M]; -1 once copies are merged.
    """

    items: Tensor
    log_expected_count: Tensor
    hits: Tensor
    multiplicity: Tensor
    source: Tensor

    def collapse(self) -> Candidates:
        """The same estimate with each distinct item once: copies merged into one with their summed weight.

        sum over copies of exp(s_j - log kappa_j) = exp(s_j - log kappa'_j), log kappa'_j = -logsumexp(-log kappa_j),
        so that loss and gradient are unchanged and no product is computed twice.
        """
        items, inverse = torch.unique(self.items, return_inverse=True)
        weight = torch.zeros(len(items), dtype=torch.float64, device=items.device)
        # Weights of one item differ by little (the same kappa, or that of two sources): no overflow once its own
        # largest is taken out.
        log_weight = -self.log_expected_count.double()
        largest = torch.full_like(weight, -torch.inf).scatter_reduce(0, inverse, log_weight, "amax")
        weight.index_add_(0, inverse, torch.exp(log_weight - largest[inverse]).nan_to_num(0.0))
        # Copies are alike for every row, but for empty places, which are masked for all rows: prefer a live copy.
        place = torch.arange(len(inverse), device=items.device)
        live = torch.isfinite(log_weight).long() * len(inverse)
        chosen = torch.zeros_like(items).scatter_reduce(0, inverse, place + live, "amax") % max(len(inverse), 1)
        multiplicity = torch.zeros_like(items).index_add_(0, inverse, self.multiplicity)
        return Candidates(
            items=items,
            log_expected_count=-(largest + weight.log()).to(self.log_expected_count.dtype),
            hits=self.hits[:, chosen],
            multiplicity=multiplicity,
            source=torch.full_like(items, -1),
        )

    def to(self, device: torch.device | str) -> Candidates:
        """The same candidates on another device."""
        return replace(self, **{name: getattr(self, name).to(device) for name in self.__dataclass_fields__})


class Pool(nn.Module):
    """Several sources as one: expected counts are added, or absences multiplied where duplicates are removed.

    For a candidate j from any of the random sources s (THEORY, section 2)

        duplicates kept:     kappa_j = sum_s kappa_j^s
        duplicates removed:  kappa_j = 1 - prod_s (1 - inclusion_j^s)

    so that one item has one kappa, whichever source brought it.

    Args:
        sources: one or more sources.
        unique: remove duplicates over all sources together.

    Raises:
        InputError: there is no source.

    Example:
        >>> frequency = CountedFrequency(torch.tensor([5, 3, 2, 0]))
        >>> pool = Pool(InBatch(frequency), Sampled(Uniform(4), size=8), unique=True)
        >>> drawn = pool.draw(torch.tensor([0, 1, 0]))
        >>> drawn.hits.shape == (3, len(drawn.items))
        True
    """

    def __init__(self, *sources: Source, unique: bool = False) -> None:
        super().__init__()
        if not sources:
            raise InputError("sources: a pool needs at least one source of candidates, such as InBatch(frequency)")
        self.sources = nn.ModuleList(sources)
        self.unique = unique

    def draw(
        self,
        positives: Tensor,
        *,
        known_positives: Tensor | tuple[Tensor, Tensor] | None = None,
        group: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Candidates:
        """Draw the candidates of one batch.

        Args:
            positives: item of each row, int64 [B].
            known_positives: other items that a row must not be pushed away from: int64 [B, H] padded with -1, or a
                pair (row [P], item [P]). They are masked for their row; kappa is unchanged (THEORY, rule 7).
            group: group that the batch was built in, int64 scalar tensor, for grouped frequencies.
            generator: random generator of the draws.

        Returns:
            Candidates, [M] of them; at least the positives of the batch where a source is in-batch.

        Raises:
            InputError: `positives` is not int64 [B]; a candidate has an expected count of zero (CPU only: the check
                would stall an accelerator).
        """
        if positives.ndim != 1 or positives.dtype != torch.int64:
            raise InputError(
                f"positives: expected int64 item codes of shape [B], found {positives.dtype} {list(positives.shape)}"
            )
        request = Request(positives, group, generator)
        parts = [self._draw_from(source, request) for source in self._members()]
        items = torch.cat([part for part, _ in parts])
        empty = torch.cat([void for _, void in parts])
        source = torch.cat([torch.full_like(part, place) for place, (part, _) in enumerate(parts)])
        if self.unique:
            items, duplicate, order = sorted_duplicates(items)
            # A copy that is already void must not stand for a live one: within-source duplicates sort beside it.
            empty = duplicate
            source = torch.full_like(source[order], -1)
        items, empty, source = _compact(items, empty, source)
        log_expected_count = self.log_expected_count(items, request)
        if items.device.type == "cpu":
            self._refuse_impossible(items, log_expected_count)
        # An empty place weighs nothing: kappa = inf. It is masked as well, for losses that do not look at kappa.
        log_expected_count = log_expected_count.masked_fill(empty, torch.inf)
        hits = (items == positives[:, None]) | empty
        if known_positives is not None:
            hits |= membership(items, *_as_pairs(known_positives), rows=len(positives))
        return Candidates(
            items, log_expected_count.to(torch.float32), hits, torch.ones_like(items), source
        )

    def log_expected_count(self, items: Tensor, request: Request) -> Tensor:
        """log kappa_j of the whole pool, float64, the shape of `items`."""
        if self.unique:
            absence = torch.stack([source.log_absence(items, request) for source in self._members()]).sum(0)
            return log_complement(absence)
        return torch.logsumexp(
            torch.stack([source.log_expected_count(items, request) for source in self._members()]), 0
        )

    def _members(self) -> Sequence[Source]:
        return list(self.sources)  # type: ignore[arg-type]  # ModuleList forgets what it holds

    @staticmethod
    def _draw_from(source: Source, request: Request) -> tuple[Tensor, Tensor]:
        items = source.draw(request)
        if source.unique:
            items, duplicate, _ = sorted_duplicates(items)
            return items, duplicate
        return items, torch.zeros_like(items, dtype=torch.bool)

    @staticmethod
    def _refuse_impossible(items: Tensor, log_expected_count: Tensor) -> None:
        impossible = ~torch.isfinite(log_expected_count)
        if bool(impossible.any()):
            item = int(items[impossible][0])
            raise InputError(
                f"item code {item} was drawn, but its expected count is zero or not a number: the frequency was not "
                "counted from the data these batches come from; count it from the same training interactions"
            )


def sorted_duplicates(items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sort codes and mark every copy but the first: (sorted [m], is a duplicate [m], order [m])."""
    ordered, order = torch.sort(items)
    duplicate = torch.zeros_like(ordered, dtype=torch.bool)
    duplicate[1:] = ordered[1:] == ordered[:-1]
    return ordered, duplicate, order


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
    # cut off: nothing here has a shape that depends on the data, so an accelerator never waits.
    marks = torch.zeros(rows, len(keys) + 1, dtype=torch.bool, device=items.device)
    if len(keys) and len(item):
        marks[row, torch.where(keys[place] == item, place, len(keys))] = True
    first = torch.searchsorted(keys, items)
    return marks[:, first]


def _as_pairs(known: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    if isinstance(known, tuple):
        return known
    row = torch.arange(len(known), device=known.device)[:, None].expand_as(known)
    return row.reshape(-1), known.reshape(-1)


def _compact(items: Tensor, empty: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Drop empty places on CPU, where it saves work; keep them, masked, where their number would have to be awaited."""
    if items.device.type != "cpu" or not bool(empty.any()):
        return items, empty, source
    live = ~empty
    return items[live], empty[live], source[live]
