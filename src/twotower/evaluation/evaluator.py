"""Evaluation of rankers over the full catalog, alongside the baselines that they must beat."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data import ExposureLog, Holdout, Interactions
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError, counted, require_flags
from twotower.evaluation.baselines import FittedBaselines, fit_baselines
from twotower.evaluation.metrics import hits
from twotower.evaluation.off_policy import OffPolicyEstimate, OffPolicyTable, estimate_top_k
from twotower.evaluation.per_query import EvaluationTask, Targets, measure
from twotower.evaluation.results import Evaluation
from twotower.evaluation.significance import bootstrap_ratio
from twotower.evaluation.slices import column_slices, event_slices, flat, standard_slices
from twotower.ranking.base import Ranker

Empty = Literal["skip", "zero"]

#: Largest number of (query, item) pairs whose eligibility is checked at a time.
_EVERY = 1 << 24


def evaluate(
    ranker: Ranker,
    holdout: Holdout,
    *,
    train: Interactions,
    ks: Sequence[int] = (10, 20),
    exclude_seen: bool = True,
    baselines: bool | Sequence[str] | Mapping[str, Ranker] = True,
    validation: Holdout | None = None,
    name: str = "model",
    empty: Empty = "skip",
    allow_approximate: bool = False,
    slices: Sequence[str] = (),
    log: ExposureLog | None = None,
    ranks: Communicator | None = None,
) -> Evaluation:
    """Rank the whole catalog for every query of a holdout, and compare with the baselines.

    With `exclude_seen`, a target that is already in its query's history cannot be ranked: it is removed from the
    targets, counted, and reported in the notes.

    Args:
        ranker: the ranker to evaluate; any object with `rank`.
        holdout: the queries, their histories and their targets.
        train: the training interactions, which define head, mid and tail, and on which the baselines are fitted.
        ks: the cut-offs K.
        exclude_seen: whether to exclude items of a query's history from its ranking.
        baselines: True for all baselines of `fit_baselines`, or the names of some; False for none; or your own rankers
            by name.
        validation: the validation queries, on which the settings of the baselines are chosen; None for fixed settings.
        name: the ranker's name in the table.
        empty: how to treat queries without targets: leave them out of every mean (`"skip"`) or count them as 0
            (`"zero"`).
        allow_approximate: whether to accept a ranker with `is_exact = False`; the notes of the result then say so.
        slices: columns to slice by, `"items.genres"` or `"queries.age"`: a column of the item table slices the targets,
            a column of the query table slices the queries (see `column_slices` for how values become slices).
        log: the log of the items shown in the test window (`exposure_log`), to estimate the reward of every ranker;
            None for no estimate.
        ranks: the processes that share the baselines' queries; all of them call this with the same arguments.
            `ranker` must divide its own work. None for a single process.

    Returns:
        An `Evaluation`, which prints as a table.

    Raises:
        InputError: a setting is out of range, the ranker is inexact, or it returned an invalid ranking (wrong shape,
            unknown codes, repeats, excluded items).
        InputError: nothing is left to evaluate, or `slices` names columns that the tables do not have.
    """
    fitted = FittedBaselines(dict(baselines), (), {}) if isinstance(baselines, Mapping) else FittedBaselines({}, (), {})
    if baselines and not isinstance(baselines, Mapping):
        fitted = fit_baselines(
            train,
            validation,
            names=None if baselines is True else baselines,
            k=min(ks, default=1),
            exclude_seen=exclude_seen,
            ranks=ranks,
        )
    if name in fitted.rankers:
        raise InputError(f"two rankers are called {name!r}: give the model another name")
    return evaluate_all(
        {name: ranker, **fitted.rankers},
        holdout,
        train=train,
        ks=ks,
        exclude_seen=exclude_seen,
        empty=empty,
        allow_approximate=allow_approximate,
        slices=slices,
        notes=fitted.notes,
        log=log,
    )


def evaluate_all(
    rankers: Mapping[str, Ranker],
    holdout: Holdout,
    *,
    train: Interactions,
    ks: Sequence[int] = (10, 20),
    exclude_seen: bool = True,
    empty: Empty = "skip",
    allow_approximate: bool = False,
    slices: Sequence[str] = (),
    notes: Sequence[str] = (),
    log: ExposureLog | None = None,
) -> Evaluation:
    """Evaluate several rankers on the same queries and targets; see `evaluate` for the arguments."""
    require_flags(exclude_seen=exclude_seen, allow_approximate=allow_approximate)
    if not ks or min(ks) < 1:
        raise InputError(f"ks must be cut-offs of at least 1, got {tuple(ks)}")
    if empty not in ("skip", "zero"):
        raise InputError(f"empty must be 'skip' or 'zero', got {empty!r}")
    for name, ranker in rankers.items():
        if not (allow_approximate or getattr(ranker, "is_exact", True)):
            raise InputError(f"{name} searches an approximate index: pass allow_approximate=True to evaluate it")
    ks = tuple(sorted(set(ks)))
    queries = np.asarray(holdout.queries, dtype=np.int64)
    item_counts = train.item_counts()
    groups = standard_slices(item_counts, np.diff(train.offsets), queries) | event_slices(holdout)
    groups |= column_slices(train, queries, slices)
    targets = Targets.of(holdout, train.num_items, exclude_seen)
    counted = targets.sizes() > 0
    num_empty = int((~counted).sum())
    if empty == "zero":
        counted = np.ones_like(counted)
    if not counted.any():
        raise _nothing_to_rank(holdout, targets)
    task = EvaluationTask(targets, counted, ks, flat(groups), item_counts)
    inexact = [name for name, ranker in rankers.items() if not getattr(ranker, "is_exact", True)]
    rows = []
    for name, ranker in rankers.items():
        ranked = _ranked(name, ranker, holdout, k=max(ks), exclude_seen=exclude_seen, num_items=train.num_items)
        rows.append(measure(name, ranked, task, *_item_embeddings(name, ranker, ranked, train.num_items)))
    return Evaluation(
        holdout=holdout.name,
        ks=ks,
        exclude_seen=exclude_seen,
        empty=empty,
        num_items=train.num_items,
        num_targets=len(targets.items),
        num_removed=targets.removed,
        num_empty=num_empty,
        queries=queries[counted],
        slice_sizes={name: task.size(part) for name, part in task.slices.items()},
        rows=tuple(rows),
        notes=(
            *notes,
            *_notes(holdout, targets, num_empty, empty, inexact),
            *_eligibility_notes(holdout, train.num_items),
        ),
        slice_groups={name: tuple(group) for name, group in groups.items()},
        is_exact=not inexact,
        query_ids=train.queries,
        off_policy=None if log is None else _estimated(rankers, log, ks, exclude_seen, train.num_items),
    )


def _eligibility_notes(holdout: Holdout, num_items: int) -> list[str]:
    """Report how many items were ranked for a query, if not all."""
    eligible = holdout.eligible
    if eligible is None:
        return []
    step = max(_EVERY // max(num_items, 1), 1)
    starts = range(0, len(holdout), step)
    blocked = sum(int(eligible.blocked(slice(start, start + step)).sum()) for start in starts)
    mean = num_items - blocked / len(holdout)
    return [f"only eligible items are ranked (data.eligibility): {mean:,.0f} of {num_items:,} for the average query"]


def _estimated(
    rankers: Mapping[str, Ranker], log: ExposureLog, ks: Sequence[int], exclude_seen: bool, num_items: int
) -> OffPolicyTable:
    """Estimate the reward of every ranker, and compute the mean reward of the log."""
    rows: dict[str, dict[int, OffPolicyEstimate | None]] = {}
    for name, ranker in rankers.items():
        ranked = _ranked(name, ranker, log.asked, k=max(ks), exclude_seen=exclude_seen, num_items=num_items)
        rows[name] = {k: estimate_top_k(ranked, log, k) for k in ks}
    owners = log.owners
    logged = bootstrap_ratio(np.bincount(owners, weights=log.rewards), np.bincount(owners))
    return OffPolicyTable(logged, rows, log.clip, log.remark)


def _notes(holdout: Holdout, targets: Targets, num_empty: int, empty: Empty, inexact: Sequence[str]) -> list[str]:
    notes = [f"{name} searches an approximate index: its metrics include the errors of the index" for name in inexact]
    if holdout.event is not None:
        notes.append(
            f"a query is evaluated once for each {holdout.event} of its held-out rows, and each evaluation counts as a "
            "query"
        )
    if holdout.query_text is not None:
        notes.append(f"a query is evaluated once for each {holdout.query_text} of its held-out rows")
    if targets.removed:
        removed = (
            "target is already in its query's history and was",
            "targets are already in their query's history and were",
        )
        notes.append(f"{counted(targets.removed, *removed)} removed")
    if targets.not_eligible:
        removed = (
            "target was not eligible for its query and was",
            "targets were not eligible for their query and were",
        )
        notes.append(f"{counted(targets.not_eligible, *removed)} removed")
    if num_empty:
        left = ("query has no target that can be ranked and was", "queries have no target that can be ranked and were")
        what = "left out of the means" if empty == "skip" else "counted as 0"
        notes.append(f"{counted(num_empty, *left)} {what}")
    return notes


def check_targets(holdout: Holdout, num_items: int, exclude_seen: bool) -> None:
    """Reject a holdout on which `evaluate` would fail, before a model is trained.

    Raises:
        InputError: no query of the holdout has a target that can be ranked.
    """
    targets = Targets.of(holdout, num_items, exclude_seen)
    if len(holdout) and not len(targets.items):
        raise _nothing_to_rank(holdout, targets)


def _nothing_to_rank(holdout: Holdout, targets: Targets) -> InputError:
    message = f"{holdout.name}: no query has a target that can be ranked, so there is nothing to evaluate"
    if targets.removed:
        message += (
            f"; {counted(targets.removed, 'target was', 'targets were')} already in the query's history and "
            "therefore removed; set evaluation.exclude_seen=false to rank them too"
        )
    if targets.not_eligible:
        message += (
            f"; {counted(targets.not_eligible, 'target was', 'targets were')} not eligible for the query and "
            "therefore removed"
        )
    return InputError(message)


def _ranked(
    name: str, ranker: Ranker, holdout: Holdout, *, k: int, exclude_seen: bool, num_items: int
) -> NDArray[np.int64]:
    """Rank the holdout, and validate the result: a repeated item, for example, would be counted twice as a hit."""
    ranked = torch.as_tensor(ranker.rank(holdout, k, exclude_seen)).cpu().numpy()
    if ranked.shape != (len(holdout.queries), k) or ranked.dtype != np.int64:
        raise InputError(
            f"{name}: rank() must return int64 [{len(holdout.queries)}, {k}], got {ranked.dtype} {list(ranked.shape)}"
        )
    if ranked.size and not -1 <= ranked.min() <= ranked.max() < num_items:
        raise InputError(f"{name}: rank() must return item codes below {num_items}, or -1")
    ordered = np.sort(ranked, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any():
        raise InputError(f"{name}: rank() returned the same item twice for one query")
    eligible = holdout.eligible
    if eligible is not None and bool(eligible.blocked_of_rows(torch.from_numpy(ranked)).any()):
        raise InputError(
            f"{name}: rank() returned an item that is not eligible for its query (data.eligibility); rank only the "
            "items that holdout.eligible allows"
        )
    if exclude_seen and hits(ranked, holdout.history_offsets, holdout.history_items).any():
        raise InputError(f"{name}: rank() returned an item of the query's history although exclude_seen is set")
    return ranked


def _item_embeddings(
    name: str, ranker: Ranker, ranked: NDArray[np.int64], num_items: int
) -> tuple[NDArray[np.floating] | None, NDArray[np.int64] | None]:
    """Return (item embeddings [N, D], None); if sharded, (embeddings of the ranked items, row of each list entry)."""
    by_parts = getattr(ranker, "embeddings_of", None)
    if by_parts is not None:
        distinct = np.unique(ranked[ranked >= 0])
        places = np.where(ranked >= 0, np.searchsorted(distinct, ranked), -1)
        return by_parts(distinct).cpu().numpy(), places
    vectors = getattr(ranker, "directions", None)  # without a coordinate for biases, if there is one
    vectors = getattr(ranker, "item_embeddings", None) if vectors is None else vectors
    if vectors is None:
        return None, None
    embeddings: NDArray[np.floating] = torch.as_tensor(vectors).detach().float().cpu().numpy()
    if embeddings.ndim != 2 or len(embeddings) != num_items:
        raise InputError(f"{name}: item_embeddings must be [{num_items}, D], got {list(embeddings.shape)}")
    return embeddings, None
