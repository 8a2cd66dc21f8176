"""The configuration of a run as pydantic models, which are pure data and build nothing.

Settings of the model (`query_tower`, `item_tower`, `objective`), settings of the run (`data`, `training`, `evaluation`)
and live state are kept apart; live state is in the checkpoint, not here.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from twotower.config.features import FilePath, Section, matching
from twotower.config.messages import first_fault, parse_yaml, read_yaml
from twotower.config.query_text import with_query_text
from twotower.config.towers import HistoryConfig, ItemTowerConfig, QueryTowerConfig, SequenceConfig
from twotower.errors import InputError

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EligibilityConfig",
    "EvaluationConfig",
    "ExposureConfig",
    "FeedbackConfig",
    "FeedbackTermConfig",
    "GuardConfig",
    "HashedConfig",
    "HistoryConfig",
    "ItemTowerConfig",
    "ObjectiveConfig",
    "QueryTowerConfig",
    "SequenceConfig",
    "TrainingConfig",
    "WeightsConfig",
]


#: A column name; YAML parses a name made of digits as a number.
ColumnName = Annotated[str | None, BeforeValidator(lambda name: str(name) if type(name) is int else name)]


class ColumnsConfig(Section):
    """The column of each role. The default is a common name (user_id, ...); "none" means that there is no column."""

    query: ColumnName = None
    item: ColumnName = None
    timestamp: ColumnName = None
    weight: ColumnName = None
    label: ColumnName = None
    group: ColumnName = None


class ItemColumnsConfig(Section):
    """The columns of the item table; by default they are found by common names."""

    item: ColumnName = Field(None, description="Id of the item.")
    title: ColumnName = Field(None, description="Text shown for the item; renamed to `title`.")


class QueryColumnsConfig(Section):
    """The columns of the query table; by default they are found by common names."""

    query: ColumnName = Field(None, description="Id of the query.")


class HashedConfig(Section):
    """Ids hashed to rows, without a vocabulary."""

    hashed: int = Field(ge=2, le=2**31 - 1, description="R, the number of rows; ids in the same row share a vector.")


class EligibilityConfig(Section):
    """The items that may be offered, by group (market, language) and time; columns of the item table unless noted."""

    item_groups: ColumnName = Field(
        None,
        description="The groups in which an item is offered: a value, a list, or text separated by |. null in a row: "
        "every group. The group of a row of the data is in data.columns.group, or in query_group.",
    )
    query_group: ColumnName = Field(
        None, description="Column of the query table with the group of a query. null: data.columns.group of each row."
    )
    available_from: ColumnName = Field(None, description="Time from which an item is offered. null in a row: no start.")
    available_until: ColumnName = Field(
        None, description="Time from which an item is no longer offered. null in a row: no end."
    )
    stock: ColumnName = Field(
        None,
        description="Current stock of an item, a number or true/false: a saved model does not recommend items with 0, "
        "a negative number, or false. null in a row: available. Training and evaluation do not read it, because it "
        "says nothing about the past.",
    )

    @model_validator(mode="after")
    def _has_a_rule(self) -> EligibilityConfig:
        if not self.columns:
            raise ValueError("expected at least one of item_groups, available_from, available_until and stock")
        if self.query_group is not None and self.item_groups is None:
            raise ValueError("query_group needs item_groups, the groups in which an item is offered")
        return self

    @property
    def has_interval(self) -> bool:
        """Whether items are offered for a limited time."""
        return self.available_from is not None or self.available_until is not None

    @property
    def governs_rows(self) -> bool:
        """Whether the rule restricts the items of data rows; the stock does not, as only its current value is known."""
        return self.item_groups is not None or self.has_interval

    @property
    def columns(self) -> list[str]:
        """The columns of the item table that the rule reads."""
        every = (self.item_groups, self.available_from, self.available_until, self.stock)
        return [name for name in every if name is not None]


def _text_keys(values: object) -> object:
    return {str(key): value for key, value in values.items()} if isinstance(values, dict) else values


class EventsConfig(Section):
    """Event types in one model: the type sets the weight of a training row, and is an input of the query tower."""

    column: ColumnName = Field(description="Column of the interactions with the type of each row.")
    weights: Annotated[dict[str, PositiveFloat] | None, BeforeValidator(_text_keys)] = Field(
        None,
        min_length=1,
        description="Weight of each type; it multiplies a row's weight. null: weight 1 for every type in the data.",
    )
    default: ColumnName = Field(
        None, description="Type of a request that names none. null: the first type with the largest weight."
    )
    held_out: ColumnName = Field(
        None,
        description="Use only rows of this type for validation and test. null: all types; a query is then evaluated "
        "once for each type, and the table has the metrics by type.",
    )

    @model_validator(mode="after")
    def _names_known_types(self) -> EventsConfig:
        if self.column is None:
            raise ValueError("column: expected the name of a column")
        for name in ("default", "held_out"):
            value = getattr(self, name)
            if value is not None and self.weights is not None and value not in self.weights:
                raise ValueError(f"{name}: {value!r} has no weight in weights")
        return self

    @property
    def asked(self) -> str:
        """The event type of a request that names none; `weights` must be filled in."""
        assert self.weights is not None
        return self.default or max(self.weights, key=self.weights.__getitem__)


Fraction = Annotated[float, Field(gt=0, lt=1)]


class FeedbackConfig(Section):
    """The items that were shown with a training row and passed over; `objective.feedback` learns from them.

    They come from a file of impressions, from a list column of the interactions, or, without either, from the rows
    below `data.positive_label`. Without `request`, a row gets the earlier feedback of its query.
    """

    file: FilePath | None = Field(
        None, description="Table of impressions, one row per item shown. Its rows become observed negatives."
    )
    columns: ColumnsConfig = Field(
        ColumnsConfig(),
        description="Columns of the file: query, item, timestamp and label (the outcome). Without a label, every item "
        "shown counts as passed over, except the training items of its query. If texts are the queries, the query is a "
        "text in the column data.query_text.",
    )
    passed_over: float | list[str] | dict[str, NonNegativeFloat] = Field(
        1.0,
        description="Outcomes that mean an item was passed over: a number (every outcome below it), a list of values "
        "such as [skip, dislike], or values with weights, {skip: 1, report: 5}, which multiply "
        "objective.feedback.weight.",
    )
    column: str | None = Field(
        None,
        description="Column of the interactions with the items shown along with the positive, or its hard negatives: a "
        "list, or ids separated by spaces, commas or |, best position first.",
    )
    request: str | None = Field(
        None, description="Column with the request id, in the interactions and in the file, used to join them."
    )
    window: PositiveFloat | None = Field(
        None, description="Use feedback from at most this many days before a row. null: all feedback before it."
    )
    length: PositiveInt = Field(
        20, le=1000, description="Maximum number of items per row: the newest, or the first of a list column."
    )


class WeightsConfig(Section):
    """Weights of the training rows from a column, such as dwell time or watch share."""

    column: str = Field(description="Column of the interactions with non-negative numbers.", min_length=1)
    rule: Literal["log1p", "cap", "quantile", "none"] = Field(
        "log1p",
        description="Weight of a row with value x. log1p: log(1 + x). cap: min(x, cap). quantile: the share of "
        "training rows with at most x, in steps of 1 %. none: x.",
    )
    cap: PositiveFloat | None = Field(None, description="Largest weight. Only with rule: cap.")

    @model_validator(mode="after")
    def _cap_belongs_to_its_rule(self) -> Self:
        if (self.cap is None) == (self.rule == "cap"):
            raise ValueError("cap: expected a number with rule: cap, and none with the other rules")
        return self


class DataConfig(Section):
    """The data to read and how to split it."""

    items: FilePath | None = Field(None, description="Table of item features and titles, joined by item id.")
    queries: FilePath | None = Field(None, description="Table of query features, joined by query id.")
    columns: ColumnsConfig = ColumnsConfig()
    item_columns: ItemColumnsConfig = ItemColumnsConfig()
    query_columns: QueryColumnsConfig = QueryColumnsConfig()
    catalog: Literal["interactions", "table"] = Field(
        "interactions", description="table: items that occur only in the item table are in the catalog too."
    )
    query_text: ColumnName = Field(
        None,
        description="Column of the interactions with the text of the query. With data.columns.query, a row has a query "
        "id and a text, which the query tower reads as context. Without it, the distinct texts are the queries, which "
        "the query tower reads as a feature; the defaults are then data.split=held-out-queries, "
        "query_tower.history=null, and evaluation.exclude_seen=false if split by time or held-out queries.",
    )
    query_ids: Literal["vocabulary", "codes"] | HashedConfig = Field(
        "vocabulary",
        description="codes: ids are already 0, 1, 2, ... {hashed: R}: hash ids to R rows, without a vocabulary.",
    )
    item_ids: Literal["vocabulary", "codes"] = Field(
        "vocabulary", description="codes: ids are already 0, 1, 2, ...; N is the largest plus one."
    )
    workers: PositiveInt | None = Field(
        None, description="Number of processes that read the shards of a folder. null: one per core."
    )
    positive_label: float | None = Field(
        None,
        description="Rows with a label below this are observed negatives, not positives. null: all are positives. Only "
        "objective.feedback and logistic-observed learn dislikes from them; in a softmax, the source `observed` only "
        "lowers the spread of the estimate.",
    )
    feedback: FeedbackConfig = FeedbackConfig()
    weights: WeightsConfig | None = None
    recency_half_life: PositiveFloat | None = Field(
        None,
        description="Days after which the weight of a training row is halved: 2^(-age/half-life), with the age counted "
        "from the newest training row. null: rows do not age.",
    )
    eligibility: EligibilityConfig | None = Field(
        None,
        description="One rule for the items that may be offered to a row or a request, in training, evaluation and "
        "serving. null: every item, always.",
    )
    events: EventsConfig | None = Field(
        None, description="The column with event types, and their weights. null: all rows have the same type."
    )
    split: Literal["time", "random", "leave-last-out", "held-out-queries"] = Field(
        "time",
        description="time: hold out everything after a date. random: hold out random items of each query, for data "
        "without timestamps. leave-last-out: hold out each query's last item. held-out-queries: hold out whole "
        "queries. Not used if the data comes as train, validation and test files.",
    )
    windows: PositiveInt = Field(
        1,
        description="Number of consecutive test windows (split by time). For each window, a model is trained on the "
        "rows before it and tested on it. The last window has the test queries of the split, and its model is saved.",
    )
    validation: Fraction | FilePath = Field(
        0.05, description="Fraction for validation (time, random, held-out-queries), or the validation file."
    )
    test: Fraction | FilePath = Field(
        0.1,
        description="Fraction for the test (time, random, held-out-queries), or the test file; the data is then the "
        "training file.",
    )
    validation_queries: int | float | str | None = Field(
        None,
        description="leave-last-out: queries with a validation item: all (null), a number, a fraction, or a boolean "
        "column of the query table.",
    )

    @property
    def texts_are_queries(self) -> bool:
        """Whether the distinct texts of `query_text` are the queries; else a row's text is a part of its context."""
        return self.query_text is not None and self.columns.query in (None, self.query_text)

    @model_validator(mode="after")
    def _has_texts_for_queries(self) -> Self:
        if self.query_text is not None and self.columns.item == self.query_text:
            raise ValueError(f"query_text: {self.query_text!r} is the column of the items")
        if self.texts_are_queries and self.query_ids != "vocabulary":
            raise ValueError(
                "query_text: without data.columns.query the texts are the queries; expected query_ids: vocabulary"
            )
        return self


class StreamingConfig(Section):
    """Settings of a frequency estimated from the batches; see `StreamingFrequency`."""

    rate: float = Field(0.05, gt=0, le=1, description="Weight of one new gap: about 1/rate occurrences are averaged.")
    patience: float = Field(
        5.0, gt=0, description="Number of mean gaps without the item after which its frequency decays."
    )


class FeedbackTermConfig(Section):
    """The term of a softmax objective for the items that were shown with a row and passed over (`data.feedback`)."""

    weight: float = Field(ge=0, description="w. 0: nothing is learned from the items passed over.")
    form: Literal["softmax", "logistic", "pairwise"] = Field(
        "softmax",
        description="softmax: an item passed over counts 1 + w times in the partition sum. logistic, pairwise: w times "
        "a binary or pairwise loss on the row's own items is added.",
    )


class GuardConfig(Section):
    """A guard against false negatives: a fixed text model masks candidates that fit a query as well as its positive."""

    model: str | None = Field(
        None,
        min_length=1,
        description="Name or folder of a sentence-transformers model, whose weights are not trained. null: the "
        "pretrained model of the items' text features.",
    )
    query: ColumnName = Field(
        None,
        description="Column of the query table with the text. null: data.query_text, or the text feature of the query "
        "tower.",
    )
    items: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Columns of the item table with the text, joined by spaces. null: the items' text features.",
    )
    query_prompt: str | None = Field(
        None, max_length=1000, description="Prefix added to each query. null: the prompt of this column's text feature."
    )
    item_prompt: str | None = Field(
        None, max_length=1000, description="Prefix added to each item. null: the prompt of this column's text feature."
    )
    margin: NonNegativeFloat = Field(
        0.0, description="Mask a candidate if its cosine with the query is at least the positive's cosine minus this."
    )
    relative_margin: NonNegativeFloat = Field(
        0.0, description="The margin as a share of the positive's cosine; the lower of the two limits applies."
    )


class ObjectiveConfig(Section):
    """The objective and its sources of candidates. docs/objectives.md describes each one."""

    name: str = Field("expected-count", description="The name of the objective.")
    sources: list[dict[str, dict[str, Any] | None]] | None = Field(
        None,
        description="Sources of candidates, each a name with its settings. null: the objective's default. Items of the "
        "sources `observed`, `mined` and `head` are always included. In a softmax they count once, like all items: "
        "this lowers the spread of the estimate, but a softmax does not learn dislikes from them. `mined` can have a "
        "rank window, score limits, and random draws: {mined: {size: 5, ranks: [10, 100], sampling: random, "
        "margin: 0.05}}.",
    )
    unique: bool | None = Field(
        None, description="Remove duplicate candidates across all sources. null: the objective's default."
    )
    strength: float = Field(1.0, ge=0, le=1, description="Scales log kappa: 0 is no correction, 1 the full correction.")
    mask_known_positives: bool | None = Field(
        None,
        description="Mask the other training items of each row's query among its candidates. null: the objective's "
        "default; `twotower compare` masks for all objectives if one of them masks.",
    )
    rows_per_draw: PositiveInt | None = Field(
        None, description="Number of rows that share one draw of candidates. null: all rows of the batch share one."
    )
    frequency: (
        Literal["counted", "streaming", "grouped", "grouped-streaming"]
        | Annotated[dict[Literal["streaming", "grouped-streaming"], StreamingConfig], Field(min_length=1, max_length=1)]
    ) = Field(
        "counted",
        description="How p_j is estimated. grouped: within data.columns.group; each batch then comes from one group. "
        "{streaming: {rate: 0.02}}: streaming with settings.",
    )
    feedback: FeedbackTermConfig | None = None
    guard: GuardConfig | None = None
    negatives: int = Field(64, ge=1, description="K of the binary objectives: negatives per row.")
    bias: bool = Field(True, description="Binary objectives: learn a bias that is added to all logits.")
    calibration: float = Field(
        0.75, ge=0, le=1, description="t of gbce: 0 is plain binary cross-entropy, 1 is fully calibrated."
    )
    temperature: PositiveFloat | Literal["learned"] = Field(
        "learned", description="Divides the score before the correction. learned: starts at initial_temperature."
    )
    initial_temperature: float = Field(0.1, gt=0)
    similarity: Literal["cosine", "dot"] = "cosine"

    @property
    def frequency_name(self) -> str:
        """The name of the frequency, without its settings."""
        return self.frequency if isinstance(self.frequency, str) else next(iter(self.frequency))

    @property
    def streaming(self) -> StreamingConfig:
        """The settings of a streaming frequency."""
        return StreamingConfig() if isinstance(self.frequency, str) else next(iter(self.frequency.values()))

    @property
    def is_grouped(self) -> bool:
        """Whether frequencies are counted within groups and each batch contains a single group."""
        return self.frequency_name.startswith("grouped")


#: Placement of an id table over several processes.
TablePlacement = Literal["auto", "replicated", "row-wise", "table-wise"]


class TrainingConfig(Section):
    """How the model is trained."""

    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="B. auto: 1024, or smaller (at least 64) if an epoch would have fewer than 50 steps."
    )
    max_epochs: int = Field(
        30, ge=1, description="Maximum number of epochs; the learning rate follows a cosine over them."
    )
    learning_rate: float = Field(2e-3, gt=0)
    encoder_learning_rate: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="Learning rate of text encoders (`train` of a text feature). auto: 2e-5 for full, 2e-4 for lora.",
    )
    weight_decay: float = Field(0.01, ge=0)
    table_optimizer: Literal["adam", "rowwise-adagrad"] = Field(
        "adam",
        description="Optimizer of the embedding tables. rowwise-adagrad: one number of state per row instead of 2 D.",
    )
    table_placement: TablePlacement | dict[str, TablePlacement] = Field(
        "auto",
        description="With several processes: each has a full copy of the id tables (replicated), a part of their rows "
        "(row-wise), or whole tables (table-wise, TorchRec only). Per table: {item: row-wise, query: table-wise}. "
        "auto: sharded if full copies need more than half of the memory free for a process, else replicated.",
    )
    table_engine: Literal["auto", "torchrec", "builtin"] = Field(
        "auto",
        description="Implementation of sharded id tables. builtin: by rows, with any table_optimizer. "
        "torchrec: TorchRec (extra distributed), with rowwise-adagrad only. auto: torchrec on CUDA if it supports the "
        "settings, and for table-wise; otherwise builtin, which is faster on a CPU.",
    )
    table_learning_rate_factor: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Ratio of the tables' learning rate to the layers'. auto: 1 for adam, 10 otherwise."
    )
    warmup_steps: NonNegativeInt | Literal["auto"] = Field("auto", description="auto: 100, or one epoch if shorter.")
    patience: int = Field(5, ge=1, description="Stop after this many validations without an improvement.")
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    metric: Annotated[
        str, matching(r"(Recall|NDCG|MRR|HR)@[1-9]\d*", "Recall, NDCG, MRR or HR at K, such as NDCG@10")
    ] = Field("NDCG@10", description="Validation metric of early stopping: Recall@K, NDCG@K, MRR@K or HR@K.")
    seed: int = Field(0, ge=0)
    question: Literal["auto", "next", "horizon", "set"] = Field(
        "auto",
        description="What a training row predicts. next: the next item, from all earlier ones. horizon: all items "
        "within a span of time after a cut. set: a random part of a query's items, from the others. auto: next for "
        "leave-last-out, held-out queries with timestamps, sequence towers, groups, event types, and query texts "
        "(unless they are the queries and have a history); horizon for other splits by time; set for all others, or "
        "next if the query tower reads features and more than half of the rows are the only row of their query.",
    )
    horizon: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Days after the cut (horizon). auto: the longer of the test and validation spans."
    )
    hidden_share: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Probability that an item is hidden and predicted (set). 1: all items of a query, for towers "
        "without a history.",
    )
    question_weight: float = Field(
        0.5,
        ge=0,
        le=1,
        description="a: a question with m targets counts m^a times.",
    )
    start: Literal["auto", "random", "linear"] = Field(
        "auto",
        description="Initial weights. linear: the item-item matrix of EASE, truncated to rank D; for more than 20,000 "
        "items, singular vectors of the scaled training matrix. auto: linear if the towers can express it; "
        "text similarity if each tower is one linear map and both read texts with the same sentence model.",
    )
    start_ridge: PositiveFloat | Literal["auto"] = Field(
        "auto",
        description="Ridge penalty of the linear start. auto: 1, 2, 5 or 10 times the mean number of rows per item, "
        "chosen on the validation queries.",
    )
    start_ranks: list[Annotated[int, Field(ge=1, le=64)]] | None = Field(
        None,
        min_length=1,
        max_length=16,
        description="Multiples of item_tower.dimension to try, on the validation queries, as the rank of a linear "
        "start (up to 20,000 items); D becomes the smallest rank within one standard error of the best. "
        "null: [1, 2, 4] if neither D nor any other setting of the towers is set, else [1].",
    )
    recent_prior: bool = Field(
        True,
        description="Add a term to each item's score for how much more frequent it is now than in all training rows. "
        "Half-life and strength are chosen on the validation queries. Left out if it does not help, or if the split is "
        "not by time.",
    )
    refit: bool = Field(
        False,
        description="After the validated run, train on all rows with the same settings, seed and number of epochs, and "
        "save that model. The metrics are still those of the validated model, which is kept in `validated/`.",
    )
    replay: float = Field(
        1.0, ge=0, le=100, description="When training continues on new data (--from): old rows replayed per new row."
    )
    accelerator: str = Field("auto", description="auto, cpu, gpu, ... as in Lightning.")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    checkpoint_every: PositiveInt | None = Field(
        None, description="Steps between checkpoints to resume from. null: at the end of each epoch."
    )
    checkpoint_in_background: bool | Literal["auto"] = Field(
        "auto",
        description="Write checkpoints from a copy of the state while training continues. auto: if the copy takes no "
        "more than half of the memory that training leaves free.",
    )
    exchange_timeout: PositiveInt = Field(
        600, description="With several processes: seconds that a process waits for the others before it fails."
    )
    weight_average: float = Field(
        0.0, ge=0, lt=1, description="Decay of a moving average of the weights, which is evaluated and saved. 0: none."
    )
    micro_batch: PositiveInt | None = Field(
        None,
        description="Number of rows embedded at a time, in two passes, to save memory; same gradients. null: all rows.",
    )
    time_limit: Annotated[str, matching(r"\d\d:\d\d:\d\d:\d\d", "DD:HH:MM:SS, such as 00:12:00:00")] | None = Field(
        None, description="DD:HH:MM:SS. null: no limit."
    )
    logger: Literal["csv", "tensorboard", "mlflow", "none"] = Field(
        "csv", description="Where to log loss, metrics and diagnostics: files in logs/, TensorBoard, MLflow or nowhere."
    )


class ExposureConfig(Section):
    """The columns that describe what was shown in the test window, used to estimate the reward of a ranking."""

    propensity: ColumnName = Field(
        None,
        description="Probability with which the row's item was chosen, in (0, 1]. null, with a position: the "
        "item's share of its query's rows.",
    )
    position: ColumnName = Field(None, description="Position at which the item was shown, from 1.")
    examination: PositiveFloat | list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None,
        description="Probability that a user looks at each position, as a list, or e for position^-e. Needs position.",
    )
    reward: ColumnName = Field(
        None, description="Reward of the row. null: 1 for positives, 0 for rows below data.positive_label."
    )
    clip: PositiveFloat | None = Field(
        None, description="Largest weight; larger ones are clipped, which biases the estimates. null: no limit."
    )

    @model_validator(mode="after")
    def _describes_the_policy(self) -> ExposureConfig:
        if self.propensity is None and self.position is None:
            raise ValueError("expected a column: propensity, or position with examination")
        if (self.position is None) != (self.examination is None):
            raise ValueError("position and examination are needed together")
        return self


class EvaluationConfig(Section):
    """The evaluation after training."""

    ks: list[Annotated[int, Field(ge=1)]] = Field([10, 20], min_length=1, description="Cut-offs K.")
    exclude_seen: bool = Field(True, description="Exclude items in the query's history from the ranking.")
    baselines: bool | list[Literal["popularity", "newest", "item-kNN", "EASE"]] = Field(
        True,
        description="Also evaluate simple methods, in the same table: popularity, newest (popularity in the newest "
        "rows), item-kNN and EASE, with settings chosen on the validation queries. A list names some of them; "
        "false: none.",
    )
    slices: list[str] = Field(
        [], description="Columns to slice by: items.COLUMN of the item table, queries.COLUMN of the query table."
    )
    exposure: ExposureConfig | None = Field(
        None, description="Columns used to estimate the reward of each ranking from logged data. null: no estimate."
    )


def _objective_by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Config(Section):
    """All settings of a run, with defaults meant to work well on most data."""

    data: DataConfig = DataConfig()
    query_tower: QueryTowerConfig = QueryTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    objective: Annotated[ObjectiveConfig, BeforeValidator(_objective_by_name)] = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="before")
    @classmethod
    def _reads_query_text(cls, values: object) -> object:
        return with_query_text(values) if isinstance(values, dict) else values

    @model_validator(mode="after")
    def _reads_text_on_one_side(self) -> Self:
        column, tower = self.data.query_text, self.query_tower
        sides = {"features": tower.features, "context": tower.context}
        wrong, right = ("context", "features") if self.data.texts_are_queries else ("features", "context")
        if column is not None and any(one.column == column for one in sides[wrong] if not isinstance(one, str)):
            why = "the texts are the queries" if wrong == "context" else "a text belongs to a row, not to a query id"
            raise ValueError(f"query_tower.{wrong}: {column!r} is data.query_text: {why}; use query_tower.{right}")
        return self

    @model_validator(mode="after")
    def _weighs_a_known_number_of_widths(self) -> Config:
        if self.item_tower.nested_weights is not None and (self.training.start_ranks or [1]) != [1]:
            raise ValueError(
                "item_tower.nested_weights: training.start_ranks may change D and with it the number of widths; set "
                "start_ranks to [1], or nested_weights to null"
            )
        return self

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        overrides: list[str] | None = None,
        *,
        base: dict[str, Any] | None = None,
    ) -> Config:
        """Read a YAML file or a preset, and apply overrides such as "training.max_epochs=3".

        Without a file, the settings start from `base`, for example the settings of a saved model.

        Raises:
            InputError: the file is missing or not YAML, or a field is unknown or out of range; the message says which.
        """
        values: dict[str, Any] = copy.deepcopy(base) if base else {}
        where = "--set" if overrides else "configuration"
        if path is not None:
            where = str(path)
            values = _read_yaml(_found(Path(path)))
        for override in overrides or []:
            _apply(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise InputError(f"{where}: {first_fault(error, values, cls)}") from error

    @property
    def history_length(self) -> int:
        """The history length L of the query tower; 0 if the tower reads no history."""
        return self.query_tower.history.length if self.query_tower.history else 0

    @property
    def reads_sequences(self) -> bool:
        """Whether the training rows are positions of whole sequences."""
        return self.query_tower.history is not None and self.query_tower.history.sequence is not None

    @property
    def reads_gaps(self) -> bool:
        """Whether the query tower reads the time between the items of a history."""
        history = self.query_tower.history
        return history is not None and history.sequence is not None and history.sequence.gaps

    @property
    def reads_feedback(self) -> bool:
        """Whether the objective learns from the items that were shown with a row and passed over."""
        return self.objective.feedback is not None and self.objective.feedback.weight > 0

    @property
    def row_columns(self) -> tuple[str, ...]:
        """The columns of the interactions that the run reads for its rows, in addition to the context."""
        feedback = (self.data.feedback.column, self.data.feedback.request) if self.reads_feedback else ()
        weights = () if self.data.weights is None else (self.data.weights.column,)
        return tuple(dict.fromkeys(name for name in (*feedback, *weights) if name is not None))

    def resolved(self, rows: int) -> Config:
        """Replace "auto" for batch size, warm-up and table learning rate with its value for this number of rows."""
        training = self.training
        batch = min(max(rows // 50, 64), 1024) if training.batch_size == "auto" else training.batch_size
        warmup = min(100, max(rows // batch, 1)) if training.warmup_steps == "auto" else training.warmup_steps
        factor = training.table_learning_rate_factor
        if factor == "auto":
            factor = 1.0 if training.table_optimizer == "adam" else 10.0
        changed = training.model_copy(
            update={"batch_size": batch, "warmup_steps": warmup, "table_learning_rate_factor": factor}
        )
        return self.model_copy(update={"training": changed})

    def to_yaml(self) -> str:
        """Format the whole configuration as YAML, from which `Config.load` restores an equal configuration."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def _found(path: Path) -> Path:
    """Find the file or the preset with this name."""
    if path.suffix or len(path.parts) > 1 or path.exists():
        return path
    presets = Path(__file__).parent / "presets"
    preset = presets / f"{path}.yaml"
    if not preset.is_file():
        known = ", ".join(sorted(found.stem for found in presets.glob("*.yaml")))
        raise InputError(f"{path}: no configuration file or preset with this name; presets: {known}")
    return preset


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise InputError(f"{path}: no such configuration file")
    values = read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected sections such as `training:`, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"--set {override}: expected section.key=value, such as training.max_epochs=3")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override:.200}: the value is not valid YAML") from error
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "objective":  # `objective: NAME` followed by objective.strength=...
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: {section} is a value, not a section")
        values = inner
    if value is None and sections == ["data", "columns"]:  # in settings files, null means "find the column by its name"
        value = "none"
    values[last] = value
