"""Candidate pools sized to the same number of distinct candidates, which determines the cost of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from twotower.config.run import ObjectiveConfig
from twotower.data import Interactions
from twotower.negatives import DrawRequest, Pool, Sampled
from twotower.negatives.frequency import Group
from twotower.objectives.build import build_pool

Sources = list[dict[str, dict[str, Any] | None]]


@dataclass(frozen=True)
class PoolPlan:
    """A candidate pool that can be resized through its last sampled source or the batch size.

    Attributes:
        name: name in tables.
        sources: as in the section `objective` of a configuration.
        unique: whether duplicates are removed over all sources.
    """

    name: str
    sources: Sources
    unique: bool = True

    def settings(self, base: ObjectiveConfig | None = None) -> ObjectiveConfig:
        """Return the settings of `expected-count` with this pool, and all other settings from `base`."""
        found = base or ObjectiveConfig()
        return found.model_copy(
            update={"name": "expected-count", "sources": self.sources, "unique": self.unique, "strength": 1.0}
        )

    @property
    def grows_with_batch(self) -> bool:
        """Return whether only the batch size can resize the pool."""
        return all(name in ("in_batch", "head") for source in self.sources for name in source)

    def sized(self, size: int) -> PoolPlan:
        """Return the same pool with `size` draws from its last source."""
        if self.grows_with_batch:
            return self
        ((name, options),) = self.sources[-1].items()
        return replace(self, sources=[*self.sources[:-1], {name: {**(options or {}), "size": size}}])


def expected_distinct(pool: Pool, batch_size: int, groups: Sequence[Group | None] = (None,)) -> float:
    """Compute the expected number of distinct items among the candidates of a row.

        sum over j of  1 - prod_s (1 - inclusion_j^s),   1 for an item that is always included

    Args:
        pool: the pool; only shared sources count, not per-row ones.
        batch_size: B, number of rows that share a draw.
        groups: groups of batches to average over.
    """
    total = 0.0
    for group in groups:
        request = DrawRequest(torch.zeros(batch_size, dtype=torch.int64), group=group)
        sources = pool.random_sources()
        items = torch.arange(_catalog(pool))
        absence = torch.zeros(len(items), dtype=torch.float64)
        for source in sources:
            absence = absence + source.log_absence(items, request)
        inclusion = -torch.expm1(absence)
        for member in pool.members():
            if member.deterministic and not member.per_row:
                inclusion[member.draw(request)] = 1.0
        total += float(inclusion.sum())
    return total / len(groups)


def at_equal_distinct(
    plan: PoolPlan,
    target: float,
    train: Interactions,
    *,
    batch_size: int,
    base: ObjectiveConfig | None = None,
    groups: Sequence[Group | None] = (None,),
) -> tuple[PoolPlan, int] | None:
    """Find the plan and the batch size at which a pool has `target` distinct candidates.

    Resizes the last sampled source, or the batch if there is none, by bisection: the number of distinct items grows
    with every draw.

    Returns:
        The plan and the batch size; None if the pool cannot have that number of distinct candidates.
    """
    pool = build_pool(plan.sized(1).settings(base), train)
    drawn = [member for member in pool.members() if isinstance(member, Sampled)]

    def distinct(size: int) -> float:
        if drawn:
            drawn[-1].size = size
        return expected_distinct(pool, batch_size if drawn else size + 1, groups)

    # A batch has no more rows than an epoch.
    most = 64 * max(target, train.num_items) if drawn else len(train) - 1
    low, high = 0, 1
    if distinct(1) > target + 1.0:
        return None
    while distinct(high) < target:
        low, high = high, high * 2
        if high > most:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if distinct(middle) < target else (low, middle)
    return (plan.sized(high), batch_size) if drawn else (plan, high + 1)


def _catalog(pool: Pool) -> int:
    """Return N, from the first source that knows it."""
    for member in pool.members():
        if isinstance(member, Sampled):
            return member.proposal.num_items
    frequencies = pool.frequencies()
    if frequencies:
        return frequencies[0].num_items
    return int(max(int(m.draw(DrawRequest(torch.zeros(1, dtype=torch.int64))).max()) for m in pool.members())) + 1
