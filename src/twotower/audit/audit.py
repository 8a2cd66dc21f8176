"""The audit of a trained model: bias and spread of its objective's gradient on the user's own data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from torch import Tensor

from twotower.audit.appearances import Appearance, appearances
from twotower.audit.gradients import Measurement, estimates_softmax, measure
from twotower.audit.subject import Subject, masked_share, warm_up
from twotower.config.run import Config, ObjectiveConfig
from twotower.negatives import HardNegatives
from twotower.objectives import Objective
from twotower.objectives.build import build_objective, named_objective
from twotower.system.terminal import cell

#: A relative bias up to _NONE, or within twice its error, is reported as none; up to _SMALL, as small.
_NONE, _SMALL = 0.005, 0.03


@dataclass(frozen=True)
class ObjectiveAudit:
    """The measurement of one objective.

    Attributes:
        name: name of the objective.
        own: whether the model was trained with it.
        note: why nothing was measured, or a caveat.
        overall: bias, error, spread, ...; None if the objective does not estimate the softmax.
        deciles: the same by popularity decile of the positive, most popular first; None for a decile without rows.
    """

    name: str
    own: bool
    note: str | None
    overall: dict[str, float] | None
    deciles: list[dict[str, float] | None]

    @property
    def verdict(self) -> str:
        """`no bias found`, `small bias`, `biased` or `another target`."""
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
        appearances: claims of its random sources against real batches.
        masked: share of its candidates that are masked, over all rows of real batches.
        rows, draws, num_items, seed: size and seed of the measurement.
        probability: mean P(y|x) of the audited rows.
    """

    objectives: list[ObjectiveAudit]
    appearances: list[Appearance]
    masked: float
    rows: int
    draws: int
    num_items: int
    seed: int
    probability: float

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None for what could not be measured."""
        values = asdict(self)
        values["objectives"] = [{**asdict(one), "verdict": one.verdict} for one in self.objectives]
        values["appearances"] = [one.to_dict() for one in self.appearances]
        values["conclusion"] = self.conclusion()
        plain: dict[str, Any] = _plain(values)
        return plain

    def conclusion(self) -> list[str]:
        """Return the conclusions as sentences."""
        own = self.objectives[0]
        said = [f"{own.name}: {_sentence(own)}"]
        if own.verdict in ("small bias", "biased"):
            best = [one.name for one in self.objectives[1:] if one.verdict == "no bias found"]
            said.append(
                f"unbiased on this model: {', '.join(best)}"
                if best
                else "expected-count estimates the full softmax; measure it with --objectives expected-count"
            )
        wrong = [one for one in self.appearances if not one.as_claimed]
        said += [f"{one.source}: {one.verdict}" for one in wrong]
        if wrong:
            said.append(
                "if a source is not as claimed, every correction is wrong: estimate frequencies from the batches "
                "(objective.frequency: streaming), or within the groups they are built from (grouped)"
            )
        elif self.appearances:
            said.append("every source draws its items as often as it claims")
        if own.overall is not None and own.overall["effective"] < 0.1 * own.overall["distinct"]:
            said.append(
                f"a few candidates dominate the gradient: {own.overall['effective']:.0f} effective of "
                f"{own.overall['distinct']:.0f}; `twotower audit DIR --suggest` searches for a better pool"
            )
        return said

    def __rich__(self) -> Group:
        """Build tables for a rich console."""
        head = (
            f"{self.rows} rows of the training data, {self.draws} draws each, catalog of {self.num_items:,} items, "
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
        parts.append(f"masked: {self.masked:.2%} of the candidates, over all rows of real batches")
        return Group(*parts, "", *(cell(f"* {line}") for line in self.conclusion()))

    @staticmethod
    def _deciles(one: ObjectiveAudit) -> Table:
        table = Table(title=cell(f"{one.name}, by popularity decile of the positive"), title_justify="left")
        for title in ("decile", "rows", "bias", "spread", "distinct", "effective"):
            table.add_column(title, justify="right")
        for number, values in enumerate(one.deciles):
            label = f"{number + 1}" + {0: " (head)", 9: " (tail)"}.get(number, "")
            table.add_row(label, *(["-"] * 5 if values is None else [f"{values['rows']:.0f}", *_cells(values)]))
        return table

    def _appearances(self) -> Table:
        table = Table(title="Appearances in real batches against the claims", title_justify="left")
        table.add_column("source")
        for title in ("batches", "p (counts)", "batch to batch", "p (batches)"):
            table.add_column(title, justify="right")
        table.add_column("verdict")
        for one in self.appearances:
            table.add_row(
                one.source,
                str(one.batches),
                f"{one.p_counts:.2g}",
                "-" if one.dispersion is None else f"{one.dispersion:.2f}",
                "-" if one.p_batches is None else f"{one.p_batches:.2g}",
                one.verdict,
            )
        return table


def audit(
    subject: Subject, *, objectives: Sequence[str] = (), draws: int = 50, batches: int = 200, seed: int = 0
) -> Audit:
    """Measure the model's own objective, and others by name.

    Args:
        subject: from `subject_of`.
        objectives: names of other objectives, each with its own sources and otherwise the settings of the model.
        draws: redraws for each row.
        batches: number of real batches against which the claims of the sources are tested.
        seed: seed of batches and draws.

    Raises:
        InputError: an objective is unknown, or needs data that is missing.
    """
    own = subject.config.objective
    audited = [own] + [_named(own, name) for name in dict.fromkeys(objectives) if name != own.name]
    built = [build_objective(_with(subject.config, settings), subject.train) for settings in audited]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        measured = [
            _measured(subject, settings, objective, draws, seed)
            for settings, objective in zip(audited, built, strict=True)
        ]
        stream = subject.batches(seed)
        pool = build_objective(subject.config, subject.train).pool
        warm_up(pool, stream, len(subject.train) // subject.batch_size)
        measured_appearances = appearances(pool, stream, batches, item_counts=subject.counts)
        masked = masked_share(pool, stream, subject)
    rows = torch.arange(len(subject.rows))
    probability = torch.softmax(subject.rows.logits, 1)[rows, subject.rows.positives]
    return Audit(
        measured,
        measured_appearances,
        masked,
        rows=len(subject.rows),
        draws=draws,
        num_items=subject.train.num_items,
        seed=seed,
        probability=float(probability.mean()),
    )


def _measured(
    subject: Subject, settings: ObjectiveConfig, objective: Objective, draws: int, seed: int
) -> ObjectiveAudit:
    own = settings is subject.config.objective
    if not estimates_softmax(objective):
        reason = "binary or pairwise: it does not estimate the softmax, so a bias is not defined"
        return ObjectiveAudit(settings.name, own, reason, None, [None] * 10)
    stream = subject.batches(seed)
    warm_up(objective.pool, stream, len(subject.train) // subject.batch_size)
    found = measure(objective, subject.rows, stream, draws=draws)
    deciles = []
    for number in range(10):
        chosen = subject.deciles == number
        deciles.append(summary(found, chosen) if bool(chosen.any()) else None)
    mined = any(isinstance(member, HardNegatives) for member in objective.pool.members())
    note = "measured without mined negatives, which are not saved with the model" if mined else None
    return ObjectiveAudit(settings.name, own, note, summary(found), deciles)


def summary(found: Measurement, rows: Tensor | None = None) -> dict[str, float]:
    """Summarize bias (without its noise floor), spread and their errors over some rows."""
    bias, bias_error = found.corrected_bias(rows)
    spread, spread_error = found.mean_spread(rows)
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
    }


def _named(own: ObjectiveConfig, name: str) -> ObjectiveConfig:
    named_objective(name)
    changes = {"name": name, "sources": None, "unique": None, "mask_known_positives": own.mask_known_positives}
    return own.model_copy(update=changes)


def _with(config: Config, objective: ObjectiveConfig) -> Config:
    return config.model_copy(update={"objective": objective})


def _cells(values: dict[str, float]) -> list[str]:
    return [
        f"{values['bias']:.3f} ± {values['bias_error']:.3f}",
        f"{values['spread']:.3f} ± {values['spread_error']:.3f}",
        f"{values['distinct']:.0f}",
        f"{values['effective']:.0f}",
    ]


def _sentence(own: ObjectiveAudit) -> str:
    if own.overall is None:
        return "its target is not the softmax; its gradient is not compared"
    bias, error, spread = (own.overall[name] for name in ("bias", "bias_error", "spread"))
    if own.verdict == "no bias found":
        return f"no bias against full softmax was found ({bias:.3f} ± {error:.3f}); one draw is off by {spread:.2f}"
    return (
        f"its gradient has a bias of {bias:.0%} ± {error:.0%} of the full softmax gradient, which does not average out "
        f"over steps; the spread of one draw is {spread:.2f}, which does"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
