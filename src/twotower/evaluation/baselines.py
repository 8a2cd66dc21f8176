"""Baselines of an evaluation, fitted on the training rows with settings chosen on the validation queries."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twotower.data import Holdout, Interactions
from twotower.data.loading.histories import take_ranges
from twotower.distributed.communicator import Communicator
from twotower.distributed.launch import Launch
from twotower.errors import InputError
from twotower.evaluation.metrics import hits, ndcg_at
from twotower.evaluation.per_query import Targets
from twotower.ranking.base import Ranker
from twotower.ranking.baselines import EASE, ItemKNN, Popularity, gram, pair_count
from twotower.ranking.distributed import over_ranks
from twotower.ranking.tower_ranker import SlowProgress
from twotower.system.hardware import memory

#: Names of the baselines, in the order of the table.
BASELINES = ("popularity", "newest", "item-kNN", "EASE")

#: Settings to choose from, and the setting that is used without validation queries.
SHARES, SHARE = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005), 0.05
NEIGHBOURS, NEIGHBOUR_COUNT = (5, 10, 20, 50, 100, 200), 10
SHRINKAGES, SHRINKAGE = (0.0, 10.0, 30.0, 100.0), 30.0
PENALTIES, PENALTY = (10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10_000.0, 30_000.0), 300.0

#: Settings are chosen on at most this many validation queries, a random sample if there are more.
MOST_QUERIES = 3000
#: Limits on the search for settings: item pairs to count, and bytes of the lists of neighbours.
_PAIRS, _NEIGHBOUR_BYTES = 2_000_000_000, 1 << 30
#: The penalty of EASE is chosen on this many of the most popular items, because each solution costs N^3.
_EASE_ITEMS = 5000


@dataclass(frozen=True)
class FittedBaselines:
    """The baselines of an evaluation.

    Attributes:
        rankers: the fitted baselines by name, in the order of the table.
        notes: remarks for the reader: the chosen settings, and the baselines that were left out.
        settings: the settings of each baseline that has any, as text.
    """

    rankers: dict[str, Ranker]
    notes: tuple[str, ...]
    settings: dict[str, str]


class ValidationScore:
    """NDCG@K of a ranker on the validation queries.

    Args:
        holdout: the validation queries; at most `MOST_QUERIES` are used, a random sample if there are more.
        num_items: N.
        k: K.
        exclude_seen: whether to exclude items of a query's history.
        progress: the progress bar, which advances by one with each ranking.
        ranks: the processes that share the queries.
    """

    def __init__(
        self,
        holdout: Holdout,
        num_items: int,
        k: int,
        exclude_seen: bool,
        *,
        progress: SlowProgress,
        ranks: Communicator,
    ) -> None:
        targets = Targets.of(holdout, num_items, exclude_seen)
        rows = np.flatnonzero(targets.sizes() > 0)
        if len(rows) > MOST_QUERIES:
            rows = np.sort(np.random.default_rng(0).choice(rows, MOST_QUERIES, replace=False))
        self.holdout = _queries_of(holdout, rows)
        self.targets = Targets.of(self.holdout, num_items, exclude_seen)
        self.k, self.exclude_seen, self.progress, self.ranks, self.done = k, exclude_seen, progress, ranks, 0

    def among(self, items: NDArray[np.int64], num_items: int) -> "ValidationScore":
        """Restrict histories and targets to some items, ascending, and renumber these 0, 1, ..."""
        codes = np.full(num_items, -1, dtype=np.int64)
        codes[items] = np.arange(len(items))
        recoded = _recoded(self.holdout, codes)
        return ValidationScore(recoded, len(items), self.k, self.exclude_seen, progress=self.progress, ranks=self.ranks)

    def __len__(self) -> int:
        return len(self.holdout)

    def __call__(self, ranker: Ranker) -> float:
        """Return the mean NDCG@K over the queries."""
        ranked = np.asarray(over_ranks(ranker, self.ranks).rank(self.holdout, self.k, self.exclude_seen))
        hit = hits(ranked, self.targets.offsets, self.targets.items)
        self.done += 1
        self.progress(min(self.done, _RANKINGS), _RANKINGS)
        return float(ndcg_at(hit, self.targets.sizes(), self.k).mean())

    def best(self, candidates: Iterator[tuple[str, Ranker]]) -> tuple[str, Ranker]:
        """Return the best candidate, the first if several are equal."""
        best: tuple[float, str, Ranker] | None = None
        for settings, ranker in candidates:
            value = self(ranker)
            if best is None or value > best[0]:
                best = value, settings, ranker
        assert best is not None
        return best[1:]


#: Number of rankings if all settings are tried, for the progress bar.
_RANKINGS = len(SHARES) + len(NEIGHBOURS) * len(SHRINKAGES) + len(PENALTIES)


def fit_baselines(
    train: Interactions,
    validation: Holdout | None = None,
    *,
    names: Sequence[str] | None = None,
    k: int = 10,
    exclude_seen: bool = True,
    ranks: Communicator | None = None,
) -> FittedBaselines:
    """Fit the baselines on the training rows, and choose their settings by NDCG@K on the validation queries.

    The test queries are not used. Without validation queries, or if the choice would take too long, fixed settings are
    used, and the notes list them. EASE is left out if the catalog has more than 20,000 items or does not fit in memory,
    item-kNN if it would have to count too many pairs of items.

    Args:
        train: the training interactions.
        validation: the validation queries; None or empty for fixed settings.
        names: the names in `BASELINES` to fit; None for all that the data allows.
        k: K.
        exclude_seen: whether to exclude items of a query's history when settings are chosen.
        ranks: the processes that share the queries of every ranking; all of them must call this with the same
            arguments, and fit the same baselines. None for a single process.

    Raises:
        InputError: a name is unknown.
    """
    ranks = ranks or Communicator()
    for name in names or ():
        if name not in BASELINES:
            raise InputError(f"evaluation.baselines: {name!r} is unknown; expected names among {', '.join(BASELINES)}")
    selected = [name for name in BASELINES if names is None or name in names]
    rankers: dict[str, Ranker] = {}
    settings: dict[str, str] = {}
    chosen: list[str] = []
    fixed: list[str] = []
    notes: list[str] = []
    with SlowProgress("baselines") as progress:
        score = None
        if validation is not None and len(validation):
            score = ValidationScore(validation, train.num_items, k, exclude_seen, progress=progress, ranks=ranks)
        for name in selected:
            reason = _refusal(name, train)
            if ranks.agree(reason is not None):  # the reason may be too little memory on one machine
                reason = reason or "another rank has too little memory"
                if names is not None or name != "newest":
                    notes.append(f"the {name} baseline was left out: {reason}")
                continue
            if name == "popularity":
                rankers[name] = Popularity(train)
                continue
            choice = None if score is None or not len(score) else _CHOOSE[name](train, score)
            settings[name], rankers[name] = choice or _FIXED[name](train)
            (fixed if choice is None else chosen).append(f"{name}: {settings[name]}")
    if chosen:
        notes.append(f"settings of the baselines, chosen by NDCG@{k} on the validation queries: {'; '.join(chosen)}")
    if fixed:
        notes.append(f"settings of the baselines that were not chosen on validation queries: {'; '.join(fixed)}")
    return FittedBaselines({name: over_ranks(one, ranks) for name, one in rankers.items()}, tuple(notes), settings)


def _refusal(name: str, train: Interactions) -> str | None:
    """Explain why a baseline cannot be fitted on this data, or return None."""
    if name == "newest":
        return None if train.timestamps is not None else "the data has no timestamps"
    if name == "item-kNN":
        return ItemKNN.refusal(train)
    return EASE.refusal(train, memory(Launch.of_environment().local_size).available) if name == "EASE" else None


def _newest(share: float) -> str:
    return f"the newest {100 * share:g} % of the training rows"


def _choose_newest(train: Interactions, score: ValidationScore) -> tuple[str, Ranker] | None:
    return score.best((_newest(share), Popularity(train, share)) for share in SHARES)


def _knn(neighbours: int, shrink: float) -> str:
    return f"{neighbours} neighbours, shrinkage {shrink:g}"


def _choose_knn(train: Interactions, score: ValidationScore) -> tuple[str, Ranker] | None:
    if pair_count(train) * len(SHRINKAGES) > _PAIRS:
        return None
    room = [count for count in NEIGHBOURS if count * train.num_items * 12 <= _NEIGHBOUR_BYTES]
    if not room:
        return None

    def candidates() -> Iterator[tuple[str, Ranker]]:
        for shrink in SHRINKAGES:
            widest = ItemKNN(train, room[-1], shrink)
            for neighbours in room:
                yield _knn(neighbours, shrink), widest.with_neighbours(neighbours)

    return score.best(candidates())


def _choose_ease(train: Interactions, score: ValidationScore) -> tuple[str, Ranker] | None:
    """Climb from the default penalty to the best one: up to noise, NDCG has a single maximum."""
    products = gram(train)
    few, small = score, products
    if train.num_items > _EASE_ITEMS:
        popular = np.sort(np.argsort(-train.item_counts(), kind="stable")[:_EASE_ITEMS])
        few = score.among(popular, train.num_items)
        if not len(few):
            return None
        small = products[torch.from_numpy(popular)][:, torch.from_numpy(popular)]
    values: dict[int, float] = {}
    best = PENALTIES.index(PENALTY)
    while missing := [
        place for place in (best, best - 1, best + 1) if place in range(len(PENALTIES)) if place not in values
    ]:
        for place in missing:
            values[place] = few(EASE.of_products(small, PENALTIES[place]))
        best = max(values, key=lambda place: values[place])
    return f"l2 = {PENALTIES[best]:g}", EASE.of_products(products, PENALTIES[best])


_CHOOSE: dict[str, Callable[[Interactions, ValidationScore], tuple[str, Ranker] | None]] = {
    "newest": _choose_newest,
    "item-kNN": _choose_knn,
    "EASE": _choose_ease,
}
_FIXED: dict[str, Callable[[Interactions], tuple[str, Ranker]]] = {
    "newest": lambda train: (_newest(SHARE), Popularity(train, SHARE)),
    "item-kNN": lambda train: (_knn(NEIGHBOUR_COUNT, SHRINKAGE), ItemKNN(train, NEIGHBOUR_COUNT, SHRINKAGE)),
    "EASE": lambda train: (f"l2 = {PENALTY:g}", EASE(train, PENALTY)),
}


def _recoded(holdout: Holdout, codes: NDArray[np.int64]) -> Holdout:
    """Recode the items of a holdout in the same order, and drop items whose new code is -1."""
    parts: dict[str, Any] = {}
    for side in ("history", "target"):
        offsets, items = getattr(holdout, f"{side}_offsets"), codes[getattr(holdout, f"{side}_items")]
        parts[f"{side}_offsets"] = np.concatenate([[0], np.cumsum(items >= 0)])[offsets]
        parts[f"{side}_items"] = items[items >= 0].astype(np.int32)
    rule = holdout.eligibility
    kept = None if rule is None else rule.select(np.flatnonzero(codes >= 0))
    return replace(holdout, history_timestamps=None, history_events=None, eligibility=kept, **parts)


def _queries_of(holdout: Holdout, rows: np.ndarray) -> Holdout:
    """Select the queries of a holdout, ascending."""
    parts: dict[str, Any] = {}
    for side, columns in (("history", ("history_items", "history_timestamps")), ("target", ("target_items",))):
        offsets = getattr(holdout, f"{side}_offsets")
        taken, parts[f"{side}_offsets"] = take_ranges(offsets[rows], offsets[rows + 1])
        for column in columns:
            values = getattr(holdout, column)
            parts[column] = None if values is None else np.asarray(values)[taken]
    times, context, groups = holdout.query_times, holdout.context, holdout.query_groups
    return replace(
        holdout,
        queries=np.asarray(holdout.queries)[rows],
        query_times=None if times is None else times[rows],
        context=None if context is None else context[rows],
        query_groups=None if groups is None else groups[rows],
        **parts,
    )
