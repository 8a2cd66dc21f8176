"""Runs with feedback: what they learn, weight 0, resuming, and what is rejected."""

import math
import os
import signal

import numpy as np
import polars as pl
import pytest
import torch
from scipy.optimize import brentq

import twotower as tt
from twotower import run
from twotower.config.run import Config
from twotower.data import Interactions, leave_last_out
from twotower.errors import InputError, Interrupted
from twotower.run import continue_with, train_run
from twotower.run.batches import make_batches
from twotower.training.embedding import embed_rows
from twotower.training.module import TrainingModule

ITEMS, USERS, ROWS, DISLIKED = 8, 30, 40, 2
#: Free scores: vectors of queries and items, as many dimensions as items.
FREE = [
    "query_tower={history: null, id_embedding: true, hidden: [], dropout: 0}",
    "item_tower.dimension=8",
    "objective.name=full-softmax",
    "objective.similarity=dot",
    "objective.temperature=1.0",
    "training.question=next",
    "training.start=random",
    "training.recent_prior=false",
    "training.weight_decay=0",
    "training.accelerator=cpu",
    "training.logger=none",
    "training.batch_size=128",
    "training.max_epochs=60",
    "training.warmup_steps=5",
    "training.learning_rate=0.05",
]


@pytest.fixture(scope="module")
def split():
    """Queries with the same taste; those with even numbers have disliked item 2 before their first row."""
    rng = np.random.default_rng(0)
    share = np.arange(ITEMS, 0, -1) / np.arange(1, ITEMS + 1).sum()
    rows = []
    for user in range(USERS):
        rows += [(user, int(item), 1000 + n, 1.0) for n, item in enumerate(rng.choice(ITEMS, ROWS, p=share))]
        rows += [(user, DISLIKED, 10, 0.0)] if user % 2 == 0 else []
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "rating"], orient="row")
    # Without a validation the last weights are the model.
    return leave_last_out(Interactions.from_frame(frame, positive_label=1.0), validation_queries=0)


def fit(split, *changes, **options):
    return tt.fit(split, Config.load(None, [*FREE, *changes]), progress=False, **options)


def weights_of(model):
    return {name: value.clone() for name, value in model.artifact.towers.state_dict().items()}


def same(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


def all_scores(model, split):
    """Compute the score of every item for every query, [Q, N]."""
    config = Config.load(None, [*FREE]).resolved(len(split.train))
    towers = model.artifact.towers.eval()
    with torch.no_grad():
        query = embed_rows(towers, make_batches(config, split.train).batch(np.asarray(split.train.offsets[:-1])))
        return (query @ towers.item_embeddings().T / towers.temperature).double()


@pytest.mark.slow
def test_a_trained_model_lowers_the_disliked_item_by_the_amount_of_the_target(split):
    weight = 4.0
    with_it = all_scores(fit(split, f"objective.feedback={{weight: {weight}}}"), split)
    without = all_scores(fit(split, "objective.feedback={weight: 0}"), split)
    change = with_it - without
    change -= change[:, [j for j in range(ITEMS) if j != DISLIKED]].mean(1, keepdim=True)
    wanted = []
    for query in range(USERS):
        start, end = split.train.offsets[query], split.train.offsets[query + 1]
        p = float(np.mean(split.train.item_codes[start:end] == DISLIKED))
        rest = 1.0 - p  # the optimum of the loss; see tests/objectives/test_feedback.py
        a = brentq(lambda a, p=p, rest=rest: rest / (rest + (1 + weight) * a) + p / (rest + a) - 1.0, 1e-9, 1.0)
        wanted.append(math.log(a / p) if query % 2 == 0 else 0.0)
    found = change[:, DISLIKED]
    even = torch.arange(USERS) % 2 == 0
    assert float(found[even].mean()) == pytest.approx(np.mean([w for w in wanted if w]), rel=0.15)
    assert abs(float(found[~even].mean())) < 0.1
    others = change[:, [j for j in range(ITEMS) if j != DISLIKED]]
    assert float(others.abs().mean()) < 0.15


SHORT = [
    "training.max_epochs=2",
    "objective.name=expected-count",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 8}}]",
]


def test_weight_0_trains_the_model_of_today_bit_by_bit(split):
    today = weights_of(fit(split, *SHORT))
    assert same(today, weights_of(fit(split, *SHORT, "objective.feedback={weight: 0, form: logistic}")))
    assert not same(today, weights_of(fit(split, *SHORT, "objective.feedback={weight: 0.1}")))


@pytest.mark.parametrize("form", ["softmax", "logistic"])
def test_micro_batches_and_resuming_change_nothing(split, tmp_path, monkeypatch, form):
    settings = [*SHORT, f"objective.feedback={{weight: 2, form: {form}}}", "training.max_epochs=3"]
    whole = fit(split, *settings, directory=tmp_path / "whole")
    wanted = weights_of(whole)
    parts = weights_of(fit(split, *settings, "training.micro_batch=50"))
    assert all(torch.allclose(wanted[name], parts[name], atol=1e-5) for name in wanted)
    step = TrainingModule.training_step

    def interrupted_step(self, batch, batch_idx):
        if self.trainer.global_step == 13:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingModule, "training_step", interrupted_step)
        with pytest.raises(Interrupted):
            fit(split, *settings, directory=tmp_path / "cut")
    assert same(wanted, weights_of(fit(split, *settings, directory=tmp_path / "cut", resume=True)))


def test_every_kind_of_batch_has_the_slates_of_its_rows(split):
    """The slate of a row is item 2 if its query is even; in grouped batches and questions too."""
    sequence = "query_tower.history={length: 3, sequence: {kind: gru, blocks: 1}}"
    for changes in ([], ["training.question=horizon", "training.horizon=1"], ["training.question=set"], [sequence]):
        settings = [*FREE, "objective.feedback={weight: 1}", *changes]
        config = Config.load(None, settings).resolved(len(split.train))
        batch = next(iter(make_batches(config, split.train)))
        assert batch.passed_over.items.shape == (len(batch), 1)
        odd = (batch.queries % 2).bool()
        assert batch.passed_over.items[:, 0].tolist() == torch.where(odd, -1, DISLIKED).tolist() and bool(odd.any())


def test_feedback_that_cannot_be_joined_is_rejected(split):
    def rejected(message, *changes, data=split):
        with pytest.raises(InputError, match=message) as error:
            fit(data, "objective.feedback={weight: 1}", *changes)
        assert "\n" not in str(error.value)

    rejected("'shown' was not read with the interactions", "data.feedback.column=shown")
    rejected("file, request and window have no effect", "data.feedback={column: shown, window: 3}")
    rejected("held-out items would count as passed over", "data.feedback.column=shown", "data.split=random")
    rejected("'request' was not read with the interactions", "data.feedback.request=request")
    plain = leave_last_out(Interactions.from_frame(
        pl.DataFrame({"user_id": [1] * 5 + [2] * 5, "item_id": [3, 1, 2, 5, 4] * 2, "timestamp": range(10)})
    ))  # fmt: skip
    rejected("the training data has no items that were passed over", data=plain)
    early = split.train.negatives
    late = tt.data.Interactions(**{**early.__dict__, "timestamps": early.timestamps + 10**15})
    changed = tt.data.Split(
        **{**split.__dict__, "train": tt.data.Interactions(**{**split.train.__dict__, "negatives": late})}
    )
    rejected("no training row has an item that was passed over before it", data=changed)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Rows of 40 days with what was shown beside them, in two files, and impressions."""
    rng, folder = np.random.default_rng(1), tmp_path_factory.mktemp("feedback")
    rows = []
    for user in range(60):
        days = np.sort(rng.choice(40, 12, replace=False))
        rows += [
            (user, int(i), int(d) * 86_400 + 1_600_000_000) for i, d in zip(rng.integers(0, 20, 12), days, strict=True)
        ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame = frame.with_columns(
        shown=pl.Series([rng.integers(0, 20, 3).tolist() for _ in rows]),
        dwell=pl.Series(rng.integers(0, 100, len(rows))),
    )
    old = pl.col("timestamp") < 1_600_000_000 + 30 * 86_400
    frame.filter(old).write_parquet(folder / "old.parquet")
    frame.filter(~old).write_parquet(folder / "new.parquet")
    frame.select("user_id", pl.col("item_id") % 7, "timestamp").write_parquet(folder / "impressions.parquet")
    return folder


RUN = [
    "training.max_epochs=1",
    "training.accelerator=cpu",
    "training.logger=none",
    "training.recent_prior=false",
    "training.start=random",
    "training.batch_size=64",
    "item_tower.dimension=8",
    "evaluation.baselines=false",
]


def train(files, out, *changes, data="old.parquet", **options):
    config = Config.load(None, [*RUN, *changes])
    return train_run(files / data, out, config, progress=False, on_message=lambda _: None, **options)


def test_a_list_column_is_kept_for_the_model_that_continues(files, tmp_path):
    settings = ["objective.feedback={weight: 2}", "data.feedback.column=shown", "query_tower.context=none"]
    train(files, tmp_path / "old", *settings)
    model, _ = train(files, tmp_path / "new", *settings, data="new.parquet", warm_start=tmp_path / "old")
    assert "shown" in model.split.train.context.columns and len(model.split.train) > 400
    run.audit_run(tmp_path / "new")


def test_a_model_is_not_continued_with_impressions(files, tmp_path):
    settings = ["objective.feedback={weight: 2}", f"data.feedback.file={files / 'impressions.parquet'}"]
    model, _ = train(files, tmp_path / "old", *settings)
    assert model.split.train.negatives is not None
    with pytest.raises(InputError, match="a model folder does not store the feedback of its rows"):
        train(files, tmp_path / "new", *settings, data="new.parquet", warm_start=tmp_path / "old")


def test_row_columns_are_not_proposed_as_context(files, tmp_path):
    settings = [
        "query_tower.context=auto",
        "data.weights={column: dwell, rule: quantile}",
        "data.feedback.column=shown",
    ]
    model, _ = train(files, tmp_path / "run", *settings, "objective.feedback={weight: 1}")
    declared = model.artifact.config.query_tower.context
    assert {one.column for one in declared}.isdisjoint({"dwell", "shown"})


def test_the_quantiles_of_a_model_are_those_of_the_model_that_continues_it(files, tmp_path):
    settings = ["data.weights={column: dwell, rule: quantile}", "data.recency_half_life=10"]
    old, _ = train(files, tmp_path / "old", *settings)
    kept = old.artifact.metadata["row_weights"]
    values = old.split.train.context["dwell"].to_numpy()
    assert kept == np.quantile(values, np.arange(1, 101) / 100, method="inverted_cdf").tolist()
    new, _ = train(files, tmp_path / "new", *settings, data="new.parquet", warm_start=tmp_path / "old")
    assert new.artifact.metadata["row_weights"] == kept
    assert (
        continue_with(tmp_path / "old", Interactions.read(files / "new.parquet", context=["dwell"])).train.context
        is not None
    )
