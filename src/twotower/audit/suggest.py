"""The search for the pool with the least gradient spread on a trained model, at equal numbers of candidates."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import yaml
from rich.console import Group
from rich.table import Table
from torch import Tensor

from twotower.audit.gradients import Measurement, depends_on_batch, estimates_softmax, measure, spread_gain
from twotower.audit.pools import PoolPlan, at_equal_distinct, expected_distinct
from twotower.audit.subject import Subject
from twotower.errors import InputError
from twotower.objectives.build import named_objective

#: Number of pools measured again with new draws, because the best of many noisy measurements is optimistic.
_FINALISTS = 3
#: Largest relative bias of a suggested pool, unless the present pool has a larger bias.
_SMALL = 0.03


@dataclass(frozen=True)
class PoolMeasure:
    """The measurement of one pool.

    Attributes:
        name: name of the pool.
        sources: its sources, as in a configuration.
        unique: its setting `unique`, as in a configuration.
        spread: root mean square over the rows of the standard deviation of one draw.
        spread_error: Monte-Carlo error of the spread.
        distinct: mean number of distinct negatives.
        bias: bias of the gradient, without its noise floor.
        gain: spread of the present pool divided by the spread of this pool, geometric mean over rows.
        gain_error: standard error of the gain.
        worse_rows: share of the rows with more spread than with the present pool.
        final: whether it was measured in the second round, with new draws.
    """

    name: str
    sources: list[dict[str, dict[str, Any] | None]]
    unique: bool
    spread: float
    spread_error: float
    distinct: float
    bias: float
    gain: float
    gain_error: float
    worse_rows: float
    final: bool


@dataclass(frozen=True)
class Suggestion:
    """The measured pools and the suggestion. Print it, or use `to_dict()`.

    Attributes:
        pools: the present pool first, then by gain.
        best: the finalist with the largest gain. Finalists qualify if the gain exceeds twice its error, the bias stays
            small, and the mean-square spread does not grow (because of a few much worse rows). None if none qualifies.
    """

    pools: list[PoolMeasure]
    best: PoolMeasure | None
    rows: int
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**asdict(self), "yaml": self.yaml(), "conclusion": self.conclusion()}

    def yaml(self) -> str | None:
        """Return the suggestion as part of a configuration, or None."""
        if self.best is None:
            return None
        objective = {"name": "expected-count", "unique": self.best.unique, "sources": self.best.sources}
        text: str = yaml.safe_dump({"objective": objective}, sort_keys=False, default_flow_style=None)
        return text

    def conclusion(self) -> str:
        """Return the conclusion as a sentence."""
        present = self.pools[0]
        if self.best is None:
            return (
                f"no pool beats the present one (spread {present.spread:.3f}, {present.distinct:.0f} distinct "
                "candidates) by more than twice the measurement error: keep it"
            )
        best = self.best
        return (
            f"{best.name}: {best.gain:.2f} ± {best.gain_error:.2f} times less spread than the present pool on a "
            f"typical row, {best.spread:.3f} instead of {present.spread:.3f} in root mean square, with "
            f"{best.distinct:.0f} distinct candidates instead of {present.distinct:.0f}"
        )

    def __rich__(self) -> Group:
        """Build a table for a rich console."""
        table = Table(title="Spread of one draw at equal numbers of distinct candidates", title_justify="left")
        table.add_column("pool")
        for title in ("spread", "distinct", "bias", "gain", "worse", "round"):
            table.add_column(title, justify="right")
        for one in self.pools:
            table.add_row(
                one.name,
                f"{one.spread:.3f} ± {one.spread_error:.3f}",
                f"{one.distinct:.0f}",
                f"{one.bias:.3f}",
                f"{one.gain:.2f} ± {one.gain_error:.2f}",
                f"{one.worse_rows:.0%}",
                "second" if one.final else "first",
            )
        notes = (
            f"{self.rows} rows, {self.draws} draws each in the first round, 4 times as many in the second\n"
            "gain = spread of the present pool / spread of this pool on a typical row; worse = share of rows with more "
            "spread"
        )
        return Group(table, notes, "", f"* {self.conclusion()}", *([self.yaml() or ""] if self.best else []))


def candidate_plans(target: float, counts: Tensor) -> list[PoolPlan]:
    """List the pools to try: in-batch alone, and each proposal alone, with in-batch candidates and with a head.

    If some items never occur in training, 1 is added to every frequency so that they can be drawn. A pool that
    never draws them would estimate a different sum, with less spread.

    Args:
        target: number of distinct candidates.
        counts: training interactions of each item, [N].
    """
    num_items = len(counts)
    floor = {} if bool((counts > 0).all()) else {"floor": 1.0}
    proposals: list[tuple[str, str, dict[str, Any]]] = [("uniform", "uniform", {})]
    for power in (0.25, 0.5, 0.75, 1.0):
        name = f"(frequency + 1)^{power:g}" if floor else f"frequency^{power:g}"
        proposals.append((name, "frequency", {"power": power, **floor}))
    batch: dict[str, dict[str, Any] | None] = {"in_batch": {}}
    plans = [PoolPlan("in-batch", [batch])]
    heads = sorted({size for share in (0.125, 0.25, 0.5) if 0 < (size := int(share * target)) < num_items})
    for name, key, options in proposals:
        drawn: dict[str, dict[str, Any] | None] = {key: {**options, "size": 1}}
        plans += [PoolPlan(name, [drawn]), PoolPlan(f"in-batch + {name}", [batch, drawn])]
        plans += [PoolPlan(f"head {size} + {name}", [{"head": {"size": size}}, drawn]) for size in heads]
    return plans


def suggest(subject: Subject, *, draws: int = 16, seed: int = 0) -> Suggestion:
    """Measure pools with as many distinct candidates as the present one, and suggest the one with the least spread.

    The present pool is measured with expected counts even if the model was trained with a different correction, so that
    the comparison is between pools and not between corrections. In-batch candidates come from real batches of the
    present size. The pool of in-batch candidates alone is skipped if that size gives a different number of distinct
    candidates.

    Args:
        subject: the model, its training data and the rows to measure, as returned by `subject_of`.
        draws: number of draws for each row in the first round; the finalists get four times as many.
        seed: seed of batches and draws.

    Raises:
        InputError: the objective does not estimate the softmax, or its pool has per-row candidates.
    """
    own = subject.config.objective
    objective = subject.run.objective(subject.config)
    if not estimates_softmax(objective):
        raise InputError(
            f"--suggest: objective {own.name} does not estimate the softmax; pools are compared only for objectives "
            "that do"
        )
    if any(member.per_row for member in objective.pool.members()):
        raise InputError("--suggest: the pool has per-row candidates; only pools with shared candidates are compared")
    named = named_objective(own.name)
    sources = named.sources if own.sources is None else own.sources
    present_plan = PoolPlan("present", sources, named.unique if own.unique is None else own.unique)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bench = _Bench(subject, seed)
        present = bench.measure(present_plan, draws)
        # The target is a size before masks, as for the other pools; how many candidates are masked differs by pool.
        target = expected_distinct(objective.pool, subject.rows_per_draw, bench.groups)
        first = {plan.name: (plan, bench.measure(plan, draws)) for plan in bench.sized(target)}
        ranked = sorted(first.values(), key=lambda one: -spread_gain(present, one[1])[0])
        final_present = bench.measure(present_plan, 4 * draws)
        final = [(plan, bench.measure(plan, 4 * draws)) for plan, _ in ranked[:_FINALISTS]]
    rows = [_pool(present_plan, final_present, final_present, final=True)]
    rows += sorted((_pool(plan, found, final_present, final=True) for plan, found in final), key=lambda p: -p.gain)
    rows += [_pool(plan, found, present, final=False) for plan, found in ranked[_FINALISTS:]]
    better = [one for one in rows[1:] if one.final and _beats(one, rows[0])]
    best = max(better, key=lambda one: one.gain) if better else None
    return Suggestion(rows, best, len(subject.rows), draws, seed)


def _beats(one: PoolMeasure, present: PoolMeasure) -> bool:
    unbiased = one.bias <= max(_SMALL, present.bias)
    return unbiased and one.spread <= present.spread and one.gain - 1.0 > 2.0 * one.gain_error


class _Bench:
    """A test bench that measures pools on one subject."""

    def __init__(self, subject: Subject, seed: int) -> None:
        self.subject, self.seed, self.round = subject, seed, 0
        stream = subject.batches(seed)
        #: Whether parts of sequences or questions have their own draws, which rules out in-batch candidates
        #: (`refuse_in_batch`).
        self.draws_by_blocks = subject.config.objective.rows_per_draw is not None and (
            subject.config.reads_sequences or subject.rows.questions is not None
        )
        self.groups = list(dict.fromkeys(next(stream).group for _ in range(20)))

    def sized(self, target: float) -> list[PoolPlan]:
        """Return every plan that can be resized to `target` distinct candidates, resized."""
        found = []
        for plan in candidate_plans(target, self.subject.counts):
            if self.draws_by_blocks and any(name == "in_batch" for source in plan.sources for name in source):
                continue
            sized = at_equal_distinct(
                plan,
                target,
                self.subject.train,
                batch_size=self.subject.rows_per_draw,
                base=self.subject.config.objective,
                groups=self.groups,
            )
            # A pool of in-batch candidates alone grows only with the batch size, which is fixed here.
            if sized and math.isclose(sized[1], self.subject.rows_per_draw, rel_tol=0.05):
                found.append(sized[0])
        return found

    def measure(self, plan: PoolPlan, draws: int) -> Measurement:
        subject = self.subject
        config = subject.with_objective(plan.settings(subject.config.objective))
        objective = subject.objective(config)
        self.round += 1
        stream = subject.batches(self.seed + self.round)
        if depends_on_batch(objective.pool):
            subject.warm_up(objective.pool, stream)
        known = subject.known_positives(config)
        rows, ranks = subject.rows_of(config), subject.ranks
        return measure(objective, rows, stream, draws=draws, known_positives=known, ranks=ranks)


def _pool(plan: PoolPlan, found: Measurement, present: Measurement, *, final: bool) -> PoolMeasure:
    spread, error = found.mean_spread()
    gain, gain_error = spread_gain(present, found)
    worse = float((found.spread > present.spread).double().mean())
    return PoolMeasure(
        plan.name,
        plan.sources,
        plan.unique,
        spread,
        error,
        found.mean("distinct"),
        found.corrected_bias()[0],
        gain,
        gain_error,
        worse,
        final,
    )
