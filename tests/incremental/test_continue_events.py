"""Continuing a model with types of events: old and new rows keep their types and weights, which cannot change."""

import json

import numpy as np
import polars as pl
import pytest

import twotower as tt
from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.data import Interactions, with_events
from twotower.errors import InputError
from twotower.run import settings_of, train_run

WEIGHTS = {"view": 1.0, "buy": 4.0}
CHANGES = [
    "data.events={column: event, weights: {view: 1, buy: 4}}",
    "training={max_epochs: 1, batch_size: 64, accelerator: cpu, logger: none, recent_prior: false}",
    "item_tower.dimension=8",
    "evaluation={ks: [5], baselines: false}",
]


def days(start, seed, kinds=("view", "buy")):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 40, 900),
            "item_id": rng.integers(0, 30, 900),
            "timestamp": start + np.arange(900) * 600,
            "event": rng.choice(kinds, 900),
        }
    )


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    path = tmp_path_factory.mktemp("parent")
    days(1_600_000_000, 0).write_csv(path / "old.csv")
    train_run(path / "old.csv", path / "run", Config.load(None, CHANGES), progress=False, on_message=lambda _: None)
    return path / "run"


def test_a_continued_model_has_the_types_and_weights_of_all_rows(parent, tmp_path):
    frame = days(1_700_000_000, 1)
    frame.write_csv(tmp_path / "new.csv")
    settings = Config.load(parent / "config.yaml")
    new = with_events(Interactions.read(tmp_path / "new.csv", context=["event"]), "event", WEIGHTS)
    split = tt.continue_with(parent, new, settings)
    types = split.train.context["event"].to_list()
    assert set(types) == set(WEIGHTS) and split.data.event == new.event
    assert split.train.weights.tolist() == [WEIGHTS[name] for name in types]
    assert set(split.test.context["event"]) == set(WEIGHTS) and split.test.event == "event"
    config = Config.load(None, CHANGES, base=settings_of(parent))
    train_run(tmp_path / "new.csv", tmp_path / "run", config, warm_start=parent, progress=False,
              on_message=lambda _: None)  # fmt: skip
    saved = json.loads((tmp_path / "run" / "results.json").read_text())
    assert saved["slice_groups"]["events"] == ["event=buy", "event=view"]
    again = evaluate_folder(tmp_path / "run")
    assert again.slice_groups["events"] == ("event=buy", "event=view")
    assert again["model"].values["NDCG@5"] == pytest.approx(saved["rows"][0]["values"]["NDCG@5"])


@pytest.mark.parametrize(
    ("change", "kinds", "message"),
    [
        ("data.events.weights={view: 1, buy: 5}", ("view", "buy"), "data.events.weights: .* cannot be changed when"),
        ("data.events=null", ("view", "buy"), "data.events.column: 'event' in the model, None here"),
        ("data.events.default=view", ("view", "return"), "has 'return' in .* rows; expected 'view', 'buy'"),
    ],
)
def test_what_would_mix_types_or_weights_is_rejected_in_one_line(parent, tmp_path, change, kinds, message):
    days(1_700_000_000, 1, kinds).write_csv(tmp_path / "new.csv")
    config = Config.load(None, [*CHANGES[1:], change], base=settings_of(parent))
    with pytest.raises(InputError, match=message) as error:
        train_run(tmp_path / "new.csv", tmp_path / "run", config, warm_start=parent, progress=False,
                  on_message=lambda _: None)  # fmt: skip
    assert "\n" not in str(error.value)


def test_rows_without_the_weights_of_the_settings_are_rejected():
    plain = Interactions.from_frame(days(1_600_000_000, 0), context=["event"])
    config = Config.load(None, CHANGES)
    with pytest.raises(InputError, match="types of the rows are in None; in Python pass .* with_events"):
        tt.fit(tt.splits.by_time(plain), config, progress=False)
    weighed = with_events(plain, "event", WEIGHTS)
    without = config.model_copy(update={"data": config.data.model_copy(update={"events": None})})
    with pytest.raises(InputError, match="None, but the types of the rows are in 'event'"):
        tt.fit(tt.splits.by_time(weighed), without, progress=False)
    asked = Config.load(None, [*CHANGES, "training.question=set"])
    with pytest.raises(InputError, match="training.question: set: the targets of a question may have several types"):
        tt.fit(tt.splits.by_time(weighed), asked, progress=False)
