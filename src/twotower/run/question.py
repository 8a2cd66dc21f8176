"""Choice of the training question, by default the question that the evaluation asks, and of its default towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from twotower.config.run import Config
from twotower.data import Interactions, Split
from twotower.data.loading.questions import QuestionRule
from twotower.errors import InputError

DAY = 86_400_000_000
#: Largest catalog for which the full softmax is the default.
WHOLE_CATALOG = 20_000
#: Largest share of rows that are the only row of their query at which `set` is the default question. `set` leaves out
#: these rows, while a tower that reads features of the query learns from them. NDCG@10 of next and set on synthetic
#: pairs with 6,000 to 7,000 queries made of words, one seed: 0.477 and 0.380 if 64 % of the rows are alone, 0.561 and
#: 0.528 if 36 % are, and, with different words, 0.478 and 0.513 if 30 % are.
MOST_ALONE = 0.5
#: Largest default D. Catalogs with at most this many items start from full-rank EASE.
MOST_DIMENSIONS = 512
#: Settings that can be changed without giving up the default towers of a question.
FREE = {
    "query_tower": {"history": {"length", "dropout"}},
    "item_tower": {"dimension", "table_precision"},
    "objective": {
        "name",
        "sources",
        "unique",
        "strength",
        "mask_known_positives",
        "rows_per_draw",
        "negatives",
        "bias",
        "feedback",
    },
}


def resolve_question(
    config: Config,
    split: Split,
    on_message: Callable[[object], None] | None = None,
    *,
    parent: Config | None = None,
) -> Config:
    """Replace "auto" in `training.question` and `training.horizon`, and choose the default towers of the question.

    If only settings in `FREE` are given, the default for the questions horizon and set is a linear model: the history
    is a sum of vectors from its own table, and an item has a vector and a bias (`defaults_of`). Otherwise, settings
    that are not given keep their ordinary defaults.

    Args:
        config: the settings.
        split: the data.
        on_message: receives a message with the choice and its reason; None discards it.
        parent: the settings of the parent model in incremental training; its question and its towers are the defaults.

    Raises:
        InputError: see `refuse_question`; also if the horizon is "auto" and the test queries have no timestamps.
    """
    question: str = config.training.question
    reason = "as set"
    if parent is not None and _is_free(config):
        config = _filled(config, _towers_of(parent))
    if question == "auto" and parent is not None:
        question = "next" if parent.training.question == "auto" else parent.training.question
        reason = "as in the parent model"
    if question == "auto":
        question, reason = _question_of(config, split)
    if question != "next":
        refuse_question(config, split.train, question)
    chosen = config.training.question == "auto"
    update: dict[str, Any] = {"question": question}
    said = f"training question: {question} ({reason})"
    if question == "horizon" and config.training.horizon == "auto":
        chosen, update["horizon"] = True, _days(split)
        said += f"; horizon {update['horizon']:.3g} days"
    if question != "next" and parent is None and _is_free(config):
        defaults = defaults_of(split.train)
        if "dimension" in config.item_tower.model_fields_set:
            del defaults["training"]["start_ranks"]
        chosen, config = True, _filled(config, defaults)
        said += "; towers: linear (a sum over the history, an item bias)"
    if chosen and on_message is not None:
        on_message(said)
    return config.model_copy(update={"training": config.training.model_copy(update=update)})


def rule_of(config: Config) -> QuestionRule | None:
    """Return the rule by which a resolved configuration builds its questions; None for the next item."""
    training = config.training
    if training.question in ("auto", "next"):
        return None
    return QuestionRule(
        kind="horizon" if training.question == "horizon" else "set",
        horizon=0 if training.horizon == "auto" else max(round(float(training.horizon) * DAY), 1),
        share=training.hidden_share,
        weight=training.question_weight,
        new_only=config.evaluation.exclude_seen,
    )


def refuse_question(config: Config, train: Interactions, question: str) -> None:
    """Reject questions that the towers or batches of a configuration do not support.

    Raises:
        InputError: there is a sequence tower, batches are grouped, rows have event types or texts of their own, or the
            question is horizon and the rows have no timestamps.
    """
    if config.reads_sequences:
        raise InputError(
            f"training.question: {question}: a sequence tower learns the next item at every position; use "
            "training.question=next, or a pooled history (query_tower.history.sequence=null)"
        )
    if config.objective.is_grouped:
        raise InputError(
            f"training.question: {question}: a question may span several groups; use training.question=next, or "
            "objective.frequency=counted"
        )
    if config.data.events is not None:
        raise InputError(
            f"training.question: {question}: the targets of a question may have several event types; use "
            "training.question=next with data.events"
        )
    if config.data.query_text is not None and not config.data.texts_are_queries:
        raise InputError(
            f"training.question: {question}: the targets of a question may have several texts (data.query_text); use "
            "training.question=next"
        )
    if question == "horizon" and train.timestamps is None:
        raise InputError(
            "training.question: horizon needs timestamps; name the column with data.columns.timestamp, or use set"
        )


def is_split_by_time(split: Split) -> bool:
    """Return whether the split is by time: no test query is earlier than the last training row."""
    times, asked = split.train.timestamps, split.test.query_times
    if times is None or asked is None or not len(times) or not len(asked):
        return False
    return int(np.max(times)) <= int(np.min(asked))


def defaults_of(train: Interactions) -> dict[str, Any]:
    """Return the default settings of the questions horizon and set: towers, objective and training, by section."""
    sources: list[dict[str, Any]] = [{"catalog": {}}]
    if train.num_items > WHOLE_CATALOG:
        sources = [{"head": {"size": 1024}}, {"frequency": {"size": 3072, "power": 0.5}}]
    return {
        "query_tower": {
            "history": {"length": 200, "heads": 1, "dropout": 0.3, "share_table": False, "power": 0.5},
            "hidden": None,
            "dropout": 0.0,
        },
        "item_tower": {"dimension": _dimension(train.num_items), "bias": True},
        "objective": {"sources": sources, "similarity": "dot", "temperature": 1.0, "mask_known_positives": True},
        # Randomly initialised tables need larger steps than the linear start.
        "training": {"learning_rate": 1e-3 if train.num_items <= WHOLE_CATALOG else 3e-3, "start_ranks": [1, 2, 4]},
    }


def _towers_of(config: Config) -> dict[str, Any]:
    """Return the sections of the towers and the objective, as defaults for a different configuration."""
    found = {name: dict(getattr(config, name)) for name in FREE}
    history = found["query_tower"]["history"]
    if history is not None:
        found["query_tower"]["history"] = dict(history)
    return found


def _dimension(num_items: int) -> int:
    """Return D: N for up to 512 items; otherwise N / 8, with N D at most 2.6 million; 128 above `WHOLE_CATALOG` items.

    The rank also regularizes the linear start: on MovieLens 100K, D = 208 is better than D = 416 or full-rank EASE, on
    splits by time and at random. On Steam (5,155 items) truncation costs 2 % of the NDCG@10 of EASE. In small catalogs
    N / 8 is too small: on subsets of six data sets with about 150, 300, 600 and 1,200 items, EASE truncated to N / 8,
    N / 4 or N / 2, whichever was best on the validation queries, had an NDCG@10 that was 2.5 %, 1.6 %, 0.8 % and 0.5 %
    lower than at full rank (`benchmarks/small_catalogs.py`).
    """
    if num_items > WHOLE_CATALOG:
        return 128
    if num_items <= MOST_DIMENSIONS:
        return max(-(-num_items // 16) * 16, 16)
    return int(np.clip(min(num_items // 8, 2_600_000 // max(num_items, 1)) // 16 * 16, 64, MOST_DIMENSIONS))


def _question_of(config: Config, split: Split) -> tuple[str, str]:
    if config.reads_sequences:
        return "next", "a sequence tower learns at every position"
    if config.objective.is_grouped or config.data.events is not None:
        return "next", "batches are built within groups" if config.objective.is_grouped else "rows have event types"
    asks_texts = config.data.query_text is not None and not (
        config.data.texts_are_queries and config.query_tower.history
    )
    if asks_texts or split.name == "leave_last_out":
        return "next", "each row pairs a text with an item" if asks_texts else "the split asks for the last item"
    if is_split_by_time(split):
        return "horizon", "the split asks for all items after a date"
    if split.name == "held_out_queries" and split.train.timestamps is not None:
        return "next", "held-out queries are evaluated on their later rows, given their first ones"
    return _question_without_order(config, split.train)


def _question_without_order(config: Config, train: Interactions) -> tuple[str, str]:
    alone = rows_alone(train)
    if config.query_tower.features != "none" and alone > MOST_ALONE:
        return (
            "next",
            f"{alone:.0%} of the rows are the only row of their query, with no other item to predict them from",
        )
    return "set", "the split is not by time"


def rows_alone(train: Interactions) -> float:
    """Return the share of rows whose query has no other row; `set` cannot predict them from other items."""
    return float((np.diff(train.offsets) == 1).sum() / max(len(train), 1))


def _days(split: Split) -> float:
    """Return the longer of the time spans of the test and validation parts, in days; 1 if both have a single time."""
    times, asked = split.data.timestamps, split.test.query_times
    if times is None or asked is None or not len(asked):
        raise InputError(
            "training.horizon: auto needs timestamps of the test queries; set a number of days, such as "
            "training.horizon=30"
        )
    begin, validated = int(np.min(asked)), split.validation.query_times
    span = int(np.max(times)) - begin
    if validated is not None and len(validated):
        span = max(span, begin - int(np.min(validated)))
    return span / DAY if span > 0 else 1.0


def _is_free(config: Config) -> bool:
    """Return whether no setting that determines the structure of the towers is set."""
    for name, free in FREE.items():
        section = getattr(config, name)
        for field in section.model_fields_set:
            if field not in free:
                return False
            inner = free[field] if isinstance(free, dict) else None
            value = getattr(section, field)
            if inner is not None and (value is None or not value.model_fields_set <= inner):
                return False
    return True


def _filled(config: Config, defaults: dict[str, Any]) -> Config:
    """Fill in settings that are not set."""
    changed = {}
    for name, values in defaults.items():
        section = getattr(config, name)
        if name == "objective" and "name" in section.model_fields_set:  # a named objective has its own sources
            values = {key: value for key, value in values.items() if key not in ("sources", "name")}  # noqa: PLW2901
        update = {}
        for field, value in values.items():
            if field == "history" and isinstance(value, dict):
                inner = getattr(section, field)
                missing = {key: one for key, one in value.items() if key not in inner.model_fields_set}
                update[field] = inner.model_copy(update=missing)
            elif field not in section.model_fields_set:
                update[field] = value
        changed[name] = section.model_copy(update=update)
    return config.model_copy(update=changed)
