"""A sweep: one numeric setting at several values, each trained and compared like an objective."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from twotower.comparison.statistics import ComparisonStatistics, MetricEstimate
from twotower.config.messages import number_or_text, parse_yaml
from twotower.config.run import Config, ObjectiveConfig
from twotower.errors import InputError
from twotower.objectives.build import named_objective

#: Maximum number of values of a sweep. Each value needs a training run for every objective and seed.
MOST_VALUES = 16
#: Settings that cannot be swept: they change the test queries or the metrics, or the comparison varies them already.
FIXED = ("data.", "evaluation.", "training.seed")


@dataclass(frozen=True)
class Sweep:
    """Values of one numeric setting.

    `objective.SOURCE` and `objective.sources.SOURCE` are the size of a source of candidates, and
    `objective.sources.SOURCE.OPTION` is another numeric option of that source. A source that the objective does not
    have is added; size 0 removes a source.

    Attributes:
        setting: the setting, such as "training.learning_rate" or "objective.uniform".
        values: the values, ascending.
    """

    setting: str
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """Parse the text of `--sweep`, such as "objective.uniform=0,256,1024".

        Raises:
            InputError: the text has the wrong form, a value is not a number or is given twice, there are too many
                values, or the setting cannot be swept.
        """
        setting, equals, listed = text.partition("=")
        setting, words = setting.strip(), [word.strip() for word in listed.split(",")]
        if not equals or "." not in setting:
            raise InputError(f"--sweep {text}: expected section.key=V1,V2,..., such as objective.uniform=0,256,1024")
        if any(setting.startswith(fixed) for fixed in FIXED):
            raise InputError(
                f"--sweep {setting}: all values are compared on the same data, test queries and seeds; choose a "
                "setting of query_tower, item_tower, objective or training"
            )
        values = []
        for word in words:
            try:
                value = number_or_text(parse_yaml(word))
            except yaml.YAMLError:
                value = None
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"--sweep {text}: {word!r} is not a number")
            values.append(value)
        if len(set(values)) < len(values):
            raise InputError(f"--sweep {text}: a value is given twice")
        if not 2 <= len(values) <= MOST_VALUES:
            raise InputError(f"--sweep {text}: expected 2 to {MOST_VALUES} values, found {len(values)}")
        return cls(setting, tuple(sorted(values)))

    @property
    def is_of_a_source(self) -> bool:
        """Whether the setting belongs to a source of candidates."""
        section, key = self.setting.split(".")[:2]
        return section == "objective" and (key == "sources" or key not in ObjectiveConfig.model_fields)

    def named(self, objective: str, value: float) -> str:
        """Return the name of a model in the comparison, such as "mixed@256"; its folder has the same name."""
        return f"{objective}@{value:g}" if isinstance(value, float) else f"{objective}@{value}"

    def apply(self, config: Config, value: float) -> Config:
        """Return the settings, with one value of the sweep applied.

        Raises:
            InputError: the setting does not exist or does not allow this number, or no source of candidates is left.
        """
        values = config.model_dump(mode="json")
        if self.is_of_a_source:
            keys = self.setting.removeprefix("objective.").removeprefix("sources.").split(".")
            if len(keys) > 2 or keys == ["sources"]:
                raise InputError(f"--sweep {self.setting}: expected objective.sources.SOURCE.OPTION")
            source, *option = keys
            values["objective"]["sources"] = self._sources(config.objective, source, (option or ["size"])[0], value)
            return Config.model_validate(values)
        try:
            return Config.load(None, [f"{self.setting}={value!r}"], base=values)
        except InputError as error:
            raise InputError(str(error).replace("--set", f"--sweep {self.setting}", 1)) from error

    def _sources(self, objective: ObjectiveConfig, name: str, option: str, value: float) -> list[dict[str, Any]]:
        """Return the sources of an objective with one option of one source changed."""
        sources = named_objective(objective.name).sources if objective.sources is None else objective.sources
        if any("catalog" in source for source in sources):
            raise InputError(
                f"--sweep {self.setting}: the objective includes every item (catalog), so other sources change "
                "nothing; choose an objective that samples, such as --objectives mixed"
            )
        changed: list[dict[str, Any]] = []
        removed = option == "size" and value == 0
        for source in sources:
            if name not in source:
                changed.append(source)
            elif not removed:
                changed.append({name: {**(source[name] or {}), option: value}})
        if not removed and all(name not in source for source in sources):
            changed.append({name: {option: value}})
        if not changed:
            raise InputError(f"--sweep {self.setting}={value}: no source of candidates is left; start above 0")
        return changed


def sweep_curves(
    sweep: Sweep,
    objectives: Sequence[str],
    compared: ComparisonStatistics,
    ranked: Mapping[str, NDArray[np.int32]],
    item_counts: NDArray[np.int64],
    *,
    k: int,
) -> dict[str, Any]:
    """Collect metrics of quality, tail and never-seen items at each value of the sweep, in JSON form.

    Args:
        sweep: the sweep.
        objectives: the objectives that were swept.
        compared: metrics of every model.
        ranked: the ranking of each model's first seed, int32 [E, >= k], padded with -1.
        item_counts: training interactions of each item, [N].
        k: K of the metrics.

    Returns:
        `setting`, `k`, `never_seen_items` (their number) and `curves`, each with an `objective` and its `points`. A
        point has `model`, `value`, and the means and intervals of `quality` (NDCG@K), `tail` (Recall@K of the targets
        in the tail) and `never_seen` (Recall@K of targets without a training row); each is None if there are no such
        targets. `never_seen_listed` is the share of list positions taken by never-seen items; an objective that never
        draws these items cannot rank them.
    """
    curves = []
    for objective in objectives:
        points = []
        for value in sweep.values:
            name = sweep.named(objective, value)
            slices = compared.slices[name]
            points.append(
                {
                    "model": name,
                    "value": value,
                    "quality": _estimate(compared.values[name].get(f"NDCG@{k}")),
                    "tail": _estimate(slices.get("tail", {}).get(f"Recall@{k}")),
                    "never_seen": _estimate(slices.get("cold items", {}).get(f"Recall@{k}")),
                    "never_seen_listed": _listed(ranked[name][:, :k], item_counts == 0),
                }
            )
        curves.append({"objective": objective, "points": points})
    return {
        "setting": sweep.setting,
        "k": k,
        "never_seen_items": int((item_counts == 0).sum()),
        "curves": curves,
    }


def _estimate(found: MetricEstimate | None) -> dict[str, Any] | None:
    if found is None or not math.isfinite(found.mean):
        return None
    return {"mean": found.mean, "low": found.low, "high": found.high, "by_seed": list(found.by_seed)}


def _listed(lists: NDArray[np.int32], is_unseen: NDArray[np.bool_]) -> float | None:
    places = lists[lists >= 0]
    return float(is_unseen[places].mean()) if len(places) else None
