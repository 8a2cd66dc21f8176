"""The pool: combines the draws of several sources into the candidates of one batch, one expected count per item."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from twotower.data.eligibility import Eligibility
from twotower.errors import InputError
from twotower.negatives.candidates import Candidates
from twotower.negatives.corrections import Correction, ExpectedCounts, NoCorrection
from twotower.negatives.eligibility import EligibleItems
from twotower.negatives.frequency import Frequency
from twotower.negatives.guard import Guard, RowRules
from twotower.negatives.masks import (
    NegativeMask,
    Pairs,
    RowRule,
    as_pairs,
    compact,
    empty_duplicates,
    known_in_rows,
    membership_of_rows,
    row_duplicates,
)
from twotower.negatives.sources import (
    CrossBatchMemory,
    DrawRequest,
    InBatch,
    RandomSource,
    Source,
    Stratum,
    log_complement,
)

#: Used in place of a source's index: the item is always included, or copies from several sources were merged.
FIXED = -2
MERGED = -1


class Pool(nn.Module):
    """A pool of candidate sources, which adds expected counts, or multiplies absences if duplicates are removed.

    For a candidate j from any of the random sources s (docs/theory.md, section 2)

        duplicates kept:     kappa_j = sum_s kappa_j^s
        duplicates removed:  kappa_j = 1 - prod_s (1 - inclusion_j^s)

    so that an item has the same kappa whichever source drew it. An item that a source always includes has kappa = 1,
    and its copies from random sources are masked. The same holds for the items of a row's `Stratum`, whose kappa comes
    from the stratum's source; an item in several strata belongs to one with kappa = 1, or else to the first.

    Args:
        sources: one or more sources.
        unique: remove duplicates over all sources together.
        correction: the values to subtract from the logits; by default the log expected count. The other corrections
            are for comparison.
        eligibility: the rule for eligible items: candidates that are not eligible for a row are masked for it, and a
            draw needs the groups and times of the rows (`DrawRequest`); None without a rule.

    Attributes:
        guard: masks the candidates that a fixed model scores at least as high as the row's positive; None without a
            guard.

    Raises:
        InputError: no source is given, two sources contain the same rows, or the counts of one source vary by row
            while the candidates of another are shared.

    Example:
        >>> import torch
        >>> from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform
        >>> frequency = CountedFrequency(torch.tensor([5, 3, 2, 0]))
        >>> pool = Pool(InBatch(frequency), Sampled(Uniform(4), size=8), unique=True)
        >>> drawn = pool.draw(torch.tensor([0, 1, 0]))
        >>> drawn.mask.shape == (3, len(drawn.items))
        True
    """

    def __init__(
        self,
        *sources: Source,
        unique: bool = False,
        correction: Correction | None = None,
        eligibility: Eligibility | None = None,
    ) -> None:
        super().__init__()
        if not sources:
            raise InputError("sources: a pool needs at least one source of candidates, such as InBatch(frequency)")
        for kind, name in ((InBatch, "in_batch"), (CrossBatchMemory, "memory")):
            if sum(isinstance(source, kind) for source in sources) > 1:
                raise InputError(f"sources: {name} is listed twice, with the same rows; remove one of the two")
        varying = [type(source).__name__ for source in sources if source.varies_by_row]
        shared = [type(source).__name__ for source in sources if not source.per_row]
        if varying and shared:
            raise InputError(
                f"sources: the expected counts of {varying[0]} differ from row to row, so this source cannot be pooled "
                f"with candidates shared by the batch ({', '.join(shared)}); use sources with per_row=True"
            )
        self.sources = nn.ModuleList(sources)
        self.unique = unique
        self.correction = correction or ExpectedCounts()
        self.eligible = None if eligibility is None else EligibleItems(eligibility)
        self.guard: Guard | None = None
        #: Whether `draw` computes `Candidates.log_unmasked`; set by an objective that needs it.
        self.counts_unmasked = False

    def draw(self, request: DrawRequest | Tensor, **options: Any) -> Candidates:
        """Draw the candidates of one batch.

        In training mode (`pool.train()`, the default) streaming frequencies are updated with the positives before the
        draw, and a cross-batch memory after it. In evaluation mode no state changes.

        Args:
            request: the batch, or its positives, int64 [B].
            options: fields of `DrawRequest` by name: `draw(positives, generator=rng)` is short for
                `draw(DrawRequest(positives, generator=rng))`.

        Returns:
            The candidates; with an in-batch source they include the positives of the batch.

        Raises:
            InputError: `positives` is not int64 [B]; known positives are missing although rows are positions of whole
                sequences and a source is in-batch or a memory; the only source is in-batch and the batch has one row or
                one sequence; the batch has more rows than the frequency was counted on; or a candidate has an expected
                count of zero (CPU only: the check would stall an accelerator).
        """
        request = DrawRequest.of(request, **options)
        positives, group = request.positives, request.group
        if positives.ndim != 1 or positives.dtype != torch.int64:
            raise InputError(
                f"positives: expected int64 item codes of shape [B], found {positives.dtype} {list(positives.shape)}"
            )
        if (
            request.windows is not None
            and request.known_positives is None
            and any(isinstance(member, InBatch | CrossBatchMemory) for member in self.members())
        ):
            raise InputError(
                "known_positives: rows of one sequence are not independent of each other; with whole sequences and "
                "in_batch or memory, pass the known positives of every row so that they are masked"
            )
        size, unit = (len(positives), "row") if request.windows is None else (request.windows.drawn, "sequence")
        if size == 1 and all(isinstance(m, InBatch) for m in self.members()):
            raise InputError(
                f"positives: a batch of one {unit} has no other {unit}s, so in_batch alone gives it no candidates; use "
                "larger batches, or add a source such as uniform"
            )
        if self.training:
            for frequency in self.frequencies():
                frequency.observe(positives, group)
        known = None if request.known_positives is None else as_pairs(request.known_positives)
        fixed, drawn, drawn_source, strata, row_drawn, row_source = self._gather(request)
        items, empty, source = self._shared(fixed, drawn, drawn_source)
        log_count = self._log_count(items, source, request, is_fixed=source == FIXED)
        # An empty slot has weight zero: kappa = inf. It is also masked, for losses that do not use kappa.
        log_count = log_count.masked_fill(empty, torch.inf)
        own_positives = request.own_positives
        own = (torch.arange(len(own_positives), device=own_positives.device), own_positives)
        skipped = [one.skipped for one in strata if one.skipped is not None]
        pairs = [own, known, *(as_pairs(one) for one in (*(one.items for one in strata), *skipped))]
        eligible = self.rule_of_rows(request)
        result = Candidates(
            items=items,
            log_expected_count=log_count.to(torch.float32),
            negative_mask=NegativeMask(
                [pair for pair in pairs if pair is not None],
                rows=len(own_positives),
                items=items,
                size=len(items),
                empty=None if items.device.type == "cpu" and not bool(empty.any()) else empty,
                eligible=None if eligible is None else eligible.select(items),
            ),
            multiplicity=(~empty).long(),
            source=source,
            positives=own_positives,
            positive_log_count=self._positive_log_count(own_positives, request, fixed, strata),
            log_unmasked=self._log_unmasked(own, known, request) if self.counts_unmasked else None,
        )
        if strata or row_drawn is not None:
            result = self._with_rows(
                result,
                strata=strata,
                drawn=row_drawn,
                source=row_source,
                known=known,
                shared_fixed=fixed,
                request=request,
                eligible=eligible,
            )
        if self.training:
            for member in self.members():
                if isinstance(member, CrossBatchMemory):
                    member.remember(positives, group, epoch=request.epoch, windows=request.windows)
        return result

    def log_expected_count(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Combine log kappa_j over random sources, float64, the shape of `items`; -inf if none can draw the item."""
        sources = self.random_sources()
        if not sources:
            return torch.full(items.shape, -torch.inf, dtype=torch.float64, device=items.device)
        if self.unique:
            absence = torch.zeros(items.shape, dtype=torch.float64, device=items.device)
            already = 0
            for source in sources:
                absence += source.log_absence(items, request, already)
                already += source.epoch_draws(request)
            return log_complement(absence)
        return torch.logsumexp(torch.stack([source.log_expected_count(items, request) for source in sources]), 0)

    def rule_of_rows(self, request: DrawRequest) -> RowRule | None:
        """Return the rule that masks candidates for the selected rows of a request; None if there is none."""
        rules: list[RowRule] = []
        if self.eligible is not None:
            rules.append(self.eligible.of_rows(request))
        if self.guard is not None:
            rules.append(self.guard.of_rows(request))
        if len(rules) > 1:
            return RowRules(*rules)
        return rules[0] if rules else None

    def members(self) -> list[Source]:
        """Return the sources, in the order given."""
        return list(self.sources)  # type: ignore[arg-type]  # ModuleList is untyped

    def frequencies(self) -> list[Frequency]:
        """Return the distinct frequencies of the in-batch and memory sources."""
        by_id = {id(m.frequency): m.frequency for m in self.members() if isinstance(m, InBatch | CrossBatchMemory)}
        return list(by_id.values())

    def random_sources(self) -> list[RandomSource]:
        """Return the random sources, in the order given."""
        return [member for member in self.members() if isinstance(member, RandomSource)]

    def _gather(
        self, request: DrawRequest
    ) -> tuple[Tensor, Tensor, Tensor, list[Stratum], Tensor | None, Tensor | None]:
        """Draw from every source.

        Fixed items come from deterministic sources; per-row fixed items are strata. Per-row items are returned for the
        selected rows only.

        Returns:
            For shared candidates, the fixed items, the random items, and the source of each random item; for per-row
            candidates, the strata, the random items, and the source of each random item (None if there are none).
        """
        part = request.rows
        own = replace(request, positives=request.own_positives)
        shared: dict[bool, list[Tensor]] = {True: [], False: []}
        rows: list[Tensor] = []
        strata: list[Stratum] = []
        places, row_places = [], []
        for place, member in enumerate(self.members()):
            if member.deterministic and member.per_row:
                strata.append(member.stratum(request))
                continue
            # Per-row random candidates are drawn for all rows, so that they do not depend on how a batch is split.
            items = member.draw(own if member.deterministic else request)
            if member.per_row:
                items = items if part is None else items[part]
                items = row_duplicates(items) if member.unique else items
                rows.append(items)
                row_places.append(torch.full_like(items, place))
            else:
                items = empty_duplicates(items) if member.unique else items
                shared[member.deterministic].append(items)
                places += [] if member.deterministic else [torch.full_like(items, place)]
        blank = request.positives.new_empty(0)
        return (
            torch.cat([blank, *shared[True]]),
            torch.cat([blank, *shared[False]]),
            torch.cat([blank, *places]),
            sorted(strata, key=lambda one: one.log_count is not None),  # stable
            torch.cat(rows, 1) if rows else None,
            torch.cat(row_places, 1) if row_places else None,
        )

    def _shared(self, fixed: Tensor, drawn: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Merge the shared candidates; return items, a mask of empty slots, and sources (FIXED if always included)."""
        if self.unique:
            drawn = empty_duplicates(drawn)
            source = torch.full_like(source, MERGED)
        if len(fixed):
            fixed = empty_duplicates(fixed)
            drawn = drawn.masked_fill(torch.isin(drawn, fixed), -1)
        items = torch.cat([fixed, drawn])
        source = torch.cat([torch.full_like(fixed, FIXED), source])
        return compact(items, source)

    def _log_count(self, items: Tensor, source: Tensor, request: DrawRequest, *, is_fixed: Tensor) -> Tensor:
        if not items.numel() or not self.random_sources():
            return torch.zeros(items.shape, dtype=torch.float64, device=items.device)
        log_count = self.correction.log_count(self, items, source, request).masked_fill(is_fixed, 0.0)
        if items.device.type == "cpu":
            _refuse_impossible(items, log_count)
        return log_count

    def _positive_log_count(
        self, positives: Tensor, request: DrawRequest, fixed: Tensor, strata: list[Stratum]
    ) -> Tensor:
        log_count = torch.zeros(len(positives), dtype=torch.float64, device=positives.device)
        if self.random_sources():
            nowhere = torch.full_like(positives, MERGED)
            log_count = self.correction.log_count(self, positives, nowhere, request)
        # An always-included item has kappa = 1 whatever its count in the random sources, where it is masked.
        log_count = log_count.masked_fill(torch.isin(positives, fixed), 0.0)
        for one in reversed(strata):
            inside = (one.items == positives[:, None]).any(1)
            log_count = torch.where(inside, self._count_of_rows(one, log_count), log_count)
        return log_count.to(torch.float32)

    def _count_of_rows(self, stratum: Stratum, like: Tensor) -> Tensor:
        """Return log kappa in a stratum, [B]; 0 without a correction."""
        if stratum.log_count is None or isinstance(self.correction, NoCorrection):
            return torch.zeros_like(like)
        return stratum.log_count

    def _log_unmasked(self, own: Pairs, known: Pairs | None, request: DrawRequest) -> Tensor:
        """Compute log(1 - q(K(x) and y)) of each row, summing q over the distinct items that are masked, [B]."""
        row, item = own if known is None else tuple(torch.cat(pair) for pair in zip(own, known, strict=True))
        rows = len(own[0])
        if known is not None:
            # An item may be listed several times, and the positive is one of the known positives.
            order = torch.argsort(item, stable=True)
            order = order[torch.argsort(row[order], stable=True)]
            row, item = row[order], item[order]
        is_new = item >= 0
        is_new[1:] &= (item[1:] != item[:-1]) | (row[1:] != row[:-1])
        (source,) = self.random_sources()
        q = source.log_prob(item.clamp(min=0), request).exp().masked_fill(~is_new, 0.0)
        masked = torch.zeros(rows, dtype=torch.float64, device=item.device).index_add_(0, row, q)
        # If every item is masked no candidate is left, and any finite number works.
        return torch.log1p(-masked.clamp(max=1.0 - 1e-15)).to(torch.float32)

    def _with_rows(
        self,
        shared: Candidates,
        *,
        strata: list[Stratum],
        drawn: Tensor | None,
        source: Tensor | None,
        known: tuple[Tensor, Tensor] | None,
        shared_fixed: Tensor,
        request: DrawRequest,
        eligible: RowRule | None,
    ) -> Candidates:
        """Add the per-row candidates to the shared ones."""
        positives = shared.positives
        blank = positives.new_empty(len(positives), 0)
        fixed, members, log_counts = blank, blank, []
        for one in strata:
            # An item in several strata belongs to the first.
            own = one.drawn.masked_fill(membership_of_rows(one.drawn, members), -1)
            each = self._count_of_rows(one, torch.zeros(len(own), dtype=torch.float64, device=own.device))
            log_counts.append(each[:, None].expand(own.shape))
            fixed, members = torch.cat([fixed, own], 1), torch.cat([members, one.items], 1)
        drawn = blank if drawn is None or source is None else drawn
        if drawn.shape[1]:
            if self.unique:
                drawn = row_duplicates(drawn)
                # On an accelerator an empty slot has a valid code: it must not hide the rows' draws of that item.
                in_shared = torch.isin(drawn, shared.items.masked_fill(shared.multiplicity == 0, -1))
            else:
                in_shared = torch.isin(drawn, shared_fixed)
            in_fixed = membership_of_rows(drawn, members)
            drawn = drawn.masked_fill(in_shared | in_fixed, -1)
        items = torch.cat([fixed, drawn], 1)
        place = torch.cat([torch.full_like(fixed, FIXED), drawn if source is None else source], 1)
        empty = items < 0
        log_count = self._log_count(items.clamp(min=0), place, request, is_fixed=(place == FIXED) | empty)
        if log_counts:
            log_count = torch.cat([torch.cat(log_counts, 1), log_count[:, fixed.shape[1] :]], 1)
        mask = empty | (items == positives[:, None])
        if known is not None:
            mask |= known_in_rows(items, *known)
        for one in strata:
            if one.skipped is not None:
                mask |= membership_of_rows(items, one.skipped)
        if eligible is not None:
            mask |= eligible.blocked_of_rows(items)
        return replace(
            shared,
            row_items=items,
            row_log_expected_count=log_count.masked_fill(empty, torch.inf).to(torch.float32),
            row_mask=mask,
        )


def _refuse_impossible(items: Tensor, log_expected_count: Tensor) -> None:
    # +inf is a weight of zero in a published correction, not a count.
    impossible = ~(log_expected_count > -torch.inf) & (items >= 0)
    if bool(impossible.any()):
        item = int(items[impossible][0])
        raise InputError(
            f"item code {item} was drawn, but its expected count is zero or not a number: the frequency was counted on "
            "different data than these batches; count it from the same training interactions"
        )
