"""The refit: the validated training repeated on all rows, and metrics that stay those of the validated model."""

import json
import shutil

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import twotower as tt
from support.interruption import stopped_after_first_epoch
from twotower import run
from twotower.comparison import compare_run, evaluate_folder
from twotower.config.run import Config
from twotower.data import Interactions, by_time
from twotower.errors import InputError
from twotower.ranking.baselines import gram
from twotower.run import linear_start, train_run
from twotower.run.recent_prior import prior_of
from twotower.serving import Retriever, SavedModel

SMALL = ["training.batch_size=64", "training.max_epochs=4", "training.accelerator=cpu", "item_tower.dimension=16"]
NEXT = ["training.question=next", "training.learning_rate=0.01", "data.split=leave-last-out"]


def train(source, out, *changes, **options):
    options = {"on_message": lambda message: None, **options}
    return train_run(source, out, Config.load(None, [*SMALL, *changes]), progress=False, **options)


def weights(folder):
    return load_file(folder / "towers.safetensors")


@pytest.fixture(scope="module")
def purchases(tmp_path_factory, interactions_csv):
    return interactions_csv(tmp_path_factory.mktemp("refit") / "purchases.csv")


@pytest.fixture(scope="module")
def refitted(purchases):
    """A run whose best epoch is not the last, refitted."""
    out = purchases.parent / "refitted"
    train(purchases, out, *NEXT, "training.refit=true", "training.max_epochs=12", "training.patience=2")
    return out


def test_the_refit_learns_all_rows_for_the_epochs_of_the_best_weights(refitted):
    validated, final = (json.loads((refitted / name / "metadata.json").read_text()) for name in ("validated", "model"))
    history = validated["training"]["history"]
    best = max(history, key=lambda row: row["NDCG@10"])["epoch"] + 1
    assert best < validated["training"]["epochs"], "the run must have stopped after its best epoch"
    assert validated["training"]["kept_epochs"] == final["refit"]["epochs"] == final["training"]["epochs"] == best
    rows = SavedModel.load(refitted / "model").history_items
    assert final["refit"]["rows"] == len(rows) > final["refit"]["validated_rows"]
    assert load_file(refitted / "model" / "items.safetensors")["counts"].sum() == len(rows)
    assert final["data"]["lineage"][0]["rows_learnt"] == len(rows)
    assert Config.load(refitted / "config.yaml").training.refit and final["config"]["training"]["refit"]


def test_a_refit_is_a_run_on_a_split_without_holdouts(planted_data):
    """With the rate schedule of the whole run, stopped after the validated epochs: the same as by hand."""
    split = tt.splits.leave_last_out(planted_data)
    settings = [*SMALL, *NEXT, "training.max_epochs=6", "training.patience=1"]
    model = tt.fit(split, Config.load(None, settings), progress=False)
    found = run.refit(model, progress=False)
    epochs = model.artifact.metadata["training"]["kept_epochs"]
    whole = run.refit(model, progress=False)
    assert torch.equal(found.artifact.item_embeddings, whole.artifact.item_embeddings), "the same seed, the same model"
    everything = tt.data.Split(planted_data, *2 * (tt.data.Holdout.empty("none"),), split.account, "", {}, planted_data)
    steps = model.artifact.config.training.warmup_steps  # one epoch of the validated run
    stopped = Config.load(None, [*settings, "training.recent_prior=false", f"training.warmup_steps={steps}"])
    by_hand = {}

    def stop(trainer, module):
        if trainer.current_epoch + 1 == epochs:
            by_hand.update({name: value.clone() for name, value in module.towers.state_dict().items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("twotower.training.callbacks.StopAtDivergence.on_train_epoch_end", lambda _, t, m: stop(t, m))
        tt.fit(everything, stopped, progress=False)
    state = found.artifact.towers.state_dict()
    assert state.keys() == by_hand.keys() and all(torch.equal(state[name], by_hand[name]) for name in state)


def test_metrics_are_those_of_the_validated_model_and_say_so(refitted, purchases):
    results = json.loads((refitted / "results.json").read_text())
    final = json.loads((refitted / "model" / "metadata.json").read_text())
    assert results == final["metrics"]
    assert results["notes"][0].startswith("metrics of the validated model, trained on ")
    validated = Retriever.load(refitted / "validated")
    artifact, split = run.reread(refitted)
    assert torch.equal(artifact.item_embeddings, validated.artifact.item_embeddings)
    ranked = validated.rank(split.test, 10, True)
    hit = (ranked == split.test.target_items[:, None]).any(1)  # one target per query
    assert results["rows"][0]["values"]["HR@10"] == pytest.approx(hit.mean())
    assert not torch.equal(artifact.item_embeddings, SavedModel.load(refitted).item_embeddings)
    assert evaluate_folder(refitted).to_dict() == results
    evaluate_folder(refitted, page=refitted / "report.html")
    assert "etrics of the validated model" in (refitted / "report.html").read_text()


def test_refined_weights_are_those_of_the_validated_model(purchases, tmp_path):
    train(purchases, tmp_path / "run", *NEXT, "objective.name=refined-logq", "training.refit=true")
    shutil.copytree(tmp_path / "run" / "validated", tmp_path / "alone" / "model")
    weights = []
    for folder in (tmp_path / "run", tmp_path / "alone"):
        evaluate_folder(folder, page=folder / "report.html")
        weights.append(pl.read_parquet(folder / "per_query.parquet")["refined_weight"].drop_nulls().to_numpy())
    assert len(weights[0]) and np.array_equal(weights[0], weights[1], equal_nan=True)


def test_a_model_folder_without_the_validated_one_is_served_but_not_evaluated(refitted, tmp_path):
    alone = SavedModel.load(refitted).save(tmp_path / "model")
    assert len(Retriever.load(alone).recommend(["u001"], k=3)) == 3
    with pytest.raises(InputError, match=r"refitted on all rows.* copy the whole run folder$"):
        evaluate_folder(alone)


def test_a_linear_start_that_no_epoch_improves_is_refitted_as_a_start(planted_data):
    split = by_time(planted_data, validation=0.1, test=0.15)
    settings = [*SMALL, "training.max_epochs=1", "training.learning_rate=1.0"]
    model = tt.fit(split, Config.load(None, settings), progress=False)
    training = model.artifact.metadata["training"]
    assert training["kept_epochs"] == 0 and training["start"]["powers"] is None
    found = run.refit(model, progress=False).artifact
    counts = planted_data.item_counts()
    log_p = np.log((counts + 1.0) / (counts.sum() + len(counts)))
    assert np.allclose(found.towers.bias.weight.detach()[:, 0], training["start"]["bias"] * log_p, atol=1e-5)


@pytest.mark.parametrize(("share", "powers"), [(0.5, None), (1.0, None), (0.5, (0.25, 0.45))])
def test_the_choices_of_the_start_are_taken_over(planted_data, monkeypatch, share, powers):
    split = by_time(planted_data, validation=0.1, test=0.15)
    monkeypatch.setattr(linear_start, "BIASES", (share,))
    if powers is not None:
        monkeypatch.setattr(linear_start, "MOST_ITEMS", 10)
        monkeypatch.setattr(linear_start, "POWERS", (powers,))
    settings = [*SMALL, "training.max_epochs=1", "training.learning_rate=1e-9"]
    settings.remove("item_tower.dimension=16")
    model = tt.fit(split, Config.load(None, settings), progress=False)
    start = model.artifact.metadata["training"]["start"]
    assert (start["bias"], start["powers"]) == (share, powers and list(powers))
    assert (start["ridge"] in linear_start.RIDGES) == (powers is None)
    monkeypatch.setattr(linear_start, "RIDGES", (7.0,))
    monkeypatch.setattr(linear_start, "BIASES", (0.0,))
    monkeypatch.setattr(linear_start, "POWERS", ((0.5, 0.35),))
    found = run.refit(model, progress=False).artifact.towers
    dimension = found.item_tower.ids.weight.shape[1]
    assert dimension == start["rank"] == model.artifact.config.item_tower.dimension
    if powers is None:
        ridge = start["ridge"] * planted_data.item_counts().sum() / (planted_data.item_counts() > 0).sum()
        history, vectors = linear_start.linear_factors(gram(planted_data), [dimension], float(ridge))[dimension]
    else:
        history, vectors = linear_start.singular_factors(planted_data, dimension, *powers)
    expected = history @ vectors.T
    scores = (found.query_tower.history_items.weight @ found.item_tower.ids.weight.T).detach()
    assert torch.allclose(scores / scores.norm(), expected / expected.norm(), atol=1e-5)
    counts = planted_data.item_counts()
    log_p = np.log((counts + 1.0) / (counts.sum() + len(counts)))
    assert np.allclose(found.bias.weight.detach()[:, 0], share * log_p, atol=1e-5)


def test_the_recent_prior_of_a_refit_is_that_of_the_time_after_the_last_row():
    """Items of the last days are popular then: the validated run chooses a prior, and the refit moves it on."""
    generator = np.random.default_rng(0)
    times = np.sort(generator.random(6000)) * 100
    items = (times // 5).astype(int) * 3 + generator.integers(0, 12, 6000)
    frame = pl.DataFrame(
        {"user": generator.integers(0, 200, 6000), "item": items, "time": (times * 86400).astype(np.int64)}
    )
    data = Interactions.from_frame(frame, columns={"query": "user", "item": "item", "timestamp": "time"})
    model = tt.fit(by_time(data, 0.1, 0.1), Config.load(None, [*SMALL, "training.max_epochs=1"]), progress=False)
    prior = model.artifact.metadata["recent_prior"]
    assert prior is not None, "the data must need a prior"
    found = run.refit(model, progress=False).artifact
    assert found.metadata["recent_prior"] == prior
    chosen = {name: prior[name] for name in ("half_life", "strength", "popularity")}
    expected = prior_of(data, data.item_counts(), now=int(data.timestamps.max()) + 1, **chosen)
    assert torch.allclose(found.towers.recent, expected)
    assert not torch.allclose(found.towers.recent, model.artifact.towers.recent)


def test_an_interrupted_refit_is_resumed_to_the_same_model(refitted, purchases, tmp_path):
    settings = [*NEXT, "training.refit=true", "training.max_epochs=12", "training.patience=2"]
    with stopped_after_first_epoch(part="refit"):
        train(purchases, tmp_path / "run", *settings)
    assert (tmp_path / "run" / "validated").is_dir() and not (tmp_path / "run" / "model").exists()
    train(purchases, tmp_path / "run", *settings, resume=True)
    same, other = weights(tmp_path / "run" / "model"), weights(refitted / "model")
    assert same.keys() == other.keys() and all(torch.equal(same[name], other[name]) for name in same)


def test_a_refitted_model_continues_on_new_data(refitted, purchases, tmp_path):
    frame = pl.read_csv(purchases)
    last = frame["timestamp"].max()
    new = frame.sample(300, seed=0, shuffle=True).with_columns(
        timestamp=last + pl.int_range(1, 301) * 1000, item_id=pl.Series(np.random.default_rng(0).integers(1, 100, 300))
    )
    new.write_csv(tmp_path / "new.csv")
    config = Config.load(None, ["data.split=time"], base=run.settings_of(refitted))
    assert not config.training.refit
    model, _ = train_run(
        tmp_path / "new.csv", tmp_path / "next", config, warm_start=refitted, progress=False, on_message=lambda _: None
    )
    lineage = model.artifact.metadata["data"]["lineage"]
    assert [one["rows_learnt"] > 0 for one in lineage] == [True, True]
    assert lineage[0]["rows_learnt"] == len(frame)
    assert "refit" not in model.artifact.metadata


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*NEXT, "data.validation_queries=0"], "--refit: the split has no validation"),
        ([*NEXT, "training.time_limit='00:01:00:00'"], "--refit: training.time_limit may end"),
    ],
)
def test_a_refit_without_meaning_is_rejected_before_training(purchases, tmp_path, settings, message):
    with pytest.raises(InputError, match=message):
        train(purchases, tmp_path / "run", *settings, "training.refit=true")
    assert not (tmp_path / "run").exists()


def test_a_refit_is_rejected_where_the_test_rows_would_be_learnt(planted_split, purchases, refitted, tmp_path):
    config = Config.load(None, [*SMALL, *NEXT, "training.refit=true"])
    with pytest.raises(InputError, match=r"training\.refit: fit trains only the validated model"):
        tt.fit(planted_split, config)
    with pytest.raises(InputError, match=r"training\.refit: a refitted model was trained on the test rows"):
        compare_run(purchases, tmp_path / "compared", config, ["in-batch"], seeds=1)
    with pytest.raises(InputError, match="--refit: a continued model cannot be refitted"):
        train_run(purchases, tmp_path / "x", config, warm_start=refitted, progress=False, on_message=lambda _: None)
