"""The recent prior: an extra item coordinate for how much more frequent an item is now than in all training rows.

A model trained on the whole period estimates P(y | x) under the item frequency p_train. If item popularity changes over
time while P(x | y) does not, Bayes' rule gives (docs/theory.md, section 6)

    log P_now(y | x) = log P_train(y | x) + log p_now(y) - log p_train(y) + const.

If histories predict little, the scores of the model are mostly noise and should have a small weight. The order of the
items depends only on the ratio of the two weights, so the prior may have a larger weight than Bayes' rule gives. With a
large weight on log p_now, the model ranks by the popularity of the newest rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.config.run import Config
from twotower.data import Interactions, Split
from twotower.evaluation import Row
from twotower.run.question import is_split_by_time
from twotower.run.validation import Validator, defined, simplest
from twotower.serving import SavedModel
from twotower.towers import TwoTower

DAY = 86_400_000_000
#: Half-lives to try, as fractions of the time span of the training rows.
HALF_LIVES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
#: With this strength the model ranks by the newest rows, and the scores of the towers only break ties.
NEWEST_ROWS = (256.0, 256.0)
#: Strengths to try, each with a multiple of log p_train to add; if both numbers equal s, the prior is s log p_now.
STRENGTHS = (
    (1.0, 0.0),
    (0.5, 0.0),
    (1.5, 0.0),
    (2.0, 0.0),
    (4.0, 0.0),
    (2.0, 1.0),
    (1.0, 1.0),
    (2.0, 2.0),
    (4.0, 4.0),
    (16.0, 16.0),
    (64.0, 64.0),
)
#: Half-life, strength and multiple of log p_train.
Setting = tuple[float, float, float]
#: Number of pseudo-rows, distributed as all training rows are, that are added to the recent rows.
PSEUDO_ROWS = 10.0
#: Relative improvement of the validation metric below which the prior is left out.
LEAST = 0.01


@dataclass(frozen=True)
class RecentPrior:
    """The chosen recent prior.

    Attributes:
        half_life: time after which the weight of a row halves, in days.
        strength: s, factor of the log ratio; 1 according to Bayes' rule.
        before: validation metrics without the prior.
        after: validation metrics with the prior.
        popularity: t, factor of log p_train; 0 according to Bayes' rule, and in models of earlier versions.
    """

    half_life: float
    strength: float
    before: dict[str, float]
    after: dict[str, float]
    popularity: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    def settings(self) -> dict[str, float]:
        """Return the settings as arguments of `prior_of`."""
        return {"half_life": self.half_life, "strength": self.strength, "popularity": self.popularity}

    def __str__(self) -> str:
        shown = [
            f"{name} {self.before[name]:.4f} -> {value:.4f}"
            for name, value in self.after.items()
            if name in self.before and self.before[name] != value
        ]
        if (self.strength, self.popularity) == NEWEST_ROWS:
            said = (
                f"ranking by the newest rows (half-life {self.half_life:.3g} days); the towers only break ties, "
                "because they do not improve on it by more than one standard error"
            )
        else:
            more = f", plus {self.popularity:g} log p" if self.popularity else ""
            said = f"half-life {self.half_life:.3g} days, strength {self.strength:g}{more}"
        return f"recent prior: {said}; on the validation queries {', '.join(shown)}"


def prior_of(
    data: Interactions,
    train_counts: NDArray[np.integer[Any]],
    *,
    half_life: float,
    now: int,
    strength: float,
    popularity: float = 0.0,
) -> Tensor:
    """Compute the prior r = s (log p_now - log p_train) + t log p_train of each item, float32 [N].

    Args:
        data: interactions with timestamps; rows from `now` on do not count.
        train_counts: training rows of each item, [N].
        half_life: half-life in days.
        now: time in microseconds.
        strength: s, the factor of the log ratio.
        popularity: t, the factor of log p_train.
    """
    assert data.timestamps is not None
    ratio = recent_log_ratio(data.timestamps, data.item_codes, train_counts, half_life=half_life, now=now)
    if not popularity:
        return strength * ratio
    return strength * ratio + popularity * torch.from_numpy(np.log(_frequency(train_counts))).float()


def _frequency(train_counts: NDArray[np.integer[Any]]) -> NDArray[np.float64]:
    """Return p_train, with one row added to each item so that it is never 0."""
    smoothed: NDArray[np.float64] = (train_counts + 1.0) / (train_counts.sum() + len(train_counts))
    return smoothed


def recent_log_ratio(
    times: NDArray[np.int64],
    items: NDArray[np.integer[Any]],
    train_counts: NDArray[np.integer[Any]],
    *,
    half_life: float,
    now: int,
) -> Tensor:
    """Compute log p_now - log p_train of each item, float32 [N].

    With w_r = 2^(-(now - t_r) / half-life) for the rows before `now`, c_j the sum of w over the rows of item j, C the
    sum of all c_j, p_train = (count + 1) / (rows + N), and 10 pseudo-rows from p_train to reduce noise,

        p_now(j) = (c_j + 10 p_train(j)) / (C + 10).

    Items without a training row get 0, because an untrained item must not be recommended for being new.

    Args:
        times: times of the rows, in microseconds.
        items: item codes of the rows.
        train_counts: training rows of each item, [N].
        half_life: half-life in days.
        now: time in microseconds; rows from then on do not count.
    """
    past = np.asarray(times) < now
    age = (now - np.asarray(times)[past]) / (half_life * DAY)
    recent = np.bincount(np.asarray(items)[past], weights=0.5**age, minlength=len(train_counts))
    before = _frequency(train_counts)
    after = (recent + PSEUDO_ROWS * before) / (recent.sum() + PSEUDO_ROWS)
    ratio = np.log(after) - np.log(before)
    ratio[train_counts == 0] = 0.0
    return torch.from_numpy(ratio).float()


def add_recent_prior(
    towers: TwoTower,
    split: Split,
    config: Config,
    validate: Validator | None,
    on_message: Callable[[object], None] | None = None,
) -> RecentPrior | None:
    """Choose the recent prior on the validation queries, and set it in the towers as of the first test query.

    Args:
        towers: the trained towers; changed in place.
        split: the data; all rows before the test part, including validation rows, are used for the recent frequency.
        config: the settings; with `training.recent_prior=false` there is no prior.
        validate: measures towers on the validation queries; None if there is no validation, and then no prior.
        on_message: receives the choice and its effect; None discards it.

    Returns:
        The choice; None if the prior is turned off, does not help, or the split is not by time.
    """
    data, asked, validated = split.data, split.test.query_times, split.validation.query_times
    if not config.training.recent_prior or validate is None or not is_split_by_time(split):
        return None
    assert data.timestamps is not None and asked is not None and validated is not None
    prior = choose_recent_prior(
        towers, split.train, validate.measured, config.training.metric, now=int(np.min(validated))
    )
    if prior is not None:
        counts, now = split.train.item_counts(), int(np.min(asked))
        towers.set_recent(prior_of(data, counts, now=now, **prior.settings()))
    if on_message is not None:
        on_message("recent prior: none, because it does not help on the validation queries" if prior is None else prior)
    return prior


def at_validation(model: SavedModel, split: Split) -> SavedModel:
    """Return a saved model with the recent prior as of the first validation query.

    The model's own prior is as of the first test query. It counts the validation rows, so it would leak their targets.

    Args:
        model: a model that was just loaded; its towers are changed in place.
        split: the data that the model was trained on.
    """
    chosen, train, asked = model.metadata.get("recent_prior"), split.train, split.validation.query_times
    if not chosen or train.timestamps is None or asked is None or not len(asked):
        return model
    settings = RecentPrior(**chosen).settings()
    model.towers.set_recent(prior_of(train, train.item_counts(), now=int(np.min(asked)), **settings))
    return replace(model, item_embeddings=model.towers.item_embeddings())


def choose_recent_prior(
    towers: TwoTower,
    train: Interactions,
    measured: Callable[[TwoTower], Row],
    metric: str,
    *,
    now: int,
) -> RecentPrior | None:
    """Choose half-life and strength on the validation queries; the towers have no prior afterwards.

    The half-life is chosen at strength 1, then the strength at the best half-life, then the half-life again if the
    strength includes log p_train. The choice is compared with a ranking by the newest rows alone, at its own best
    half-life: 23 or 28 validations in all.

    The newest rows alone are chosen if they are within one standard error of the best (`simplest`). The validation
    favours the towers: the prior is computed again as of the first test query, but the towers are then older than in
    the validation. `benchmarks/prior_choice.py` measures this rule.

    Args:
        towers: trained towers without a prior.
        train: the training interactions, with timestamps.
        measured: measures towers on the validation queries, with the same result on every rank.
        metric: the name of the metric to improve.
        now: time of the first validation row, in microseconds.

    Returns:
        The choice, or None if no strength improves the metric by 1 %.
    """
    times, counts = train.timestamps, train.item_counts()
    assert times is not None
    span = max((int(np.max(times)) - int(np.min(times))) / DAY, 1e-6)
    half_lives = [span * share for share in HALF_LIVES]
    before = measured(towers).values

    @cache
    def at(half_life: float, strength: float, popularity: float) -> Row:
        prior = prior_of(train, counts, now=now, half_life=half_life, strength=strength, popularity=popularity)
        towers.set_recent(prior)
        return measured(towers)

    def best_of(settings: Iterable[Setting]) -> Setting:
        return max(settings, key=lambda one: at(*one).values[metric])

    half_life = best_of((days, 1.0, 0.0) for days in half_lives)[0]
    best = best_of((half_life, *pair) for pair in STRENGTHS)
    if best[2]:
        best = best_of((days, *best[1:]) for days in half_lives)
    newest = best_of((days, *NEWEST_ROWS) for days in half_lives)
    helpful = {
        one: at(*one).per_query[metric]
        for one in (newest, best)
        if at(*one).values[metric] > before[metric] * (1.0 + LEAST)
    }
    towers.set_recent(None)
    if not helpful:
        return None
    half_life, strength, popularity = chosen = simplest(helpful)
    after = at(*chosen).values
    return RecentPrior(half_life, strength, before=defined(before), after=defined(after), popularity=popularity)
