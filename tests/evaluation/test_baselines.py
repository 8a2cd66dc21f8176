"""The baselines of an evaluation: the best settings on the validation by plain loops; the test plays no part."""

import math

import numpy as np
import pytest
import torch

from support.reference_ranking import knn_scores, metrics, top_items
from support.stand_ins import FakeHoldout, Scores, Train
from twotower.data import Holdout, Interactions, by_time
from twotower.errors import InputError
from twotower.evaluation import (
    BASELINES,
    baselines,
    evaluate,
    evaluate_all,
    fit_baselines,
    holm,
    paired_comparison,
)
from twotower.ranking import EASE, Popularity


@pytest.fixture(scope="module")
def split():
    """Make data in which what is popular drifts, and queries have tastes, split by time."""
    rng = np.random.default_rng(3)
    rows = []
    for day in range(400):
        for query in rng.choice(60, 5, replace=False):
            item = (query % 3) * 20 + int(rng.geometric(0.15)) + day // 80
            rows.append((int(query), item % 60, day))
    users, items, days = zip(*rows, strict=True)
    data = Interactions.from_frame({"user": users, "item": items, "time": [1_600_000_000 + 3600 * d for d in days]})
    return by_time(data, 0.15, 0.15)


def lists(holdout):
    """Return the histories and the targets of a holdout as lists."""
    return [
        [items[start:stop].tolist() for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
        for offsets, items in (
            (holdout.history_offsets, holdout.history_items),
            (holdout.target_offsets, holdout.target_items),
        )
    ]


def slow_ndcg(scores_of, holdout, k=10):
    """Compute the mean NDCG@k without seen items; `scores_of(history)` returns a score for every item."""
    found = []
    for history, targets in zip(*lists(holdout), strict=True):
        left = set(targets) - set(history)
        if left:
            found.append(metrics(top_items(scores_of(history), k, history), left, k)[1])
    return math.fsum(found) / len(found)


def newest_counts(train, share):
    rows = sorted(zip(train.timestamps.tolist(), train.item_codes.tolist(), strict=True), reverse=True)
    oldest = rows[max(round(share * len(rows)), 1) - 1][0]
    counts = [0] * train.num_items
    for time, item in rows:
        counts[item] += time >= oldest
    return counts


def slow_ease(train, l2):
    matrix = np.zeros((train.num_queries, train.num_items))
    matrix[train.query_codes(), train.item_codes] = 1.0
    inverse = np.linalg.inv(matrix.T @ matrix + l2 * np.eye(train.num_items))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0.0)
    return lambda history: weights[sorted(set(history))].sum(axis=0).tolist()


def ranked(ranker, holdout):
    return np.asarray(ranker.rank(holdout, 10, True)).tolist()


def test_the_newest_share_equals_slow_loops(split):
    for share in (0.5, 0.1, 0.013, 1e-9):
        counts = newest_counts(split.train, share)
        expected = [top_items(counts, 10, history) for history in lists(split.test)[0]]
        assert ranked(Popularity(split.train, share), split.test) == expected
    with pytest.raises(ValueError, match="share"):
        Popularity(split.train, 0.0)
    with pytest.raises(ValueError, match="timestamps"):
        Popularity(Train([[0, 1]], 2), 0.5)


def test_settings_are_the_best_on_the_validation_by_slow_loops(split):
    """Every candidate is measured by plain loops; the chosen one is the best of them (of EASE, a local maximum)."""
    train, validation = split.train, split.validation
    fitted = fit_baselines(train, validation)
    assert tuple(fitted.rankers) == BASELINES
    (note,) = fitted.notes
    values = {share: slow_ndcg(lambda h, s=share: newest_counts(train, s), validation) for share in baselines.SHARES}
    best = max(values, key=values.get)
    assert f"newest: the newest {100 * best:g} % of the training rows" in note and best != baselines.SHARES[0]
    rows = [train.item_codes[a:b].tolist() for a, b in zip(train.offsets[:-1], train.offsets[1:], strict=True)]
    values = {
        (neighbours, shrink): slow_ndcg(
            lambda h, n=neighbours, s=shrink: knn_scores(rows, train.num_items, h, n, s), validation
        )
        for neighbours in (5, 20)
        for shrink in baselines.SHRINKAGES
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "NEIGHBOURS", (5, 20))
        knn = fit_baselines(train, validation, names=["item-kNN"]).notes[0]
    chosen = max(values, key=values.get)
    assert values[chosen] > min(values.values())
    assert any(
        f"item-kNN: {n} neighbours, shrinkage {s:g}" in knn
        for (n, s), value in values.items()
        if value >= values[chosen] - 1e-9
    )
    values = [slow_ndcg(slow_ease(train, l2), validation) for l2 in baselines.PENALTIES]
    place = next(n for n, l2 in enumerate(baselines.PENALTIES) if note.endswith(f"EASE: l2 = {l2:g}"))
    assert all(values[place] >= values[near] - 1e-9 for near in (place - 1, place + 1) if 0 <= near < len(values))
    scores = slow_ease(train, baselines.PENALTIES[place])
    assert slow_ndcg(scores, split.test) == pytest.approx(
        evaluate(fitted.rankers["EASE"], split.test, train=train, baselines=False)["model"].values["NDCG@10"], abs=1e-6
    )


def test_the_penalty_may_be_chosen_on_the_popular_items_only(split, monkeypatch):
    train, validation = split.train, split.validation
    monkeypatch.setattr(baselines, "_EASE_ITEMS", 25)
    (note,) = fit_baselines(train, validation, names=["EASE"]).notes
    popular = sorted(sorted(range(train.num_items), key=lambda j: (-train.item_counts()[j], j))[:25])
    code = {item: place for place, item in enumerate(popular)}
    matrix = np.zeros((train.num_queries, train.num_items))
    matrix[train.query_codes(), train.item_codes] = 1.0
    values = []
    for l2 in baselines.PENALTIES:
        part = matrix[:, popular]
        inverse = np.linalg.inv(part.T @ part + l2 * np.eye(25))
        weights = -inverse / np.diag(inverse)
        np.fill_diagonal(weights, 0.0)
        found = []
        for history, targets in zip(*lists(validation), strict=True):
            own = {code[item] for item in history if item in code}
            left = {code[item] for item in targets if item in code} - own
            if left:
                found.append(metrics(top_items(weights[sorted(own)].sum(axis=0).tolist(), 10, own), left, 10)[1])
        values.append(math.fsum(found) / len(found))
    place = next(n for n, l2 in enumerate(baselines.PENALTIES) if note.endswith(f"EASE: l2 = {l2:g}"))
    assert all(values[place] >= values[near] - 1e-9 for near in (place - 1, place + 1) if 0 <= near < len(values))


def test_the_test_plays_no_part_in_the_choice(split):
    """Targets, histories and number of test queries change; every baseline ranks the same queries as before."""
    ranker = Scores(torch.rand(len(split.test), split.train.num_items))
    measured = evaluate(ranker, split.test, train=split.train, validation=split.validation)
    rng = np.random.default_rng(0)
    swapped = Holdout(
        "test",
        split.test.queries,
        split.test.history_offsets,
        split.test.history_items,
        np.arange(len(split.test) + 1),
        rng.integers(0, split.train.num_items, len(split.test)).astype(np.int32),
    )
    again = evaluate(ranker, swapped, train=split.train, validation=split.validation)
    assert [note for note in again.notes if "baselines" in note] == [n for n in measured.notes if "baselines" in n]
    assert [row.values["popularity@10"] for row in again.rows[1:2]] != [] and len(again.rows) == 5


def test_fixed_settings_are_noted_and_names_choose(split):
    train = split.train
    (note,) = fit_baselines(train).notes
    assert (
        "not chosen on validation queries" in note
        and "newest 5 %" in note
        and "10 neighbours" in note
        and "l2 = 300" in note
    )
    assert fit_baselines(train, Holdout.empty("validation")).notes == (note,)
    assert tuple(fit_baselines(train, names=["EASE", "popularity"]).rankers) == ("popularity", "EASE")
    assert ranked(fit_baselines(train, names=["EASE"]).rankers["EASE"], split.test) == ranked(
        EASE(train, 300.0), split.test
    )
    with pytest.raises(InputError, match="'ALS' is unknown; expected names among popularity, newest"):
        fit_baselines(train, names=["ALS"])
    ranker = Scores(torch.rand(len(split.test), train.num_items))
    named = evaluate(ranker, split.test, train=train, baselines=["newest"])
    assert [row.name for row in named.rows] == ["model", "newest"]


def test_what_does_not_fit_is_left_out_with_a_note(split, monkeypatch):
    plain = Train([[0, 1], [1, 2]], 3)
    assert "newest" not in fit_baselines(plain).rankers
    assert "newest baseline was left out: the data has no timestamps" in fit_baselines(plain, names=["newest"]).notes[0]
    assert "20,000 items" in EASE.refusal(Train([[0]], 20_001))
    assert EASE.refusal(split.train, 16 * split.train.num_items**2) is None
    assert "GiB are available" in EASE.refusal(split.train, 16 * split.train.num_items**2 - 1)
    monkeypatch.setattr(baselines, "_PAIRS", 10)
    notes = fit_baselines(split.train, split.validation, names=["item-kNN"]).notes
    assert "not chosen on validation queries: item-kNN: 10 neighbours" in notes[0]


def test_a_sample_of_many_validation_queries_is_enough(split, monkeypatch):
    monkeypatch.setattr(baselines, "MOST_QUERIES", 7)
    seen = []
    original = baselines.ValidationScore.__call__

    def count(self, ranker):
        seen.append(len(self))
        return original(self, ranker)

    monkeypatch.setattr(baselines.ValidationScore, "__call__", count)
    fit_baselines(split.train, split.validation)
    assert set(seen) == {7}


def test_the_verdict_follows_the_paired_test():
    """A model that ranks the target first, one that is like a baseline, and one that ranks it last."""
    rng = np.random.default_rng(0)
    train = Train([rng.integers(0, 30, 8).tolist() for _ in range(300)], 30)
    targets = [[int(rng.integers(0, 30))] for _ in range(300)]
    holdout = FakeHoldout([[] for _ in targets], targets)
    hits = torch.zeros(300, 30)
    hits[torch.arange(300), torch.tensor(targets)[:, 0]] = 1.0

    def said(ranker):
        return str(evaluate(ranker, holdout, train=train, baselines=["popularity"], ks=(10,))).splitlines()

    assert any(
        line.startswith("model is above the best baseline, popularity: NDCG@10 1.0000") for line in said(Scores(hits))
    )
    assert any(line.startswith("model is below the best baseline") for line in said(Scores(-hits)))
    equal = said(Popularity(train))
    assert any(line.startswith("model does not differ significantly from the best baseline") for line in equal)


def test_the_verdict_adjusts_p_for_all_baselines():
    """As in the report; against the paired comparisons themselves."""
    rng = np.random.default_rng(1)
    train = Train([rng.integers(0, 30, 8).tolist() for _ in range(60)], 30)
    targets = [[int(rng.integers(0, 30))] for _ in range(60)]
    holdout = FakeHoldout([[] for _ in targets], targets)
    scores = [torch.from_numpy(rng.normal(size=(60, 30))).float() for _ in range(4)]
    for better in scores[1:]:  # the model is slightly worse
        better[torch.arange(60), torch.tensor(targets)[:, 0]] += 0.7
    measured = evaluate_all({str(at): Scores(one) for at, one in enumerate(scores)}, holdout, train=train, ks=(10,))
    values = [row.per_query["NDCG@10"] for row in measured.rows]
    plain = [paired_comparison(values[0], other).p_value for other in values[1:]]
    best = int(np.argmax([other.mean() for other in values[1:]]))
    adjusted = holm(plain)[best]
    assert plain[best] < adjusted < 1
    assert f"(p = {adjusted:.3f}, adjusted for 3 baselines)" in str(measured)
