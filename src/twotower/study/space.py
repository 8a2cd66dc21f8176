"""The space of settings that a study searches: YAML, validated against the settings of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from twotower.config.features import Section
from twotower.config.messages import first_fault, number_or_text, parse_yaml, read_yaml
from twotower.config.run import Config
from twotower.errors import InputError

if TYPE_CHECKING:
    from optuna import Trial

#: Function that reads the settings of a run with additional overrides, each `section.key=value`.
Load = Callable[[list[str]], Config]


class Parameter(Section):
    """One parameter of the space: values of a setting, a range of numbers, or named options of several settings."""

    values: list[Any] | None = Field(None, min_length=2, description="Values of the setting; null leaves it as it is.")
    options: dict[str, dict[str, Any]] | None = Field(None, min_length=2, description="Settings by name of the option.")
    low: float | int | None = None
    high: float | int | None = None
    log: bool = Field(False, description="Draw uniformly on a logarithmic scale.")
    default: float | int | None = Field(None, description="The value of the range in the first trial.")
    when: dict[str, list[Any]] = Field(
        {}, description="Use the parameter only with these choices of earlier parameters."
    )

    @field_validator("options", mode="before")
    @classmethod
    def _no_null(cls, options: object) -> object:
        return {name: value or {} for name, value in options.items()} if isinstance(options, dict) else options

    @property
    def is_range(self) -> bool:
        """Whether the parameter is a range of numbers."""
        return self.values is None and self.options is None

    @property
    def is_whole(self) -> bool:
        """Whether the parameter is a range of whole numbers."""
        return isinstance(self.low, int) and isinstance(self.high, int) and isinstance(self.default, int)

    def choices(self) -> list[str]:
        """Return the names of values or options, the default first."""
        return list(self.options) if self.options is not None else [label(value) for value in self.values or ()]

    def fault(self) -> str | None:
        """Describe what is wrong with the parameter itself; return None if nothing is."""
        kinds = [self.values is not None, self.options is not None, self.low is not None or self.high is not None]
        if sum(kinds) != 1:
            return "expected a list of values, `options`, or a range `low`, `high`, `default`"
        if not self.is_range:
            repeats = len(set(self.choices())) < len(self.choices())
            return "a value occurs twice" if repeats else None
        low, high, default = self.low, self.high, self.default
        if low is None or high is None or default is None:
            return "a range needs `low`, `high` and `default`, the value of the first trial"
        if not low < high:
            return f"low: {low}, high: {high}; expected low < high"
        if not low <= default <= high:
            return f"default: {default}; expected a value from {low} to {high}"
        return f"low: {low}; a range with `log` must begin above 0" if self.log and low <= 0 else None


def label(value: object) -> str:
    """Return the name of a value in trials and reports."""
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Space:
    """A validated space.

    Attributes:
        text: the YAML text of the space.
        parameters: the parameters by name, in the order of the YAML.
    """

    text: str
    parameters: Mapping[str, Parameter]

    @classmethod
    def read(cls, path: Path, load: Load) -> Space:
        """Read a space and check each of its values with the settings of the run.

        Args:
            path: the YAML file.
            load: a function that reads the settings of the run with overrides.

        Raises:
            InputError: the file is missing or not a space, a setting does not exist, or a value is out of range.
        """
        found = read_yaml(path)
        if not isinstance(found, dict) or not found:
            raise InputError(f"{path}: expected parameters such as `item_tower.dimension: [32, 64]`")
        parameters = {str(name): _parameter(path, str(name), value) for name, value in found.items()}
        space = cls(path.read_text(encoding="utf-8"), parameters)
        for name in space.parameters:
            space._check(path, name, load)
        return space

    def _check(self, path: Path, name: str, load: Load) -> None:
        parameter = self.parameters[name]
        earlier = list(self.parameters)[: list(self.parameters).index(name)]
        for other, choices in parameter.when.items():
            if other not in earlier or self.parameters[other].is_range:
                raise InputError(f"{path}: {name}: when: {other} is not an earlier parameter with values or options")
            for choice in map(label, choices):
                if choice not in self.parameters[other].choices():
                    raise InputError(
                        f"{path}: {name}: when: {other} has no choice {choice}; its choices: "
                        f"{', '.join(self.parameters[other].choices())}"
                    )
        needed = [override for other, choices in parameter.when.items() for override in self._of(other, choices[0])]
        tried = [parameter.low, parameter.high, parameter.default] if parameter.is_range else parameter.choices()
        for value in tried:
            try:
                load([*needed, *self._of(name, value)])
            except InputError as error:
                raise InputError(f"{path}: {name}: {str(error).removeprefix('--set: ')}") from error

    def _of(self, name: str, choice: object) -> list[str]:
        """Return the overrides of one choice of a parameter, in the form of `--set`."""
        parameter = self.parameters[name]
        if parameter.options is not None:
            return [f"{key}={json.dumps(value)}" for key, value in parameter.options[str(choice)].items()]
        if parameter.values is not None:
            choice = next(value for value in parameter.values if label(value) == label(choice))
        return [] if choice is None else [f"{name}={json.dumps(choice)}"]

    def suggest(self, trial: Trial) -> list[str]:
        """Draw a trial's choices, and return their overrides."""
        return [override for name, choice in self._suggested(trial) for override in self._of(name, choice)]

    def changed(self, overrides: Sequence[str]) -> list[str]:
        """Return the overrides that the first trial does not have, for reports."""
        usual = {one for name, choice in (self.first() or {}).items() for one in self._of(name, choice)}
        return [one for one in overrides if one not in usual]

    def _suggested(self, trial: Trial) -> Iterator[tuple[str, Any]]:
        chosen: dict[str, Any] = {}
        for name, one in self.parameters.items():
            wanted = {other: {label(choice) for choice in choices} for other, choices in one.when.items()}
            if any(chosen.get(other) not in choices for other, choices in wanted.items()):
                continue
            if not one.is_range:
                chosen[name] = trial.suggest_categorical(name, one.choices())
            else:
                assert one.low is not None and one.high is not None
                if one.is_whole:
                    chosen[name] = trial.suggest_int(name, int(one.low), int(one.high), log=one.log)
                else:
                    chosen[name] = trial.suggest_float(name, one.low, one.high, log=one.log)
            yield name, chosen[name]

    def first(self, settings: Sequence[str] = ()) -> dict[str, Any] | None:
        """Return the default choices with some settings changed; None if the space does not contain a changed value.

        Args:
            settings: overrides such as "item_tower.dimension=256".
        """
        chosen = {name: one.default if one.is_range else one.choices()[0] for name, one in self.parameters.items()}
        for setting in settings:
            name, _, text = setting.partition("=")
            one, value = self.parameters.get(name), number_or_text(parse_yaml(text))
            if one is None or one.options is not None:
                return None
            if one.is_range:
                assert one.low is not None and one.high is not None
                if not isinstance(value, int | float) or not one.low <= value <= one.high:
                    return None
                chosen[name] = value
            elif label(value) in one.choices():
                chosen[name] = label(value)
            else:
                return None
        return chosen


def _parameter(path: Path, name: str, value: object) -> Parameter:
    given = {"values": value} if isinstance(value, list) else value
    if not isinstance(given, dict):
        raise InputError(f"{path}: {name}: expected a list of values, `options`, or a range, found {value!r}")
    try:
        parameter = Parameter.model_validate(given)
    except ValidationError as error:
        raise InputError(f"{path}: {name}: {first_fault(error, given, Parameter)}") from error
    if fault := parameter.fault():
        raise InputError(f"{path}: {name}: {fault}")
    return parameter


def packaged_space(question: str) -> Path:
    """Return the file of the default space for a training question: "next", "horizon" or "set"."""
    return Path(__file__).parent / "spaces" / ("next.yaml" if question == "next" else "several.yaml")
