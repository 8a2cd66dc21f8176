"""Continuing a model with event types: old and new rows keep their types and weights, which cannot change."""

import json

import numpy as np
import polars as pl
import pytest
import torch

import twotower as tt
from support.interruption import stopped_after_first_epoch
from twotower.comparison import evaluate_folder
from twotower.config.run import Config
from twotower.data import Interactions, with_events
from twotower.errors import InputError
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import audit_run, settings_of, train_run
from twotower.serving import SavedModel

WEIGHTS = {"view": 1.0, "buy": 4.0}
CHANGES = [
    "data.events={column: event, weights: {view: 1, buy: 4}}",
    "training={max_epochs: 1, batch_size: 64, accelerator: cpu, logger: none, recent_prior: false}",
    "item_tower.dimension=8",
    "query_tower.history={length: 5, heads: 2, event_weights: true}",
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
    # Histories and shares are those of old and new rows together.
    model = SavedModel.load(tmp_path / "run")
    kinds = pl.concat([days(1_600_000_000, 0), frame])
    assert model.history_events.tolist() == [list(WEIGHTS).index(name) for name in split.data.context["event"]]
    assert len(model.history_events) == len(kinds)
    counts = np.zeros((model.towers.item_tower.num_items, 2))
    np.add.at(counts, (split.train.item_codes, [list(WEIGHTS).index(name) for name in types]), 1)
    expected = model.towers.by_event.clone()
    model.towers.set_event_shares(torch.from_numpy(counts))
    torch.testing.assert_close(model.towers.by_event, expected)


@pytest.mark.parametrize(
    ("change", "kinds", "message"),
    [
        ("data.events.weights={view: 1, buy: 5}", ("view", "buy"), "data.events.weights: .* cannot be changed when"),
        (
            "item_tower.event_share=0.5",
            ("view", "buy"),
            "event_share: 1.0 in the model, 0.5 here; the structure",
        ),
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
    with pytest.raises(
        InputError, match="training.question: set: the targets of a question may have several event types"
    ):
        tt.fit(tt.splits.by_time(weighed), asked, progress=False)


def test_the_audit_reads_the_types_of_a_request_and_its_history(parent):
    """The exact gradient of a row is that of its own type: without types, its logits would be different."""
    subject = audit_run(parent, rows=6)
    assert torch.isfinite(subject.rows.logits).all()
    towers, train = SavedModel.load(parent).towers, subject.train
    row = int(subject.rows.numbers[0])
    query = int(np.searchsorted(train.offsets, row, side="right")) - 1
    start = max(int(train.offsets[query]), row - 5)
    codes = np.array([list(WEIGHTS).index(name) for name in train.context["event"]], dtype=np.int8)
    ranker = TowerRanker(towers, 5)
    items = train.item_codes[start:row]
    asked = [{"event": train.context["event"][row]}]
    history = (np.array([0, len(items)]), items)
    embedded = ranker.embed(np.array([query]), history, context=asked, marks=codes[start:row])
    expected = (embedded @ ranker.item_embeddings.T / towers.temperature)[0].double()
    torch.testing.assert_close(subject.rows.logits[0], expected, atol=1e-4, rtol=1e-4)


def test_a_refit_and_a_resumed_run_have_the_types_of_their_rows(tmp_path):
    days(1_600_000_000, 0).write_csv(tmp_path / "old.csv")
    changes = [*CHANGES, "training.max_epochs=2", "training.patience=2", "training.refit=true"]

    def train(out, **options):
        train_run(tmp_path / "old.csv", tmp_path / out, Config.load(None, changes), progress=False,
                  on_message=lambda _: None, **options)  # fmt: skip

    train("whole")
    with stopped_after_first_epoch():
        train("stopped")
    train("stopped", resume=True)
    one, other = (SavedModel.load(tmp_path / name) for name in ("whole", "stopped"))
    first, second = (model.towers.state_dict() for model in (one, other))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    validated = SavedModel.load(tmp_path / "whole" / "validated")
    assert not torch.equal(validated.towers.by_event, one.towers.by_event), "the shares of all rows"
    assert len(one.history_events) == len(one.history_items) == 900
