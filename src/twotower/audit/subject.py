"""The subject of an audit: a trained model, rows of its training data, and its training batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from twotower.audit.gradients import AuditedRows, follow
from twotower.audit.masks import items_of
from twotower.config.run import Config, ObjectiveConfig
from twotower.data import Batch, Interactions, KnownPositives
from twotower.data.loading.passed_over import PassedOver
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.negatives import CrossBatchMemory, HardNegatives, Pool, StreamingFrequency, popularity_deciles
from twotower.objectives import Objective
from twotower.objectives.build import needs_known_positives
from twotower.ranking.distributed import item_embeddings
from twotower.serving import SavedModel
from twotower.towers import TwoTower
from twotower.training.embedding import embed_rows

#: Maximum number of logits R x N. An array of this size takes 64 MiB in float64, and four are in memory.
_LOGITS = 1 << 23
#: Maximum number of batches that estimated frequencies and memories see before anything is measured.
_WARM_UP = 500
#: Number of rows, from the first batches, among which the audited rows are chosen.
_POPULATION = 20_000
#: Maximum total number of targets, as a multiple of the requested number of questions.
_TARGETS = 4


class MakesObjective(Protocol):
    """A function that builds the objective for a configuration."""

    def __call__(self, config: Config) -> Objective: ...  # noqa: D102


@dataclass(frozen=True)
class TrainingRun:
    """The batches and the objective that a model was trained with, built by the functions that training uses.

    Attributes:
        batches: returns the training batches for a configuration; each iteration over them is an epoch.
        objective: builds the objective for a configuration, with the frequencies of its batches.
        state: state dict of the objective at the end of training; empty if it is unknown.
    """

    batches: Callable[[Config], Iterable[Batch]]
    objective: MakesObjective
    state: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """The subject of an audit: settings, training data and the rows to measure.

    Attributes:
        config: settings of the model, with every "auto" resolved.
        train: the training interactions.
        rows: rows whose gradient is measured, spread over the popularity deciles.
        deciles: popularity decile of each row's positive, int64 [R].
        run: the batches and the objective that the model was trained with.
        batch_size: mean number of rows B of a batch.
        ranks: the processes that share the draws of the audit; None for a single process.
    """

    config: Config
    train: Interactions
    rows: AuditedRows
    deciles: Tensor
    run: TrainingRun
    batch_size: int
    ranks: Communicator | None = None

    @property
    def counts(self) -> Tensor:
        """Return the training interactions of each item, [N]."""
        return torch.from_numpy(self.train.item_counts())

    @property
    def rows_per_draw(self) -> int:
        """Return the number of rows that share one draw of candidates."""
        return min(self.config.objective.rows_per_draw or self.batch_size, self.batch_size)

    def batches(self, seed: int = 0) -> Iterator[Batch]:
        """Yield training batches endlessly, epoch after epoch, in the order given by a seed."""
        epochs = self.run.batches(self.config.changed("training", seed=seed))
        while True:
            yield from epochs

    def with_objective(self, settings: ObjectiveConfig) -> Config:
        """Return the settings of the model with a different objective."""
        return self.config.model_copy(update={"objective": settings})

    def known_positives(self, config: Config) -> KnownPositives | None:
        """Return the known positives that training masks with these settings, or None if it masks none."""
        return KnownPositives(self.train) if needs_known_positives(config) else None

    def rows_of(self, config: Config) -> AuditedRows:
        """Return the audited rows with the target softmax of these settings: its excluded items and its feedback."""
        term = config.objective.feedback
        rows = replace(self.rows, feedback=0.0 if term is None or term.form != "softmax" else term.weight)
        if not needs_known_positives(config) or rows.queries is None:
            return rows
        return replace(rows, known=items_of(self.train, rows.queries))

    def objective(self, config: Config) -> Objective:
        """Build an objective, with its frequencies and mined items as of the end of training if they are known."""
        objective = self.run.objective(config)
        state = self.run.state
        estimates = {name[name.index("frequency") :]: value for name, value in state.items() if ".frequency." in name}
        for name, module in objective.named_modules(remove_duplicate=False):
            # The name of a frequency depends on the position of its source, which differs between objectives.
            if isinstance(module, StreamingFrequency) and estimates:
                prefix = f"{name[name.index('frequency') :]}."
                own = {key.removeprefix(prefix): value for key, value in estimates.items() if key.startswith(prefix)}
                if own and own["gap"].shape == module.gap.shape:
                    module.load_state_dict(own)
            if isinstance(module, HardNegatives):
                items, limits = state.get(f"{name}.items"), state.get(f"{name}.limits")
                if items is not None and items.shape == module.items.shape:
                    module.items.copy_(items)
                    if limits is not None and module.limits is not None and limits.shape == module.limits.shape:
                        module.limits.copy_(limits)
        return objective

    def warm_up(self, pool: Pool, stream: Iterator[Batch]) -> None:
        """Feed batches to the pool, to fill its memories and to estimate the frequencies whose state is unknown."""
        estimated = [one for one in pool.frequencies() if not one.is_exact]
        unknown = any(_is_empty(one) for frequency in estimated for one in frequency.modules())
        sizes = [member.size for member in pool.members() if isinstance(member, CrossBatchMemory)]
        steps = max((-(-size // self.batch_size) + 1 for size in sizes), default=0)
        if unknown:
            steps = max(steps, len(self.train) // self.batch_size, 1)
        for _ in range(min(steps, _WARM_UP)):
            batch = next(stream)
            follow(pool, batch, drawn=False)
            follow(pool, batch, drawn=True)


def _is_empty(module: torch.nn.Module) -> bool:
    return isinstance(module, StreamingFrequency) and not float(module.clock) > 0


def subject_of(
    artifact: SavedModel,
    train: Interactions,
    run: TrainingRun,
    *,
    rows: int = 64,
    seed: int = 0,
    ranks: Communicator | None = None,
) -> Subject:
    """Choose rows of training batches evenly over the popularity deciles, and compute their logits over the catalog.

    The queries are embedded as in training: as positions of their window, or from the history before the cut of their
    question. A recent prior is ignored, because it is added after training.

    Args:
        artifact: the trained model, with every "auto" in its settings resolved.
        train: the interactions that the model was trained on.
        run: the batches and the objective that the model was trained with.
        rows: number R of rows, or of questions with at most 4 R targets; reduced if the catalog is so large that the
            logits would not fit into memory.
        seed: seed of the choice.
        ranks: the processes that share the audit, each of which embeds a part of the items; None for one.

    Raises:
        InputError: `rows` is less than 2, or the data and the model have different numbers of items.
    """
    if rows < 2:
        raise InputError(f"rows: expected at least 2, found {rows}")
    if train.num_items != len(artifact.item_embeddings):
        raise InputError(f"the data has {train.num_items} items, the model {len(artifact.item_embeddings)}")
    decile = popularity_deciles(torch.from_numpy(train.item_counts()))
    blank = AuditedRows(torch.zeros(0, train.num_items), torch.zeros(0, dtype=torch.int64))
    subject = Subject(artifact.config, train, blank, decile[:0], run, 1)
    batches = _first_batches(subject.batches(seed))
    most = max(_LOGITS // train.num_items, 2)
    chosen = _choose(batches, decile, min(rows, most), min(_TARGETS * rows, most), np.random.default_rng(seed))
    audited = _embedded(artifact, batches, chosen, ranks or Communicator())
    size = max(sum(len(batch) for batch in batches) // len(batches), 1)
    return replace(subject, rows=audited, deciles=decile[audited.positives], batch_size=size, ranks=ranks)


def _first_batches(stream: Iterator[Batch]) -> list[Batch]:
    """Take the first batches of an epoch, with about `_POPULATION` rows."""
    found: list[Batch] = []
    for batch in stream:
        if found and batch.epoch != found[0].epoch:
            break
        found.append(batch)
        if sum(len(one) for one in found) >= _POPULATION:
            break
    return found


def _choose(
    batches: list[Batch], decile: Tensor, units: int, targets: int, random: np.random.Generator
) -> list[tuple[int, Tensor]]:
    """Choose rows, or questions with all their rows, as (batch, rows), evenly over the deciles of their positives."""
    found = []
    for number, batch in enumerate(batches):
        if batch.asked is None:
            found += [(number, row) for row in torch.arange(len(batch))[:, None]]
        else:
            sizes = torch.bincount(batch.asked.of).tolist()
            found += [(number, rows) for rows in torch.arange(len(batch)).split(sizes)]  # type: ignore[no-untyped-call]
    found = [found[place] for place in random.permutation(len(found))]
    of = np.array([int(decile[batches[number].items[rows[0]]]) for number, rows in found])
    # Round-robin: the first of every decile, then the second, ...
    turn = np.zeros(len(found), dtype=np.int64)
    for each in range(10):
        turn[of == each] = np.arange((of == each).sum())
    chosen: list[tuple[int, Tensor]] = []
    for place in np.argsort(turn, kind="stable")[:units]:
        targets -= len(found[place][1])
        if targets >= 0 or len(chosen) < 2:
            chosen.append(found[place])
    return sorted(chosen, key=lambda one: (one[0], int(one[1][0])))


def _embedded(
    artifact: SavedModel, batches: list[Batch], chosen: list[tuple[int, Tensor]], ranks: Communicator
) -> AuditedRows:
    """Embed the chosen rows as training does, without dropout, and compute their logits."""
    parts = []
    with torch.no_grad(), _as_trained(artifact.towers) as towers:
        vectors = item_embeddings(towers, ranks)
        for number in dict.fromkeys(number for number, _ in chosen):
            rows = torch.cat([own for batch, own in chosen if batch == number])
            query = embed_rows(towers, batches[number])[rows]
            parts.append(((query @ vectors.T / towers.temperature).double(), batches[number], rows))
    is_asked, is_grouped = parts[0][1].asked is not None, parts[0][1].group is not None

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(batch, name)[rows] for _, batch, rows in parts])

    sizes = torch.tensor([len(rows) for _, rows in chosen])
    return AuditedRows(
        torch.cat([logits for logits, _, _ in parts]),
        joined("items"),
        joined("queries"),
        torch.cat([torch.full_like(rows, batch.group or 0) for _, batch, rows in parts]) if is_grouped else None,
        numbers=joined("rows"),
        questions=torch.arange(len(chosen)).repeat_interleave(sizes) if is_asked else None,
        weights=joined("weights") if is_asked else None,
        passed_over=_joined_slates([(batch, rows) for _, batch, rows in parts]),
    )


def _joined_slates(parts: list[tuple[Batch, Tensor]]) -> PassedOver | None:
    """Concatenate the slates of some rows of batches."""
    slates = [batch.passed_over[rows] for batch, rows in parts if batch.passed_over is not None]
    if not slates:
        return None
    weights = [one.weights for one in slates if one.weights is not None]
    return PassedOver(torch.cat([one.items for one in slates]), torch.cat(weights) if weights else None)


@contextmanager
def _as_trained(towers: TwoTower) -> Iterator[TwoTower]:
    """Yield the towers in evaluation mode, without a recent prior, which is added after training."""
    recent = towers.recent
    towers.eval()
    towers.set_recent(None)
    try:
        yield towers
    finally:
        towers.set_recent(recent)
