"""The settings of a run as pydantic models: pure data, builds nothing.

Three kinds of setting are kept apart: what the model is (`query_tower`, `item_tower`, `objective`), what a run does
(`data`, `training`, `evaluation`), and live state, which is not here but in the checkpoint.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError

from twotower.config_errors import first_fault
from twotower.errors import InputError
from twotower.feature_config import Section
from twotower.tower_config import HistoryConfig, ItemTowerConfig, QueryTowerConfig, SequenceConfig

__all__ = [
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "HashedConfig",
    "HistoryConfig",
    "ItemTowerConfig",
    "ObjectiveConfig",
    "QueryTowerConfig",
    "SequenceConfig",
    "TrainingConfig",
]


class ColumnsConfig(Section):
    """Which column is what; a name left out is found by its usual names (user_id, item_id, timestamp, ...)."""

    query: str | None = None
    item: str | None = None
    timestamp: str | None = None
    weight: str | None = None
    label: str | None = None
    group: str | None = None


class HashedConfig(Section):
    """Ids are hashed to rows, without a list of them."""

    hashed: int = Field(ge=2, le=2**31 - 1, description="R: ids that share a row are the same to the model.")


class DataConfig(Section):
    """What is read and how it is split."""

    items: str | None = Field(None, description="Table of item features and titles, joined by item id.")
    queries: str | None = Field(None, description="Table of query features, joined by query id.")
    columns: ColumnsConfig = ColumnsConfig()
    catalog: Literal["interactions", "table"] = Field(
        "interactions", description="table: items that stand only in the item table are in the catalog as well."
    )
    query_ids: Literal["vocabulary", "codes"] | HashedConfig = Field(
        "vocabulary", description="codes: ids are 0, 1, 2, ... already. {hashed: R}: to R rows, without a vocabulary."
    )
    item_ids: Literal["vocabulary", "codes"] = Field(
        "vocabulary", description="codes: ids are 0, 1, 2, ... already, N is the largest and one."
    )
    workers: PositiveInt | None = Field(
        None, description="Processes that read the shards of a folder. None: one for each core."
    )
    positive_label: float | None = Field(
        None, description="Rows with a label below this are observed negatives, not positives. None: all are positives."
    )
    split: Literal["time", "leave-last-out", "held-out-queries"] = Field(
        "time", description="time: everything after a date is the future. leave-last-out: each query's last item."
    )
    validation: float = Field(0.05, gt=0, lt=1, description="Share for validation (time, held-out-queries).")
    test: float = Field(0.1, gt=0, lt=1, description="Share for the test (time, held-out-queries).")
    validation_queries: int | float | str | None = Field(
        None, description="leave-last-out: who gives a validation item: all (None), a number, a share, a query column."
    )


class ObjectiveConfig(Section):
    """What is minimised, and where its candidates come from. docs/objectives.md tells about each name."""

    name: str = Field("expected-count", description="The name of the objective.")
    sources: list[dict[str, dict[str, Any] | None]] | None = Field(
        None, description="Sources of candidates, each one name with its settings; None: the objective's own."
    )
    unique: bool | None = Field(None, description="Remove duplicates over all sources; None: as the objective says.")
    strength: float = Field(1.0, ge=0, le=1, description="Scales log kappa: 0 no correction, 1 all of it.")
    mask_known_positives: bool | None = Field(
        None, description="Never push a row away from any of its query's training items; None: as the objective says."
    )
    rows_per_draw: PositiveInt | None = Field(
        None, description="Rows that share one draw of candidates; a batch then has several. None: the whole batch."
    )
    frequency: Literal["counted", "streaming", "grouped", "grouped-streaming"] = Field(
        "counted", description="Where p_j comes from. grouped: within data.columns.group; batches are built within it."
    )
    negatives: int = Field(64, ge=1, description="K of the binary objectives: negatives for each row.")
    calibration: float = Field(0.75, ge=0, le=1, description="t of gbce.")
    temperature: PositiveFloat | Literal["learned"] = Field(
        "learned", description="Divides the score before the correction. learned: starts at initial_temperature."
    )
    initial_temperature: float = Field(0.1, gt=0)
    similarity: Literal["cosine", "dot"] = "cosine"


#: Where an id table goes over several processes.
TablePlacement = Literal["auto", "replicated", "row-wise", "column-wise", "table-wise"]


class TrainingConfig(Section):
    """How the model is fitted."""

    batch_size: PositiveInt | Literal["auto"] = Field(
        "auto", description="B. auto: 1024, or less where the data would give fewer than 50 steps an epoch."
    )
    max_epochs: int = Field(30, ge=1, description="The learning rate falls along a cosine over so many epochs.")
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    table_optimizer: Literal["adam", "rowwise-adagrad"] = Field(
        "adam", description="How embedding tables move. rowwise-adagrad: one number of state for each row, not 2 D."
    )
    table_placement: TablePlacement | dict[str, TablePlacement] = Field(
        "auto",
        description="Several processes: id tables whole on each (replicated), some of their rows (row-wise) or columns "
        "(column-wise) on each, or each table on one (table-wise); or one for each table: {item: row-wise, query: "
        "table-wise}. auto: row-wise where whole ones need more than half of a process's memory.",
    )
    table_learning_rate_factor: PositiveFloat | Literal["auto"] = Field(
        "auto", description="Learning rate of the tables over that of the layers. auto: 1 for adam, 10 otherwise."
    )
    warmup_steps: NonNegativeInt | Literal["auto"] = Field("auto", description="auto: 100, or one epoch if shorter.")
    patience: int = Field(5, ge=1, description="Stop after so many validations without an improvement.")
    validate_every: int = Field(1, ge=1, description="Epochs between validations.")
    metric: str = Field("NDCG@10", pattern=r"^(Recall|NDCG|MRR|HR)@[1-9]\d*$", description="What early stopping sees.")
    seed: int = Field(0, ge=0)
    replay: float = Field(
        1.0, ge=0, le=100, description="Continuing on new days (--from): rows of the model's past for each new row."
    )
    accelerator: str = Field("auto", description="auto, cpu, gpu, ... as in Lightning.")
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    checkpoint_every: PositiveInt | None = Field(
        None, description="Steps between checkpoints to go on from after a fault. None: at the end of each epoch."
    )
    checkpoint_in_background: bool | Literal["auto"] = Field(
        "auto",
        description="Write checkpoints from a copy of the state while training goes on. auto: where the copy takes no "
        "more than half of the memory that the training leaves.",
    )
    exchange_timeout: PositiveInt = Field(
        600, description="Several processes: seconds that one waits for the others before it gives up."
    )
    weight_average: float = Field(
        0.0, ge=0, lt=1, description="Decay of a moving average of the weights, which is measured and kept. 0: none."
    )
    micro_batch: PositiveInt | None = Field(
        None, description="Rows the towers embed at a time, twice, for less memory; same gradients. None: all at once."
    )
    time_limit: str | None = Field(None, pattern=r"^\d\d:\d\d:\d\d:\d\d$", description="DD:HH:MM:SS, or none.")
    logger: Literal["csv", "tensorboard", "mlflow", "none"] = Field(
        "csv", description="Where loss, metrics and diagnostics go: a file in logs/, TensorBoard, MLflow, nowhere."
    )


class EvaluationConfig(Section):
    """What is measured after training."""

    ks: list[Annotated[int, Field(ge=1)]] = Field([10, 20], min_length=1, description="Cut-offs K.")
    exclude_seen: bool = Field(True, description="Never rank what already stands in the query's history.")
    baselines: bool = Field(True, description="Popularity and item-kNN in the same table.")
    slices: list[str] = Field(
        [], description="Columns to slice by: items.COLUMN of the item table, queries.COLUMN of the query table."
    )


def _objective_by_name(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Config(Section):
    """Everything that a run can be told; the defaults are meant to be good on most data."""

    data: DataConfig = DataConfig()
    query_tower: QueryTowerConfig = QueryTowerConfig()
    item_tower: ItemTowerConfig = ItemTowerConfig()
    objective: Annotated[ObjectiveConfig, BeforeValidator(_objective_by_name)] = ObjectiveConfig()
    training: TrainingConfig = TrainingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @classmethod
    def load(
        cls,
        path: str | Path | None = None,
        overrides: list[str] | None = None,
        *,
        base: dict[str, Any] | None = None,
    ) -> Config:
        """Read a YAML file, or a preset by its name, and apply overrides such as "training.max_epochs=3".

        `base` is what stands there without a file, such as the settings of a saved model.

        Raises:
            InputError: the file is missing or not YAML, or a field is unknown or out of range; the message names it.
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

    def resolved(self, rows: int) -> Config:
        """The same settings with every "auto" replaced by the number it means for so many training rows."""
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
        """The whole configuration as YAML; `Config.load` reads it back to an equal one."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return text


def _found(path: Path) -> Path:
    """The file itself, or the preset of that name."""
    if path.suffix or len(path.parts) > 1 or path.exists():
        return path
    presets = Path(__file__).parent / "presets"
    preset = presets / f"{path}.yaml"
    if not preset.is_file():
        known = ", ".join(sorted(found.stem for found in presets.glob("*.yaml")))
        raise InputError(f"{path}: no such configuration file, and no preset of that name; presets: {known}")
    return preset


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such configuration file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
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
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"--set {override}: the value is not valid YAML") from error
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if isinstance(inner, str) and section == "objective":  # `objective: NAME` followed by objective.strength=...
            inner = values[section] = {"name": inner}
        if not isinstance(inner, dict):
            raise InputError(f"--set {override}: {section} is a value, not a section")
        values = inner
    values[last] = value
