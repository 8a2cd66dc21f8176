"""Candidates under the rule of eligible items (`data.eligibility`): masks for the rows, and draws within a group.

A candidate that is not eligible for a row, in the row's group at the row's time, is masked for it. The target is then
the softmax over the eligible items, and kappa is unchanged, because it is an unconditional expectation (docs/theory.md,
rule 7). `SampledWithinGroup` does not draw such candidates in the first place, which lowers the spread of the estimate;
its kappa is conditional on the group.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from twotower.data.eligibility import Eligibility, EligibleRows
from twotower.errors import InputError
from twotower.negatives.proposals import Proposal
from twotower.negatives.sources import DrawRequest, RandomSource


class EligibleItems(nn.Module):
    """The eligibility rule as tensors that move to a device with the pool.

    Checkpoints do not contain them, because the rule is read from the data.

    Args:
        rule: the eligibility rule.
    """

    member: Tensor | None
    start: Tensor | None
    end: Tensor | None

    def __init__(self, rule: Eligibility) -> None:
        super().__init__()
        for name in ("member", "start", "end"):
            values = getattr(rule, name)
            self.register_buffer(name, None if values is None else torch.from_numpy(values), persistent=False)

    def of_rows(self, request: DrawRequest) -> EligibleRows:
        """Return the rule for the selected rows of a request and all items.

        Raises:
            InputError: the request has no groups or no times, and the rule needs them.
        """
        for name, needed in (("groups", self.member), ("times", self.start)):
            if needed is not None and getattr(request, name) is None:
                raise InputError(
                    f"request.{name}: the pool has a rule for eligible items (data.eligibility); pass the {name} of "
                    f"the rows, DrawRequest({name}=...)"
                )
        every = EligibleRows(
            None if self.member is None else request.groups,
            None if self.start is None else request.times,
            self.member,
            self.start,
            self.end,
        )
        return every if request.rows is None else every.of_rows(request.rows)


class SampledWithinGroup(RandomSource):
    """Independent draws from a proposal restricted to the items of a group: kappa_j = n q_j / q(G) for j in group G.

    With `by_row`, each row draws within its own group; otherwise the batch has a single group
    (`objective.frequency: grouped`), and its draws may be shared. Draws do not depend on the time; candidates that are
    not available at a row's time are masked.

    Args:
        proposal: the distribution drawn from.
        rule: the eligibility rule, which must have item groups.
        size: n, the number of draws.
        unique: remove duplicates among the draws.
        per_row: draw n candidates per row instead of n for the whole batch.
        by_row: the rows of a batch may have different groups; requires `per_row`.
    """

    member: Tensor
    log_weight: Tensor
    log_total: Tensor
    codes: Tensor
    cumulative: Tensor
    first: Tensor

    def __init__(
        self,
        proposal: Proposal,
        rule: Eligibility,
        size: int,
        *,
        unique: bool = False,
        per_row: bool = False,
        by_row: bool = False,
    ) -> None:
        super().__init__()
        if size < 0:
            raise InputError(f"size: expected a number of draws >= 0, found {size}")
        assert rule.member is not None and (per_row or not by_row)
        self.size, self.unique, self.per_row, self.by_row = size, unique, per_row, by_row
        self.varies_by_row = by_row
        member = torch.from_numpy(rule.member)
        log_weight = proposal.log_prob(torch.arange(member.shape[1]))
        in_group = torch.where(member, log_weight, -torch.inf)
        log_total = in_group.logsumexp(1)
        drawable = in_group > -torch.inf
        group, codes = drawable.nonzero(as_tuple=True)
        share = (in_group[group, codes] - log_total[group]).exp()
        ends = drawable.sum(1).cumsum(0)
        # One ascending sequence for all groups: group g covers the values from g to g + 1, so one search is enough.
        sums = share.cumsum(0)
        before = torch.cat([sums.new_zeros(1), sums])[ends - drawable.sum(1)]
        self.register_buffer("member", member, persistent=False)
        self.register_buffer("log_weight", log_weight, persistent=False)
        self.register_buffer("log_total", log_total, persistent=False)
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("cumulative", sums - before[group] + group, persistent=False)
        self.register_buffer("first", torch.cat([ends.new_zeros(1), ends]), persistent=False)

    def draw(self, request: DrawRequest) -> Tensor:
        """Draw `size` items, [size], or [B, size] for all rows; -1 if the group has no item to draw."""
        rows = len(request.positives)
        shape = (rows, self.size) if self.per_row else (self.size,)
        u = torch.rand(shape, generator=request.generator, dtype=torch.float64, device=self.log_weight.device)
        group = self._groups(request, own=False)
        group = group[:, None].expand(shape) if self.by_row else group.expand(shape)
        place = torch.searchsorted(self.cumulative, u + group, right=True)
        # Rounding must not select an item of the next group.
        place = torch.minimum(torch.maximum(place, self.first[group]), self.first[group + 1] - 1)
        codes = self.codes if len(self.codes) else self.codes.new_zeros(1)
        return codes[place.clamp(min=0)].masked_fill(self.first[group + 1] == self.first[group], -1)

    def draws(self, request: DrawRequest) -> int:
        """Return n, the number of draws."""
        del request
        return self.size

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return log q_j within the group of the row or batch, float64, the shape of `items`; -inf outside it."""
        group = self._groups(request, own=True)
        if self.by_row:
            group = group.reshape(-1, *[1] * (items.ndim - 1))
        log_weight = self.log_weight[items]
        drawable = self.member[group, items] & (log_weight > -torch.inf)
        return torch.where(drawable, log_weight - self.log_total[group], -torch.inf)

    def _groups(self, request: DrawRequest, *, own: bool) -> Tensor:
        if self.by_row:
            if request.groups is None:
                raise InputError(
                    "request.groups: the candidates of a row are drawn within its group; pass DrawRequest(groups=...)"
                )
            return request.groups[request.rows] if own and request.rows is not None else request.groups
        if request.group is None:
            raise InputError("request.group: draws within a group need the group of the batch; draw with group=...")
        return torch.as_tensor(request.group, device=self.log_weight.device)
