"""The reference study: every objective against the full softmax, and every pool at equal distinct candidates."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch
from rich.console import Group
from rich.table import Table

from reference_study.catalogs import head_mass, learnt_rows, random_batches, zipf_interactions
from reference_study.forms import FORMS, Form, build_form
from twotower.audit.gradients import AuditedRows, Measurement, estimates_softmax, measure, spread_gain
from twotower.audit.pools import PoolPlan, at_equal_distinct
from twotower.data import Interactions
from twotower.objectives import SampledSoftmax
from twotower.objectives.build import OBJECTIVES, build_pool

#: The first table: N = 3,000, 255 candidates, five positives from head to tail.
NUM_ITEMS, RANKS, SLOPE, NOISE = 3000, [1, 30, 300, 1500, 2900], 0.6, 1.4
#: The second: N = 20,000, 512 draws, (slope, noise) of each catalog. The third: equal numbers of *distinct* candidates.
LARGE, CATALOGS, LARGE_RANKS = 20_000, [(0.7, 1.2), (0.3, 1.5), (1.0, 1.0), (1.0, 2.0)], [10, 100, 1000, 10_000]
EQUAL_DISTINCT = (313, 509)
#: A form counts as unbiased below these relative biases; uniform candidates have the largest Monte-Carlo error.
BOUND, UNIFORM_BOUND = 0.02, 0.03


def plain_pools() -> list[PoolPlan]:
    """Return the pools of the reference study: 512 draws, or a head of 256 and 256 draws."""
    head: dict[str, dict[str, Any] | None] = {"head": {"size": 256}}
    return [
        PoolPlan("in-batch", [{"in_batch": {}}], unique=False),
        PoolPlan("in-batch unique", [{"in_batch": {}}]),
        PoolPlan("uniform", [{"uniform": {"size": 512}}]),
        PoolPlan("frequency^0.75", [{"frequency": {"power": 0.75, "size": 512}}]),
        PoolPlan("head + uniform", [head, {"uniform": {"size": 256}}]),
        PoolPlan("head + frequency", [head, {"frequency": {"power": 1.0, "size": 256}}]),
        PoolPlan("head + sqrt-frequency", [head, {"frequency": {"power": 0.5, "size": 256}}]),
    ]


@dataclass(frozen=True)
class FormResult:
    """One row of the first table.

    Attributes:
        name: name of the form.
        claims_unbiased: whether its bias is claimed to be zero.
        bias: ||mean g_hat - g|| / ||g|| for each positive, from head to tail; includes about `noise`.
        noise: Monte-Carlo error of `bias`, mean over the positives.
        corrected: the bias without its noise floor.
        spread: standard deviation of one draw.
        distinct: mean number of distinct negatives.
        bound: upper bound of `bias` for a form that claims to be unbiased.
    """

    name: str
    claims_unbiased: bool
    bias: list[float]
    noise: float
    corrected: float
    spread: float
    distinct: float
    bound: float

    @property
    def within(self) -> bool:
        """Whether the largest bias is below the bound."""
        return max(self.bias) <= self.bound


@dataclass(frozen=True)
class PoolResult:
    """One cell of the second and third tables.

    Attributes:
        name: name of the pool.
        catalog: (slope, noise) of the catalog.
        head_mass: softmax mass of the 256 most frequent items.
        equal: the number of distinct candidates to which all pools were sized; None at equal draws.
        draws: draws of the pool's last source, or the number of other rows in the batch.
        spread: mean over rows of the standard deviation of one draw.
        gain: spread of in-batch candidates over this pool's, geometric mean over rows.
        gain_error: standard error of `gain`, from the scatter over rows.
        distinct: mean number of distinct negatives.
    """

    name: str
    catalog: tuple[float, float]
    head_mass: float
    equal: int | None
    draws: int
    spread: float
    gain: float
    gain_error: float
    distinct: float

    @property
    def verdict(self) -> str:
        """`better` or `worse` than in-batch if the difference exceeds twice its error, otherwise `alike`."""
        difference = self.gain - 1.0
        if abs(difference) <= 2.0 * self.gain_error or self.name == "in-batch":
            return "alike"
        return "better" if difference > 0 else "worse"


@dataclass(frozen=True)
class Study:
    """The result of the study: three tables. Print it, or use `to_dict()`."""

    forms: list[FormResult]
    pools: list[PoolResult]
    other_targets: list[str]
    draws: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, with versions and date."""
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "seed": self.seed,
            "draws": self.draws,
            "catalog": {"items": NUM_ITEMS, "slope": SLOPE, "noise": NOISE, "ranks": RANKS, "probability": 0.5},
            "forms": [{**asdict(row), "within": row.within} for row in self.forms],
            "other_targets": self.other_targets,
            "pools": [{**asdict(row), "verdict": row.verdict} for row in self.pools],
        }

    def __rich__(self) -> Group:
        """Build tables for a rich console."""
        first = Table(
            title=f"Gradient against full softmax: {NUM_ITEMS:,} items, 255 candidates, P(y|x) = 0.5, "
            f"{self.draws:,} draws",
            title_justify="left",
        )
        for title in ("form", "claims", "bias, head to tail", "± MC", "without noise", "spread", "distinct", "found"):
            first.add_column(title, justify="left" if title in ("form", "claims", "found") else "right")
        for row in self.forms:
            found = f"bias <= {row.bound:g}" if row.within else f"bias above {row.bound:g}"
            first.add_row(
                row.name,
                "unbiased" if row.claims_unbiased else "-",
                f"{min(row.bias):.3f} - {max(row.bias):.3f}",
                f"{row.noise:.3f}",
                f"{row.corrected:.3f}",
                f"{row.spread:.2f}",
                f"{row.distinct:.0f}",
                found,
            )
        tables = [self._pool_table(equal) for equal in (None, *EQUAL_DISTINCT)]
        others = "Not compared, because their target is not the softmax: " + ", ".join(self.other_targets)
        return Group(first, others, *tables, "gain = spread of in-batch / spread of the pool, geometric mean over rows")

    def _pool_table(self, equal: int | None) -> Table:
        what = "512 draws" if equal is None else f"{equal} distinct candidates each"
        rows = [row for row in self.pools if row.equal == equal]
        table = Table(title=f"Spread of one draw: {LARGE:,} items, {what}", title_justify="left", show_lines=True)
        table.add_column("pool")
        for slope, noise in CATALOGS:
            mass = next(row.head_mass for row in rows if row.catalog == (slope, noise))
            table.add_column(f"{slope:g} log p + {noise:g} z\nhead holds {mass:.2f}", justify="right")
        for name in dict.fromkeys(row.name for row in rows):
            cells = [next(row for row in rows if (row.name, row.catalog) == (name, catalog)) for catalog in CATALOGS]
            table.add_row(
                name,
                *(
                    f"{cell.spread:.3f} (M {cell.distinct:.0f})"
                    + ("" if name == "in-batch" else f"\n{cell.gain:.2f} ± {cell.gain_error:.2f} {cell.verdict}")
                    for cell in cells
                ),
            )
        return table


def study(*, draws: int = 1500, seed: int = 0) -> Study:
    """Measure all forms and pools.

    Args:
        draws: redraws of each form that claims to be unbiased; biased forms get a fifth, pools a fiftieth.
        seed: seed of the catalogs and of all draws.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        forms = _forms(draws, generator)
        pools = _pools(max(draws // 50, 4), generator)
    others = [name for name in OBJECTIVES if name not in {form.objective for form in FORMS}]
    return Study(forms, pools, others, draws, seed)


def _forms(draws: int, generator: torch.Generator) -> list[FormResult]:
    train = zipf_interactions(NUM_ITEMS, rarest=10)
    counts = torch.from_numpy(train.item_counts())
    rows = learnt_rows(counts, RANKS, slope=SLOPE, noise=NOISE, probability=0.5, generator=generator, shared=True)
    return [_form(form, train=train, rows=rows, draws=draws, generator=generator) for form in FORMS]


def _form(form: Form, *, train: Interactions, rows: AuditedRows, draws: int, generator: torch.Generator) -> FormResult:
    counts = torch.from_numpy(train.item_counts())
    objective = build_form(form, train)
    if not estimates_softmax(objective):
        raise RuntimeError(f"{form.name} is in the study, but does not estimate the softmax")
    redraws = max(draws if form.claims_unbiased else draws // 5, 2)
    batches = random_batches(counts, form.batch_size, generator)
    found = measure(objective, rows, batches, draws=2 if form.exact else redraws, generator=generator)
    return FormResult(
        form.name,
        form.claims_unbiased,
        found.bias.tolist(),
        found.mean("noise"),
        found.corrected_bias()[0],
        found.mean_spread()[0],
        found.mean("distinct"),
        UNIFORM_BOUND if form.objective == "sampled-softmax-uniform" else BOUND,
    )


def _pools(draws: int, generator: torch.Generator) -> list[PoolResult]:
    train = zipf_interactions(LARGE, rarest=4)
    counts = torch.from_numpy(train.item_counts())
    results = []
    for slope, noise in CATALOGS:
        ranks = [rank + place for rank in LARGE_RANKS for place in range(3)]
        rows = learnt_rows(counts, ranks, slope=slope, noise=noise, probability=0.5, generator=generator)
        mass = head_mass(rows, counts, 256)
        for equal in (None, *EQUAL_DISTINCT):
            present: Measurement | None = None
            for plan in plain_pools():
                sized = (plan, 513) if equal is None else at_equal_distinct(plan, equal, train, batch_size=2)
                if sized is None:
                    raise RuntimeError(f"{plan.name} cannot have {equal} distinct candidates")
                found = _measure_pool(*sized, train=train, rows=rows, draws=draws, generator=generator)
                present = present or found
                gain, error = spread_gain(present, found)
                results.append(
                    PoolResult(
                        plan.name,
                        (slope, noise),
                        mass,
                        equal,
                        _draws_of(*sized),
                        float(found.spread.mean()),
                        gain,
                        error,
                        found.mean("distinct"),
                    )
                )
    return results


def _measure_pool(
    plan: PoolPlan,
    batch_size: int,
    *,
    train: Interactions,
    rows: AuditedRows,
    draws: int,
    generator: torch.Generator,
) -> Measurement:
    objective = SampledSoftmax(build_pool(plan.settings(), train))
    counts = torch.from_numpy(train.item_counts())
    return measure(objective, rows, random_batches(counts, batch_size, generator), draws=draws, generator=generator)


def _draws_of(plan: PoolPlan, batch_size: int) -> int:
    if plan.grows_with_batch:
        return batch_size - 1
    ((_, options),) = plan.sources[-1].items()
    return int((options or {})["size"])
