"""The start of training at a linear model: EASE at full rank, the model itself if no epoch is better, or refused."""

import numpy as np
import pytest
import torch

from support.interruption import stopped_after_first_epoch
from twotower import fit
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.ranking import baselines
from twotower.ranking.baselines import EASE, ease_weights, gram
from twotower.ranking.tower_ranker import TowerRanker
from twotower.run import linear_start
from twotower.run.batches import make_batches
from twotower.run.linear_start import RIDGES, linear_factors, singular_factors, start_linear
from twotower.run.question import defaults_of, resolve_question
from twotower.run.validation import simplest
from twotower.towers import build_towers


def configured(*settings):
    return Config.load(None, list(settings))


def built(split, *settings):
    config = resolve_question(configured(*settings), split).resolved(1000)
    towers = build_towers(config, num_queries=split.train.num_queries, num_items=split.train.num_items)
    return config, towers, make_batches(config, split.train)


def test_at_full_rank_the_towers_rank_like_ease(planted_time_split):
    split = planted_time_split
    config, towers, batches = built(split, f"item_tower.dimension={split.train.num_items}", "training.start_ridge=20")
    assert start_linear(towers, config, split.train, batches, Communicator())
    ranked = TowerRanker(towers.eval(), config.query_tower.history.length).rank(split.test, 10, True)
    expected = EASE(split.train, l2=20.0).rank(split.test, 10, True).numpy()
    assert (ranked == expected).mean() > 0.97  # other roundings swap near ties


def ones_and_ease(train, ridge):
    """Compute the matrix of zeros and ones X and EASE's matrix W in float64."""
    ones = np.zeros((train.num_queries, train.num_items))
    ones[train.query_codes(), train.item_codes] = 1.0
    products = ones.T @ ones
    inverse = np.linalg.inv(products + ridge * np.eye(len(products)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return ones, weights


def truncated(ones, weights, rank):
    """Compute the matrix of a rank that is closest to W on X (reduced-rank regression), by the SVD of X W."""
    vectors = np.linalg.svd(ones @ weights)[2][:rank].T
    return weights @ vectors @ vectors.T


def product_of(factors):
    history, vectors = factors
    return (history.double() @ vectors.double().T).numpy()


def test_without_fills_the_factors_are_the_best_of_their_rank(planted_time_split, monkeypatch):
    """Reduced-rank regression, against a singular value decomposition of the predictions in float64."""
    monkeypatch.setattr(linear_start, "FILLS", 0)
    train = planted_time_split.train
    ones, weights = ones_and_ease(train, 20.0)
    singular = np.linalg.svd(ones @ weights, compute_uv=False)
    for rank, factors in linear_factors(gram(train), [8, 16], 20.0).items():
        error = np.linalg.norm(ones @ (weights - product_of(factors)))
        assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), rel=1e-3)


def test_the_diagonal_is_filled_in(planted_time_split, monkeypatch):
    """Against decompositions in float64: the factors are the best of their rank for W with the filled diagonal."""
    train = planted_time_split.train
    ones, weights = ones_and_ease(train, 20.0)
    monkeypatch.setattr(linear_start, "ROUNDS", 12)  # subspace iteration that has converged
    for rank, factors in linear_factors(gram(train), [8, 16], 20.0).items():
        cut = truncated(ones, weights, rank)
        unfilled = cut
        for _ in range(linear_start.FILLS):
            filled = weights.copy()
            np.fill_diagonal(filled, np.diag(cut))
            cut = truncated(ones, filled, rank)
        assert np.linalg.norm(product_of(factors) - cut) < 0.02 * np.linalg.norm(cut)
        assert np.linalg.norm(product_of(factors) - unfilled) > 0.04 * np.linalg.norm(cut)


@pytest.mark.parametrize("powers", [(0.5, 0.35), (0.25, 0.45), (0.0, 0.0)])
def test_singular_factors_are_the_best_of_their_rank(planted_time_split, powers):
    """Against the singular value decomposition of the whole matrix in float64."""
    train = planted_time_split.train
    ones = np.zeros((train.num_queries, train.num_items))
    ones[train.query_codes(), train.item_codes] = 1.0
    a, b = powers
    rows, columns = (np.maximum(ones.sum(axis), 1.0) for axis in (1, 0))
    scaled = rows[:, None] ** -a * ones * columns**-b
    singular = np.linalg.svd(scaled, compute_uv=False)
    history, vectors = (factor.double().numpy() for factor in singular_factors(train, 8, a, b))
    projection = columns[:, None] ** b * (history @ vectors.T) * columns**-b  # V V^T
    assert np.linalg.norm(scaled - scaled @ projection) == pytest.approx(np.sqrt((singular[8:] ** 2).sum()), rel=1e-3)
    assert np.allclose(projection @ projection, projection, atol=1e-4)


def test_large_catalogs_start_at_the_singular_vectors(planted_time_split, monkeypatch):
    monkeypatch.setattr(linear_start, "MOST_ITEMS", 10)
    split, messages = planted_time_split, []
    config, towers, batches = built(split, "item_tower.dimension=8")
    metrics = iter(
        np.full((6, 4), [[0.1], [0.1], [0.2], [0.1], [0.3], [0.1]])
    )  # of three biases for each pair of powers: the second pair, half log p
    assert start_linear(
        towers,
        config,
        split.train,
        batches,
        Communicator(),
        measure=lambda _: next(metrics),
        on_message=messages.append,
    )
    assert "singular vectors" in messages[0] and "powers (0.25, 0.45)" in messages[0]
    history, vectors = singular_factors(split.train, 8, 0.25, 0.45)
    expected = history @ vectors.T
    found = (towers.query_tower.history_items.weight @ towers.item_tower.ids.weight.T).detach()
    scale = float(found.norm() / expected.norm())
    assert torch.allclose(found, scale * expected, atol=1e-4 * float(found.abs().max()))
    assert np.log2(scale) * 2 == pytest.approx(round(np.log2(scale) * 2), abs=1e-3)  # one of the scales that are tried
    counts = split.train.item_counts()
    log_p = np.log((counts + 1.0) / (counts.sum() + len(counts)))
    assert towers.bias.weight.detach()[:, 0].numpy() == pytest.approx(0.5 * log_p, rel=1e-4)


@pytest.mark.parametrize("best", [0, 1])
def test_the_matrix_of_the_first_ridge_is_inverted_once(planted_time_split, monkeypatch, best):
    """The matrix of the first penalty, the usual choice, is kept; that of another is computed again for the towers."""
    split, inverted = planted_time_split, []

    def weights(products, ridge):
        inverted.append(ridge)
        return ease_weights(products, ridge)

    monkeypatch.setattr(linear_start, "ease_weights", weights)
    monkeypatch.setattr(baselines, "ease_weights", weights)
    config, towers, batches = built(split, "training.start_ranks=[1]")
    values = iter([np.full(9, float(place == best)) for place in range(len(RIDGES))])
    start_linear(
        towers, config, split.train, batches, Communicator(),
        measure=lambda model: next(values) if isinstance(model, EASE) else np.zeros(9),
    )  # fmt: skip
    penalties = [float(factor * mean_rows(split.train)) for factor in RIDGES]
    assert inverted == pytest.approx([*penalties, *penalties[1 : best + 1]])
    dimension = config.item_tower.dimension
    history, vectors = linear_factors(gram(split.train), [dimension], penalties[best])[dimension]
    wanted = history @ vectors.T
    found = (towers.query_tower.history_items.weight @ towers.item_tower.ids.weight.T).detach()
    assert torch.allclose(found / found.norm(), wanted / wanted.norm(), atol=1e-4)


def test_ridge_and_rank_are_chosen_on_the_validation(planted_time_split, monkeypatch):
    """The smallest rank within half a per cent of the best, from the decomposition of the best ridge penalty."""
    split, tried = planted_time_split, []
    size = split.train.num_items
    assert built(split)[0].training.start_ranks == [1, 2, 4]
    config, towers, batches = built(split, "training.start_ranks=[1, 2, 3, 4]", "item_tower.dimension=16")
    dimension = config.item_tower.dimension
    assert 3 * dimension <= size // 2 < 4 * dimension, "ranks above half of the items are not tried"
    target = linear_factors(gram(split.train), [2 * dimension], float(2.0 * mean_rows(split.train)))[2 * dimension]
    wanted = target[0] @ target[1].T
    uncut = EASE(split.train, l2=float(2.0 * mean_rows(split.train)))

    def measure(towers):
        """Count as best what is closest to a ridge of 2 and rank 2 D; 3 D is better, but not by a standard error."""
        if isinstance(towers, EASE):
            return np.full(100, -float((towers._weights - uncut._weights).norm()))
        found = (towers.query_tower.history_items.weight @ towers.item_tower.ids.weight.T).detach()
        tried.append(towers.item_tower.dimension)
        likeness = float((found * wanted).sum() / (found.norm() * wanted.norm()))
        return np.full(100, likeness) + (tried[-1] > 2 * dimension) * (likeness < 1) * np.resize([0.5, -0.45], 100)

    choice = start_linear(towers, config, split.train, batches, Communicator(), measure=measure)
    assert (choice.ridge, choice.rank, choice.powers) == (2.0, 2 * dimension, None)
    assert set(tried) == {dimension, 2 * dimension, 3 * dimension}
    assert measure(towers).mean() > 0.9999, "a cut of a larger decomposition"
    assert towers.item_embeddings().shape == (size, 2 * dimension + 1)
    # What is set is not chosen.
    for setting, rank in (
        (f"item_tower.dimension={dimension}", dimension),
        ("training.start_ranks=[2]", 2 * built(split)[0].item_tower.dimension),
    ):
        config, towers, batches = built(split, setting, "training.start_ridge=20")
        choice = start_linear(towers, config, split.train, batches, Communicator(), measure=lambda _: np.ones(3))
        assert (choice.ridge, choice.rank) == (None, rank)


def test_the_scale_does_not_depend_on_the_bias_of_another_rank(planted_time_split):
    """The bias that the first rank chooses is not part of the scores whose scale the second rank chooses."""
    split = planted_time_split

    def scores(*settings):
        config, towers, batches = built(split, *settings, "item_tower.dimension=8", "training.start_ridge=20")

        def measure(towers):
            """Prefer a large bias, and the larger rank."""
            bias = float(towers.bias.weight.detach().abs().mean())
            return np.full(9, bias + towers.item_tower.dimension)

        choice = start_linear(towers, config, split.train, batches, Communicator(), measure=measure)
        assert (choice.bias, choice.rank) == (1.0, 16)
        return (towers.query_tower.history_items.weight @ towers.item_tower.ids.weight.T).detach()

    assert torch.allclose(scores("training.start_ranks=[1, 2]"), scores("training.start_ranks=[2]"), rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("items", "dimension"), [(3, 16), (150, 160), (512, 512), (513, 64), (1682, 208), (20_000, 128), (20_001, 128)]
)
def test_small_catalogs_are_not_cut_by_default(items, dimension):
    data = Interactions.from_frame({"query": [1, 1, 2] * items, "item": np.arange(3 * items) % items})
    defaults = defaults_of(data)
    assert data.num_items == items and defaults["item_tower"]["dimension"] == dimension


def test_the_simplest_choice_within_a_standard_error_is_taken():
    values = np.random.default_rng(0).random(100)
    for gain, taken in ((0.5, "small"), (1.5, "large")):
        more = np.resize([1.0, -1.0], 100)
        more += gain * more.std(ddof=1) / 10
        assert simplest({"small": values, "large": values + more}) == taken
    assert simplest({"small": values, "large": values}) == "small"
    assert simplest({"small": values, "large": values + 0.001}) == "large", "the same gain for every query"
    assert simplest({"small": np.array([0.5]), "large": np.array([0.6])}) == "large"


def mean_rows(train):
    counts = train.item_counts()
    return counts.sum() / (counts > 0).sum()


def test_the_chosen_rank_is_kept_on_resuming(planted_time_split, tmp_path):
    settings = ["training.max_epochs=3", "training.patience=3", "training.start_ranks=[2]"]
    whole = fit(planted_time_split, configured(*settings), directory=tmp_path / "whole", progress=False)
    rank = whole.artifact.metadata["training"]["start"]["rank"]
    assert whole.artifact.config.item_tower.dimension == rank == whole.artifact.towers.item_tower.dimension
    with stopped_after_first_epoch():
        fit(planted_time_split, configured(*settings), directory=tmp_path / "run", progress=False)
    again = fit(planted_time_split, configured(*settings), directory=tmp_path / "run", resume=True, progress=False)
    assert torch.equal(again.artifact.item_embeddings, whole.artifact.item_embeddings)


def test_a_dimension_above_the_rank_is_filled_with_zeros(planted_time_split):
    size = planted_time_split.train.num_items + 5
    history, vectors = linear_factors(gram(planted_time_split.train), [size], 20.0)[size]
    assert history.shape[1] == planted_time_split.train.num_items + 5
    assert bool((history[:, -5:] == 0).all()) and bool((vectors[:, -5:] == 0).all())


def test_the_start_is_the_model_if_no_epoch_is_better(planted_time_split, tmp_path):
    said = []
    settings = ["training.learning_rate=50.0", "training.max_epochs=2", "training.warmup_steps=0"]
    spoilt = fit(planted_time_split, configured(*settings), directory=tmp_path, progress=False, on_message=said.append)
    assert any("no epoch improved on the initial weights" in str(message) for message in said)
    metric = spoilt.artifact.config.training.metric
    assert spoilt.fit.best > max(row[metric] for row in spoilt.fit.history)
    assert spoilt.fit.checkpoint is None
    random = fit(planted_time_split, configured(*settings, "training.start=random"), progress=False)
    assert random.fit.best < spoilt.fit.best


def test_a_start_that_cannot_be_expressed_is_refused(planted_time_split):
    for settings, reason in (
        (["objective.similarity=cosine"], "one head"),
        (["query_tower.history={heads: 1}"], "does not have its own table"),
        (["query_tower.history={heads: 1, share_table: false}"], "cosines"),
    ):
        config, towers, batches = built(planted_time_split, *settings, "training.start=linear")
        with pytest.raises(InputError, match=reason):
            start_linear(towers, config, planted_time_split.train, batches, Communicator())
        automatic = config.model_copy(update={"training": config.training.model_copy(update={"start": "auto"})})
        assert not start_linear(towers, automatic, planted_time_split.train, batches, Communicator())


def test_a_tower_with_an_mlp_starts_at_the_linear_model_too(planted_time_split):
    settings = [
        "query_tower={hidden: [16], dropout: 0.0, history: {heads: 1, share_table: false, power: 0.5, dropout: 0.0}}",
        "objective={similarity: dot, temperature: 1.0}", "item_tower.dimension=100", "training.start_ridge=20",
    ]  # fmt: skip
    config, towers, batches = built(planted_time_split, *settings)
    assert start_linear(towers, config, planted_time_split.train, batches, Communicator())
    ranked = TowerRanker(towers.eval(), 50).rank(planted_time_split.test, 10, True)
    expected = EASE(planted_time_split.train, l2=20.0).rank(planted_time_split.test, 10, True).numpy()
    assert (ranked == expected).mean() > 0.97
    assert towers.query_tower.mlp is not None
    assert torch.isfinite(towers.item_embeddings()).all()
