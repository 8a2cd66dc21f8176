"""BM25 and reciprocal rank fusion against slow loops over the formula."""

import math

import numpy as np
import polars as pl
import pytest

from twotower.errors import InputError
from twotower.ranking.bm25 import BM25, fuse

TEXTS = [
    "The wing of a plane",
    "wing wing wing, slipstream!",
    None,
    "boundary layer: flow over a flat plate",
    "",
    "flow",
    "A Wing in a flow, and a plate under the wing",
]


def slow_scores(query, texts, k1, b):
    def split(text):
        cleaned = "".join(c if c.isalnum() or c == "_" else " " for c in (text or "").lower())
        return [word for word in cleaned.split() if len(word) > 1]

    documents = [split(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in split(query):
            holding = sum(word in other for other in documents)
            times = document.count(word)
            if times:
                idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
                score += idf * times / (times + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return np.array(scores)


@pytest.mark.parametrize("query", ["wing flow", "WING wing plate", "nothing of this", "", "a flat-plate FLOW, flow"])
@pytest.mark.parametrize(("k1", "b"), [(1.5, 0.75), (0.9, 0.0), (2.0, 1.0)])
def test_the_scores_are_those_of_the_formula(query, k1, b):
    texts = pl.Series(TEXTS)
    assert BM25(texts, k1=k1, b=b).scores(query) == pytest.approx(slow_scores(query, TEXTS, k1, b), abs=1e-5)


def test_ranked_are_the_items_with_a_word_in_common_ties_by_code():
    ranked = BM25(pl.Series([*TEXTS, "flow"])).rank(["flow wing", "unknown", "flow"], 5)
    slow = slow_scores("flow wing", [*TEXTS, "flow"], 1.5, 0.75)
    wanted = [item for item in np.argsort(-slow, kind="stable") if slow[item] > 0][:5]
    assert ranked[0, : len(wanted)].tolist() == wanted
    assert ranked[1].tolist() == [-1] * 5 and ranked[2].tolist()[:2] == [5, 7]
    alive = np.ones(8, dtype=bool)
    alive[5] = False
    assert BM25(pl.Series([*TEXTS, "flow"])).rank(["flow"], 2, alive)[0, 0] == 7


def test_items_without_words_are_refused():
    with pytest.raises(InputError, match="no item has a text with a word"):
        BM25(pl.Series(["a", None, "!"], dtype=pl.String))


def test_without_the_package_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "bm25s", None)
    with pytest.raises(InputError, match=r"pip install 'twotower\[text\]'"):
        BM25(pl.Series(["wing"]))


def test_fusion_is_the_sum_of_reciprocal_ranks():
    rng = np.random.default_rng(0)
    rankings = []
    for length in (12, 9):
        rows = np.stack([rng.permutation(20)[:length] for _ in range(30)])
        rows[::3, length - 4 :] = -1
        rankings.append(rows)
    fused = fuse(rankings, 15)
    for row in range(30):
        lists = [[item for item in ranking[row] if item >= 0] for ranking in rankings]
        scores = {
            item: sum(1 / (60 + one.index(item) + 1) for one in lists if item in one) for item in {*lists[0], *lists[1]}
        }
        found = [item for item in fused[row] if item >= 0]
        assert len(found) == min(15, len(scores)) == len(set(found))
        assert [scores[item] for item in found] == pytest.approx(sorted(scores.values(), reverse=True)[:15], abs=1e-12)
    # With equal scores, the item of the first ranking comes first.
    assert fuse([np.array([[3, 5]]), np.array([[5, 3]])], 3).tolist() == [[3, 5, -1]]
