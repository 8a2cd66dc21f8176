"""The cells of a comparison: one training run for each objective and seed, and its state on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from twotower.comparison.sweep import Sweep
from twotower.config.messages import read_yaml
from twotower.config.run import Config
from twotower.data import Split
from twotower.errors import InputError
from twotower.objectives.build import build_objective, masks_known_positives
from twotower.run.question import resolve_question
from twotower.run.settings import CONFIG, differences
from twotower.serving.model_folder import find_model, read_metadata
from twotower.training import LAST

#: Settings that do not affect the initial weights, the data or any training step.
FREE = ("evaluation", "training.logger")

State = Literal["finished", "interrupted", "new"]


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison: an objective and a seed.

    Attributes:
        name: name of the objective in the report.
        seed: seed of initial weights, row order and draws.
        config: the complete settings, without "auto".
        directory: the run folder.
        rows: number of training rows.
    """

    name: str
    seed: int
    config: Config
    directory: Path
    rows: int

    @property
    def label(self) -> str:
        """Name of the cell in progress messages."""
        return f"{self.name}, seed {self.seed}"

    def state(self, fingerprint: str) -> State:
        """Return whether the run is finished, interrupted or new.

        Args:
            fingerprint: fingerprint of the data.

        Raises:
            InputError: the run in the folder was trained with different settings or on different data.
        """
        written = self.directory / CONFIG
        finished = (self.directory / "results.json").exists()
        if not finished and not (self.directory / LAST).exists():
            return "new"
        # A setting added by a newer version gets its default here, which may be "auto".
        found = Config.load(written).resolved(self.rows)
        for field, (requested, existing) in differences(self.config, found, FREE).items():
            raise InputError(
                f"{written}: {field} is {existing!r}, but {requested!r} was requested; use the settings of the "
                "existing comparison, or choose another --out"
            )
        if finished:
            known = read_metadata(find_model(self.directory))["data"]["fingerprint"]
            if known != fingerprint:
                raise InputError(
                    f"{self.directory}: trained on different data (fingerprint {known[:12]}; the current data has "
                    f"{fingerprint[:12]}); choose another --out"
                )
            return "finished"
        return "interrupted"


def make_cells(
    base: Config, objectives: Sequence[str], seeds: int, out: Path, split: Split, *, sweep: Sweep | None = None
) -> list[Cell]:
    """Make the cells of a comparison, ordered by seed and then by objective.

    Args:
        base: the settings that all cells share; `training.seed` is the first seed.
        objectives: names, YAML files, or `name=FILE`. If empty (only with a sweep), the objective of `base`.
        seeds: number of seeds.
        out: the folder of the comparison.
        split: the data, which determines the training question and the default towers.
        sweep: the values that each objective is trained with; None for no sweep.

    Raises:
        InputError: an objective is unknown, named twice, or does not fit the data.
    """
    if base.training.refit:
        raise InputError(
            "training.refit: a refitted model was trained on the test rows, so it cannot be compared; compare without "
            "refit, then train the best objective with --refit"
        )
    own: dict[str, Any] = {"sources": None, "mask_known_positives": base.objective.mask_known_positives}
    if sweep is not None and not objectives:
        # Keep the objective of `base`, as `train` does. `resolve_question` may replace its sources with the catalog,
        # next to which the size of another source has no effect, so the sweep of a source restores them.
        objectives = [base.objective.name]
        own = {"sources": base.objective.sources} if sweep.is_of_a_source else {}
    elif base.objective.sources is not None or base.objective.unique is not None:
        raise InputError(
            "objective.sources, objective.unique: each compared objective has its own; to compare pools, write each to "
            "a YAML file and pass --objectives name=FILE.yaml,..."
        )
    train = split.train
    base = resolve_question(base, split)
    base = base.changed("objective", **own)
    named: dict[str, Config] = {}
    for text in objectives:
        plain, config = _objective(base, text)
        for name, changed in _swept(plain, config, sweep):
            if name in named:
                raise InputError(f"--objectives: {name} is named twice")
            named[name] = changed.resolved(len(train))
            build_objective(named[name], train)  # raise an error before anything is trained
    if base.objective.mask_known_positives is None:
        named = _masked_alike(named)
    if not named:
        raise InputError("--objectives: expected at least one name, such as expected-count,in-batch-logq")
    first = base.training.seed
    return [
        # The baselines are measured once for all cells.
        Cell(
            name,
            seed,
            config.changed("training", seed=seed).changed("evaluation", baselines=False),
            out / "runs" / f"{name}-{seed}",
            len(train),
        )
        for seed in range(first, first + seeds)
        for name, config in named.items()
    ]


def _masked_alike(named: dict[str, Config]) -> dict[str, Config]:
    """Mask known positives for all objectives if one of them does, so that only the objectives differ.

    An objective from a file that sets `mask_known_positives` keeps its setting.
    """
    if not any(masks_known_positives(config.objective) for config in named.values()):
        return named
    return {
        name: config
        if config.objective.mask_known_positives is not None
        else config.changed("objective", mask_known_positives=True)
        for name, config in named.items()
    }


def objective_names(objectives: Sequence[str], base: Config) -> list[str]:
    """Return the names of the objectives, without the values of a sweep."""
    return [_objective(base, text)[0] for text in objectives or [base.objective.name]]


def _swept(name: str, config: Config, sweep: Sweep | None) -> list[tuple[str, Config]]:
    if sweep is None:
        return [(name, config)]
    return [(sweep.named(name, value), sweep.apply(config, value)) for value in sweep.values]


def _objective(base: Config, text: str) -> tuple[str, Config]:
    name, equals, path = text.partition("=")
    if not equals:
        if not text.endswith((".yaml", ".yml")):
            return text, base.changed("objective", name=text)
        name, path = Path(text).stem, text
    if not name or set(name) & set("/\\ ") or name.startswith("."):
        raise InputError(f"--objectives: {name!r} is not a valid folder name; pass name=FILE.yaml")
    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        raise InputError(
            f"{path}: expected the fields of an objective, such as `name:`, found {json.dumps(values)[:40]}"
        )
    values = values.get("objective", values)
    changed = base.model_dump(mode="json")
    shared = {name: changed["objective"][name] for name in ("similarity", "temperature", "initial_temperature")}
    changed["objective"] = shared | ({"name": values} if isinstance(values, str) else values)
    try:
        return name, Config.model_validate(changed)
    except ValueError as error:
        first = str(error).splitlines()
        raise InputError(f"{path}: invalid settings of an objective: {' '.join(first[1:3])}") from error
