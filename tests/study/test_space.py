"""The space of a study: what is not a setting, out of its bounds, or contradictory is rejected with the file's name."""

from functools import partial

import pytest
import yaml

from twotower.config.run import Config
from twotower.errors import InputError
from twotower.run import settings_to_try
from twotower.study.space import Space, packaged_space

load = partial(Config.load, None)


def space(tmp_path, text):
    path = tmp_path / "space.yaml"
    path.write_text(text)
    return Space.read(path, load)


class Chooser:
    """A trial that takes given choices, and the first or lowest otherwise."""

    def __init__(self, **chosen):
        self.chosen, self.asked = chosen, []

    def suggest_categorical(self, name, choices):
        self.asked.append(name)
        return self.chosen.get(name, choices[0])

    def suggest_float(self, name, low, high, log=False):
        self.asked.append(name)
        return self.chosen.get(name, low)

    suggest_int = suggest_float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("training.speed: [1, 2]", r"training\.speed: field training\.speed: no such setting"),
        ("training.learning_rate: [0.1, 0]", r"field training\.learning_rate: Input should be greater than 0, found 0"),
        ("training.learning_rate: {low: 0.1, high: 0.01, default: 0.1}", "expected low < high"),
        ("training.learning_rate: {low: 0.01, high: 0.1, default: 1}", "default: 1; expected a value from 0.01 to 0.1"),
        ("training.learning_rate: {low: 0, high: 1, default: 1, log: true}", "a range with `log` must begin above 0"),
        ("query_tower.dropout: {low: 0.1, high: 1.5, default: 0.1}", r"query_tower\.dropout: Input should be less"),
        ("training.learning_rate: {low: 0.1, high: 1}", "a range needs `low`, `high` and `default`"),
        ("item_tower.dimension: [16, 16]", "a value occurs twice"),
        ("item_tower.dimension: [16]", "at least 2"),
        ("item_tower.dimension: 16", "expected a list of values, `options`, or a range, found 16"),
        ("a: {options: {x: {}, y: {training.speed: 1}}}", "a: field training.speed: no such setting"),
        ("a: {options: {x: {}, y: {}}, low: 1}", "expected a list of values, `options`, or a range"),
        ("item_tower.dimension: {values: [16, 32], when: {a: [x]}}", "when: a is not an earlier parameter"),
        (
            "a: {options: {x: {}, y: {}}}\nitem_tower.dimension: {values: [16, 32], when: {a: [z]}}",
            "when: a has no choice z; its choices: x, y",
        ),
        ("item_tower.dimension: {values: [16, 32], whem: {a: [x]}}", "whem: no such setting; did you mean when"),
        ("- a", "expected parameters such as"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_wrong_space_is_one_clear_error(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        space(tmp_path, text)
    assert str(refusal.value).startswith(str(tmp_path / "space.yaml")) and "\n" not in str(refusal.value)


def test_choices_become_settings_and_conditions_hold(tmp_path):
    made = space(
        tmp_path,
        "model: {options: {plain: {}, wide: {query_tower.hidden: [256], training.seed: 3}}}\n"
        "item_tower.dimension: [null, 32]\n"
        "query_tower.dropout: {low: 0.1, high: 0.5, default: 0.3, when: {model: [wide]}}\n"
        "training.patience: {low: 2, high: 9, default: 5}\n",
    )
    trial = Chooser()
    assert made.suggest(trial) == ["training.patience=2"]
    assert "query_tower.dropout" not in trial.asked
    overrides = made.suggest(Chooser(model="wide", **{"item_tower.dimension": "32", "query_tower.dropout": 0.2}))
    config = load(overrides)
    assert (config.query_tower.hidden, config.item_tower.dimension, config.query_tower.dropout) == ([256], 32, 0.2)
    assert made.first() == {
        "model": "plain", "item_tower.dimension": "null", "query_tower.dropout": 0.3, "training.patience": 5
    }  # fmt: skip
    assert made.first(["item_tower.dimension=32", "training.patience=7"])["training.patience"] == 7
    for unknown in ("item_tower.dimension=64", "training.patience=30", "training.seed=1", "model=wide"):
        assert made.first([unknown]) is None


@pytest.mark.parametrize("question", ["next", "horizon", "set"])
def test_the_packaged_spaces_begin_with_the_defaults_and_contain_the_advice(question):
    made = Space.read(packaged_space(question), load)
    assert yaml.safe_load(made.text)

    class Usual(Chooser):
        def suggest_categorical(self, name, choices):
            return made.first()[name]

        def suggest_float(self, name, low, high, log=False):
            return made.first()[name]

    assert load(made.suggest(Usual())) == load([]), "the first trial has the defaults"
    resolved = load([f"training.question={question}", "training.start=random", "data.split=leave-last-out"])
    advised = settings_to_try(resolved)
    assert advised
    missing = [one for one in advised if made.first([one]) is None]
    assert missing in ([], ["training.start=linear"]), "linear is the default there"
