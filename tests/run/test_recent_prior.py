"""The recent prior: its formula, that it is one more coordinate everywhere, and that it is chosen or left out."""

import numpy as np
import polars as pl
import pytest
import torch

from twotower import Retriever, evaluate, fit
from twotower.config.run import Config
from twotower.data import Interactions, by_time
from twotower.evaluation import Row
from twotower.run import continue_with, recent_prior
from twotower.run.recent_prior import (
    DAY,
    NEWEST_ROWS,
    PSEUDO_ROWS,
    choose_recent_prior,
    prior_of,
    recent_log_ratio,
)
from twotower.serving import SavedModel
from twotower.serving.batch import recommend_file
from twotower.towers import build_towers

START = 1_600_000_000


@pytest.fixture(scope="module")
def moving():
    """Each day has its own popular items, which stay popular for about ten days; tastes say nothing."""
    rng = np.random.default_rng(0)
    rows = []
    for day in range(100):
        weight = np.exp(-(((np.arange(100) - day) / 5.0) ** 2)) + 0.002
        users, items = rng.choice(150, 40, replace=False), rng.choice(100, 40, p=weight / weight.sum())
        rows += [(int(user), int(item), START + day * 86_400) for user, item in zip(users, items, strict=True)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row").unique(maintain_order=True)
    return by_time(Interactions.from_frame(frame), 0.05, 0.1)


METRIC = "NDCG@10"


def row(values):
    """Return a row whose metric has these values per query."""
    return Row("model", {METRIC: float(values.mean())}, {}, {METRIC: values})


SETTINGS = ["training.max_epochs=1", "item_tower.dimension=8"]


@pytest.fixture(scope="module")
def model(moving):
    return fit(moving, Config.load(None, SETTINGS), progress=False)


def test_the_ratio_is_the_formula():
    times = np.array([0, 1, 2, 3, 9]) * DAY
    items = np.array([0, 0, 1, 1, 2])
    counts = np.array([2, 2, 0, 5])
    found = recent_log_ratio(times, items, counts, half_life=2.0, now=4 * DAY)
    weights = [2.0 ** (-(4 - t) / 2.0) for t in (0, 1, 2, 3)]  # the last row is not yet known
    recent = np.array([weights[0] + weights[1], weights[2] + weights[3], 0.0, 0.0])
    before = (counts + 1) / (9 + 4)
    after = (recent + PSEUDO_ROWS * before) / (sum(weights) + PSEUDO_ROWS)
    expected = np.log(after / before)
    expected[2] = 0.0  # no training row
    assert found.numpy() == pytest.approx(expected, rel=1e-5)


def test_equal_strengths_are_the_recent_popularity(moving):
    train, now = moving.train, int(moving.validation.query_times.min())
    counts, options = train.item_counts(), {"half_life": 5.0, "now": now}
    found = prior_of(train, counts, strength=3.0, popularity=3.0, **options)
    age = (now - np.asarray(train.timestamps)) / (5.0 * DAY)
    recent = np.bincount(train.item_codes, weights=0.5**age, minlength=train.num_items)
    frequency = (counts + 1) / (counts.sum() + len(counts))
    expected = 3.0 * np.log((recent + PSEUDO_ROWS * frequency) / (recent.sum() + PSEUDO_ROWS))
    assert found.numpy()[counts > 0] == pytest.approx(expected[counts > 0], rel=1e-5)
    assert torch.equal(prior_of(train, counts, strength=1.0, **options), recent_log_ratio(
        train.timestamps, train.item_codes, counts, **options))  # fmt: skip


def test_noise_is_outweighed(moving):
    """Towers whose scores are noise of size 20: Bayes' strength leaves the noise, a large one leaves the popularity."""
    towers = build_towers(
        Config.load(None, ["item_tower.bias=true", "item_tower.dimension=8"]), num_queries=1, num_items=100
    )
    noise = 20 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    asked = np.asarray(moving.validation.target_items)

    def measured(towers):
        scores = noise if towers.recent is None else noise + towers.recent
        return row(np.isin(asked, scores.topk(10).indices.numpy()).astype(float))

    now = int(moving.validation.query_times.min())
    chosen = choose_recent_prior(towers, moving.train, measured, METRIC, now=now)
    assert chosen is not None and chosen.strength == chosen.popularity >= 16.0
    assert towers.recent is None


# Gains are over the metric without a prior, 1.0; the difference between the newest rows and another strength has a
# standard error of 0.1.
@pytest.mark.parametrize(
    ("gains", "taken"),
    [
        pytest.param({(2.0, 1.0): 0.5}, (2.0, 1.0), id="the others do not help"),
        pytest.param({(2.0, 1.0): 0.5, NEWEST_ROWS: 0.41}, NEWEST_ROWS, id="the newest rows within one error"),
        pytest.param({(2.0, 1.0): 0.5, NEWEST_ROWS: 0.39}, (2.0, 1.0), id="the newest rows are worse by more"),
        pytest.param({(4.0, 4.0): 0.45, (2.0, 1.0): 0.41, (0.5, 0.0): 0.5}, (0.5, 0.0), id="the best of the others"),
        pytest.param({(1.0, 0.0): 0.05, NEWEST_ROWS: 0.005}, (1.0, 0.0), id="the newest rows do not help"),
        pytest.param({(1.0, 0.0): 0.009}, None, id="none helps by 1 %"),
    ],
)
def test_the_newest_rows_alone_decide_unless_the_towers_are_clearly_better(moving, monkeypatch, gains, taken):
    # Stands for the prior, so that `measured` sees which strength is tried.
    def settings(data, counts, *, now, half_life, strength, popularity):
        return torch.tensor([strength, popularity])

    def measured(towers):
        pair = None if towers.recent is None else tuple(towers.recent.tolist())
        noise = np.resize([1.0, -1.0], 100) if pair in (NEWEST_ROWS, (4.0, 4.0)) else np.zeros(100)
        return row(1.0 + gains.get(pair, 0.0 if pair is None else -0.1) + noise * 0.1 * np.sqrt(99))

    monkeypatch.setattr(recent_prior, "prior_of", settings)
    towers = build_towers(Config.load(None, ["item_tower.dimension=8"]), num_queries=1, num_items=2)
    chosen = choose_recent_prior(towers, moving.train, measured, METRIC, now=int(moving.validation.query_times.min()))
    assert (None if chosen is None else (chosen.strength, chosen.popularity)) == taken
    assert towers.recent is None
    if chosen is not None:
        assert ("newest rows" in str(chosen)) == (taken == NEWEST_ROWS)
        assert chosen.before[METRIC] == pytest.approx(1.0) and chosen.after[METRIC] == pytest.approx(1.0 + gains[taken])


def test_the_newest_rows_have_their_own_half_life(moving, monkeypatch):
    def settings(data, counts, *, now, half_life, strength, popularity):
        return torch.tensor([strength, popularity, half_life])

    train, tried = moving.train, []

    def measured(towers):
        if towers.recent is None:
            return row(np.ones(2))
        *pair, half_life = towers.recent.tolist()
        tried.append(half_life)
        # Strength 1 is better with the longest half-life, the newest rows with the shortest one.
        gain = -half_life if tuple(pair) == NEWEST_ROWS else half_life / 1000
        return row(np.full(2, 1000.0 + gain))

    monkeypatch.setattr(recent_prior, "prior_of", settings)
    towers = build_towers(Config.load(None, ["item_tower.dimension=8"]), num_queries=1, num_items=3)
    chosen = choose_recent_prior(towers, train, measured, METRIC, now=int(moving.validation.query_times.min()))
    assert chosen is not None and chosen.strength == 1.0
    monkeypatch.setattr(recent_prior, "simplest", lambda helpful: next(iter(helpful)))
    chosen = choose_recent_prior(towers, train, measured, METRIC, now=int(moving.validation.query_times.min()))
    assert chosen is not None and (chosen.strength, chosen.popularity) == NEWEST_ROWS
    assert chosen.half_life == pytest.approx(min(tried))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@pytest.mark.parametrize("bias", [False, True])
def test_the_coordinate_adds_the_prior_to_every_score(similarity, bias):
    config = Config.load(None, [f"objective.similarity={similarity}", f"item_tower.bias={bias}"])
    towers = build_towers(config, num_queries=3, num_items=9).eval()
    if towers.bias is not None:
        torch.nn.init.normal_(towers.bias.weight)
    history = torch.tensor([[-1, 2, 3], [4, 5, 6]])

    def scores():
        query = towers.embed_queries(torch.tensor([0, 1]), history)
        assert query.shape[1] == towers.width == towers.item_embeddings().shape[1]
        return query @ towers.item_embeddings().T / towers.temperature

    before, recent = scores(), torch.randn(9)
    towers.set_recent(recent)
    assert torch.allclose(scores(), before + recent, atol=1e-5)
    towers.set_recent(None)
    assert torch.equal(scores(), before)


def test_the_prior_helps_where_popularity_moves(moving, model):
    chosen = model.artifact.metadata["recent_prior"]
    assert chosen["after"]["NDCG@10"] > chosen["before"]["NDCG@10"] * 1.2
    off = fit(moving, Config.load(None, [*SETTINGS, "training.recent_prior=false"]), progress=False)
    assert off.artifact.metadata["recent_prior"] is None and off.artifact.towers.recent is None
    values = [evaluate(one, moving.test, baselines=False)["model"].values["NDCG@10"] for one in (model, off)]
    assert values[0] > values[1] * 1.2


def test_the_prior_is_left_out_of_other_splits(planted_split):
    other = fit(planted_split, Config.load(None, ["training.max_epochs=1"]), progress=False)
    assert other.artifact.metadata["recent_prior"] is None and other.artifact.towers.recent is None


def test_the_prior_is_that_of_the_time_of_the_test(moving, model):
    chosen, data = model.artifact.metadata["recent_prior"], moving.data
    counts, now = moving.train.item_counts(), int(moving.test.query_times.min())
    ratio = recent_log_ratio(data.timestamps, data.item_codes, counts, half_life=chosen["half_life"], now=now)
    log_p = torch.from_numpy(np.log((counts + 1) / (counts.sum() + len(counts)))).float()
    expected = chosen["strength"] * ratio + chosen["popularity"] * log_p
    assert torch.allclose(model.artifact.towers.recent, expected, atol=1e-5)


def test_evaluation_serving_and_batch_rank_alike(moving, model, tmp_path):
    folder = model.save(tmp_path / "model")
    loaded = Retriever.load(folder)
    expected = model.rank(moving.test, 10, True)
    assert np.array_equal(loaded.rank(moving.test, 10, True), expected)
    assert torch.equal(SavedModel.load(folder).towers.recent, model.artifact.towers.recent)
    ids = [str(one) for one in range(5)]
    users = moving.data.queries.ids[:5]
    single = loaded.recommend(users.to_list(), k=5)
    pl.DataFrame({"query": users}).write_parquet(tmp_path / "in.parquet")
    recommend_file(loaded, tmp_path / "in.parquet", tmp_path / "out.parquet", k=5)
    assert pl.read_parquet(tmp_path / "out.parquet")["item"].to_list() == single["item"].to_list()
    assert len(ids) == 5
    # Similar items have similar directions; the prior says nothing about that.
    similar = loaded.similar([int(moving.data.items.ids[0])], k=3)
    assert (similar["score"] <= 1.0 + 1e-5).all()


def test_a_continued_model_chooses_its_own_prior(moving, model):
    rng = np.random.default_rng(1)
    fresh = pl.DataFrame(
        {
            "user_id": rng.integers(0, 150, 400),
            "item_id": rng.integers(0, 100, 400),
            "timestamp": START + 86_400 * rng.integers(101, 140, 400),
        }
    ).unique(maintain_order=True)
    split = continue_with(model, Interactions.from_frame(fresh))
    said = []
    continued = fit(split, warm_start=model, progress=False, on_message=said.append)
    assert not any("weights" in str(message) and "other" in str(message) for message in said)
    assert continued.artifact.config.training.question == "horizon"
    recent = continued.artifact.towers.recent
    assert recent is None or not torch.equal(recent, model.artifact.towers.recent)
