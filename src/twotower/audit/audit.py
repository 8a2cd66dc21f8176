"""The audit of a trained model: bias and spread of its objective's gradient, measured on the training data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from twotower.audit.appearances import Appearance, appearances
from twotower.audit.gradients import AuditedRows, Measurement, estimates_softmax, measure
from twotower.audit.masks import MaskAudit, audit_masks
from twotower.audit.subject import Subject
from twotower.config.run import ObjectiveConfig
from twotower.errors import counted
from twotower.evaluation.significance import finite
from twotower.negatives import HardNegatives
from twotower.objectives import Objective
from twotower.objectives.build import named_objective
from twotower.system.filesystem import whole_file
from twotower.system.terminal import cell

#: A relative bias up to _NONE, or within twice its error, is reported as none, and a bias up to _SMALL as small.
_NONE, _SMALL = 0.005, 0.03
#: If three times the error of the partition sum exceeds this, the cause of a bias is reported as unknown.
_UNSURE = 0.2
#: Number of batches whose masks are compared with the interactions.
_MASKED = 5


@dataclass(frozen=True)
class ObjectiveAudit:
    """The measurement of one objective.

    Attributes:
        name: name of the objective.
        own: whether the model was trained with this objective.
        note: why nothing was measured, or a caveat.
        overall: bias, error, spread, ...; for refined logQ also `weight`, the mean of 1 - P_hat(y). None if the
            objective does not estimate the softmax.
        deciles: the same values for each popularity decile of the positive, most popular first; None for a decile
            without rows.
    """

    name: str
    own: bool
    note: str | None
    overall: dict[str, float] | None
    deciles: list[dict[str, float] | None]

    @property
    def verdict(self) -> str:
        """Return `no bias found`, `small bias`, `biased` or `another target`."""
        if self.overall is None:
            return "another target"
        bias = self.overall["bias"]
        if bias <= max(_NONE, 2.0 * self.overall["bias_error"]):
            return "no bias found"
        return "small bias" if bias <= _SMALL else "biased"


@dataclass(frozen=True)
class Audit:
    """The result of an audit. Print it, or use `to_dict()`.

    Attributes:
        objectives: the objectives, the model's own first.
        appearances: for each random source, whether it draws items in real batches as often as it claims.
        masks: whether the masks in real batches are right.
        rows, draws, num_items, seed: size and seed of the measurement.
        probability: mean P(y|x) of the audited rows.
        questions: number of audited questions that the rows belong to; None if each row has its own query.
        per_query: one row per measured objective and audited row: `objective`, `query` and `item` (ids), `decile` of
            the item's popularity, `probability` P(y|x) over the whole catalog without masked items, `bias`, `noise`,
            `spread`, `distinct`, `effective` and `draws` as in `Measurement`, and `refined_weight`, the mean of the
            weight 1 - P_hat(y) that refined logQ gives to the row; null for other objectives.
    """

    objectives: list[ObjectiveAudit]
    appearances: list[Appearance]
    masks: MaskAudit
    rows: int
    draws: int
    num_items: int
    seed: int
    probability: float
    questions: int | None = None
    per_query: pl.DataFrame = field(default_factory=pl.DataFrame, repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without `per_query`; values that could not be measured are None."""
        values = {name: value for name, value in vars(self).items() if name != "per_query"}
        values["objectives"] = [{**asdict(one), "verdict": one.verdict} for one in self.objectives]
        values["appearances"] = [one.to_dict() for one in self.appearances]
        values["masks"] = self.masks.to_dict()
        values["conclusion"] = self.conclusion()
        plain: dict[str, Any] = finite(values)
        return plain

    def write_per_query(self, path: str | Path) -> Path:
        """Write `per_query` as Parquet, atomically; a missing folder is created."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(target) as temporary:
            self.per_query.write_parquet(temporary)
        return target

    def conclusion(self) -> list[str]:
        """Return the conclusions as sentences."""
        own = self.objectives[0]
        said = [f"{own.name}: {_sentence(own)}"]
        if own.verdict in ("small bias", "biased"):
            best = [one.name for one in self.objectives[1:] if one.verdict == "no bias found"]
            if best:
                said.append(f"no bias found on this model: {', '.join(best)}")
            elif own.name != "expected-count":
                said.append("expected-count estimates the full softmax; measure it with --objectives expected-count")
        wrong = [one for one in self.appearances if not one.as_claimed]
        said += [f"{one.source}: {one.verdict}" for one in wrong]
        if any(one.differs_by_batch for one in wrong):
            said.append(
                "batches that are not random draws need their own frequencies: counted within the groups they are "
                "built from (objective.frequency: grouped), or in the batches as they arrive (streaming)"
            )
        elif wrong:
            said.append(
                "a source that does not draw as claimed makes every correction wrong: kappa is not its expected count"
            )
        elif self.appearances:
            said.append("every source draws its items as often as it claims")
        if not self.masks.is_right:
            said.append(self.masks.verdict)
        for one in self.objectives:
            if one.overall is not None and "weight" in one.overall:
                said.append(
                    f"{one.name}: rows are weighted by 1 - P(y), {one.overall['weight']:.3f} on average: the model's "
                    "own probability of being wrong; --per-query writes the weight of every row"
                )
        if own.overall is not None and own.overall["effective"] < 0.1 * own.overall["distinct"]:
            said.append(
                f"a few candidates dominate the gradient: {own.overall['effective']:.0f} effective of "
                f"{own.overall['distinct']:.0f}; `twotower audit DIR --suggest` searches for a better pool"
            )
        return said

    def __rich__(self) -> Group:
        """Build tables for a rich console."""
        rows = counted(self.rows, "row")
        if self.questions is not None:
            rows = f"{counted(self.questions, 'question')} with {counted(self.rows, 'target')}"
        head = (
            f"{rows} of the training data, {counted(self.draws, 'draw')} each, "
            f"catalog of {counted(self.num_items, 'item')}, "
            f"mean P(y|x) {self.probability:.3f}"
        )
        table = Table(title="Gradient against full softmax", title_justify="left")
        table.add_column("objective", overflow="fold")  # names are folded, never cut
        for title in ("bias", "spread", "distinct", "effective", "verdict"):
            table.add_column(title, justify="right")
        for one in self.objectives:
            name = f"{one.name} (its own)" if one.own else one.name
            if one.overall is None:
                table.add_row(cell(name), "-", "-", "-", "-", one.verdict)
                continue
            table.add_row(cell(name), *_cells(one.overall), one.verdict)
        parts: list[Any] = [head, table, *(self._deciles(one) for one in self.objectives if one.overall is not None)]
        parts += [cell(f"{one.name}: {one.note}") for one in self.objectives if one.note]
        if self.appearances:
            parts.append(self._appearances())
        parts.append(f"masked: {self.masks.share:.2%} of the candidates of real batches, {self.masks.verdict}")
        return Group(*parts, "", *(cell(f"* {line}") for line in self.conclusion()))

    @staticmethod
    def _deciles(one: ObjectiveAudit) -> Table:
        table = Table(title=cell(f"{one.name}, by popularity decile of the positive"), title_justify="left")
        refined = one.overall is not None and "weight" in one.overall
        titles = ("decile", "rows", "bias", "spread", "distinct", "effective", *(("1 - P(y)",) if refined else ()))
        for title in titles:
            table.add_column(title, justify="right")
        for number, values in enumerate(one.deciles):
            label = f"{number + 1}" + {0: " (head)", 9: " (tail)"}.get(number, "")
            cells = ["-"] * (len(titles) - 1)
            if values is not None:
                weight = [f"{values['weight']:.3f}"] if refined else []
                cells = [f"{values['rows']:.0f}", *_cells(values), *weight]
            table.add_row(label, *cells)
        return table

    def _appearances(self) -> Table:
        table = Table(title="Draws in real batches compared with the claims", title_justify="left")
        table.add_column("source")
        for title in ("batches", "drawn / claimed", "p (total)", "p (items)", "batch to batch", "p (batches)"):
            table.add_column(title, justify="right")
        table.add_column("verdict")
        for one in self.appearances:
            table.add_row(
                one.source,
                str(one.batches),
                f"{one.ratio:.4f}",
                f"{one.p_total:.2g}",
                f"{one.p_counts:.2g}",
                "-" if one.dispersion is None else f"{one.dispersion:.2f}",
                "-" if one.p_batches is None else f"{one.p_batches:.2g}",
                one.verdict,
            )
        return table


def audit(
    subject: Subject, *, objectives: Sequence[str] = (), draws: int = 50, batches: int = 200, seed: int = 0
) -> Audit:
    """Measure the model's own objective, and other objectives by name.

    Args:
        subject: the model, its training data and the rows to audit, as returned by `subject_of`.
        objectives: names of other objectives, each with its own sources and otherwise the settings of the model.
        draws: number of draws for each row.
        batches: number of real batches against which the claims of the sources are tested; more batches reveal smaller
            errors (`Appearance.missed`).
        seed: seed of batches and draws.

    Raises:
        InputError: an objective is unknown, or needs data that is missing.
    """
    own = subject.config.objective
    audited = [own] + [_named(own, name) for name in dict.fromkeys(objectives) if name != own.name]
    built = [subject.objective(subject.with_objective(settings)) for settings in audited]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        frames: list[pl.DataFrame] = []
        measured = [
            _measured(subject, settings, objective, draws=draws, seed=seed, frames=frames)
            for settings, objective in zip(audited, built, strict=True)
        ]
        stream = subject.batches(seed)
        objective = subject.objective(subject.config)
        subject.warm_up(objective.pool, stream)
        measured_appearances = appearances(
            objective.pool,
            stream,
            batches,
            item_counts=subject.counts,
            train=subject.train,
            rows_per_draw=own.rows_per_draw,
        )
        masks = audit_masks(
            objective,
            stream,
            _MASKED,
            train=subject.train,
            known_positives=subject.known_positives(subject.config),
        )
    rows = torch.arange(len(subject.rows))
    probability = torch.softmax(subject.rows.logits, 1)[rows, subject.rows.positives]
    return Audit(
        measured,
        measured_appearances,
        masks,
        rows=len(subject.rows),
        draws=draws,
        num_items=subject.train.num_items,
        seed=seed,
        probability=float(probability.mean()),
        questions=None if subject.rows.questions is None else len(subject.rows.units()),
        per_query=pl.concat(frames) if frames else pl.DataFrame(),
    )


def _measured(
    subject: Subject,
    settings: ObjectiveConfig,
    objective: Objective,
    *,
    draws: int,
    seed: int,
    frames: list[pl.DataFrame],
) -> ObjectiveAudit:
    """Measure one objective, and append its rows to `frames`."""
    own = settings is subject.config.objective
    if not estimates_softmax(objective):
        reason = "binary or pairwise: it does not estimate the softmax, so a bias is not defined"
        return ObjectiveAudit(settings.name, own, reason, None, [None] * 10)
    config, stream = subject.with_objective(settings), subject.batches(seed)
    subject.warm_up(objective.pool, stream)
    known = subject.known_positives(config)
    rows, ranks = subject.rows_of(config), subject.ranks
    found = measure(objective, rows, stream, draws=draws, known_positives=known, ranks=ranks)
    deciles = []
    for number in range(10):
        chosen = subject.deciles == number
        deciles.append(summary(found, chosen) if bool(chosen.any()) else None)
    frames.append(_frame(settings.name, subject, subject.rows_of(config), found))
    overall = summary(found.together or found)
    if found.weight is not None:
        overall["weight"] = found.mean("weight")
    return ObjectiveAudit(settings.name, own, _note(subject, objective), overall, deciles)


def _frame(name: str, subject: Subject, rows: AuditedRows, found: Measurement) -> pl.DataFrame:
    """Build the rows of `Audit.per_query` for one objective."""
    probability = 1.0 + rows.exact_gradient()[torch.arange(len(rows)), rows.positives]
    values = {
        "probability": probability,
        **{name: getattr(found, name) for name in ("bias", "noise", "spread", "distinct", "effective", "draws")},
    }
    queries = torch.zeros_like(rows.positives) if rows.queries is None else rows.queries
    return pl.DataFrame(
        {
            "objective": [name] * len(rows),
            "query": subject.train.queries.decode(queries.numpy()),
            "item": subject.train.items.decode(rows.positives.numpy()),
            "decile": (subject.deciles + 1).numpy(),
            **{column: value.numpy() for column, value in values.items()},
            "refined_weight": pl.Series(
                [None] * len(rows) if found.weight is None else found.weight.tolist(), dtype=pl.Float64
            ),
        }
    ).with_columns(pl.selectors.float().fill_nan(None))


def _note(subject: Subject, objective: Objective) -> str | None:
    """Return a note about the state that could not be restored from training, or None."""
    if subject.run.state:
        return None
    if any(isinstance(member, HardNegatives) for member in objective.pool.members()):
        return "measured without mined negatives: they are in checkpoints/best.ckpt, which was not found"
    if not all(frequency.is_exact for frequency in objective.pool.frequencies()):
        return "frequencies estimated from scratch: their state is in checkpoints/best.ckpt, which was not found"
    return None


def summary(found: Measurement, rows: Tensor | None = None) -> dict[str, float]:
    """Summarize bias (without its noise floor), spread and their errors over some rows."""
    bias, bias_error = found.corrected_bias(rows)
    spread, spread_error = found.mean_spread(rows)
    partition, partition_error = found.mean_partition() if rows is None else (math.nan, math.nan)
    weight = {} if found.weight is None else {"weight": found.mean("weight", rows)}
    return {
        "rows": float(len(found.bias) if rows is None else int(rows.sum())),
        "bias": bias,
        "bias_error": bias_error,
        "bias_with_noise": found.mean("bias", rows),
        "noise": found.mean("noise", rows),
        "spread": spread,
        "spread_error": spread_error,
        "distinct": found.mean("distinct", rows),
        "effective": found.mean("effective", rows),
        **({} if math.isnan(partition) else {"partition": partition, "partition_error": partition_error}),
        **weight,
    }


def _named(own: ObjectiveConfig, name: str) -> ObjectiveConfig:
    named_objective(name)
    changes = {"name": name, "sources": None, "unique": None, "mask_known_positives": own.mask_known_positives}
    return own.model_copy(update=changes)


def _cells(values: dict[str, float]) -> list[str]:
    return [
        f"{values['bias']:.3f} ± {values['bias_error']:.3f}",
        f"{values['spread']:.3f} ± {values['spread_error']:.3f}",
        f"{values['distinct']:.0f}",
        f"{values['effective']:.0f}",
    ]


def _sentence(own: ObjectiveAudit) -> str:
    if own.overall is None:
        return "its target is not the softmax, so its gradient is not compared"
    bias, error, spread = (own.overall[name] for name in ("bias", "bias_error", "spread"))
    if own.verdict == "no bias found":
        return f"no bias against full softmax was found ({bias:.3f} ± {error:.3f}); one draw is off by {spread:.2f}"
    return (
        f"its gradient has a bias of {bias:.0%} ± {error:.0%} of the full softmax gradient, which does not average out "
        f"over steps; the spread of one draw is {spread:.2f}, which does{_cause(own.overall)}"
    )


def _cause(overall: dict[str, float]) -> str:
    """Return the cause of a bias: even with a correct partition sum, n candidates give a bias of the order of 1/n."""
    if "partition" not in overall:
        return ""
    ratio, error = overall["partition"], overall["partition_error"]
    found = f"the estimated partition sum is {ratio:.3f} ± {error:.3f} of the exact one"
    if abs(ratio - 1.0) > max(3.0 * error, _NONE):
        return f"; {found}: its counts or its masks are wrong"
    if 3.0 * error > _UNSURE:
        return f"; {found}: more --draws would show whether wrong counts or too few candidates are the cause"
    return f"; {found}: the bias comes from few candidates ({overall['effective']:.0f} effective) and falls as 1/n"
