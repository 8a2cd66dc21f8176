"""Explanations, compared with recommendations without one item of the history."""

import json

import numpy as np
import pytest

from twotower.errors import InputError


def logit_of(retriever, history, item, b=1.0):
    """Return the score of an item for a history, in logits."""
    found = retriever.recommend(histories=[history], k=100, exclude_seen=False, popularity=b)
    scores = dict(zip(found["item"], found["score"], strict=True))
    return scores[item] / float(retriever.artifact.towers.temperature.detach())


@pytest.mark.parametrize("b", [1.0, 0.5])
def test_contributions_are_the_logits_lost_without_them(model, b):
    retriever, history = model.retriever, [1, 3, 5, 8, 11]
    explanation = retriever.explain(history=history, item=7, popularity=b)
    whole = logit_of(retriever, history, 7, b)
    assert explanation.logit == pytest.approx(whole, abs=1e-4)
    got = dict(zip(explanation.history["item"], explanation.history["contribution"], strict=True))
    for place, item in enumerate(history):
        without = history[:place] + history[place + 1 :]
        assert got[item] == pytest.approx(whole - logit_of(retriever, without, 7, b), abs=1e-3)
    assert explanation.history["contribution"].is_sorted(descending=True)
    assert explanation.history["title"][0] == f"Item number {explanation.history['item'][0]}"


def test_odd_items_contribute_to_an_odd_item(model):
    explanation = model.retriever.explain(history=[1, 3, 5, 7, 2], item=9)
    assert explanation.history["item"][-1] == 2, "the even item contributes least"


def test_items_older_than_the_tower_reads_move_up(model):
    """L is 10; without one of the last ten items, the eleventh takes its place."""
    history = list(range(1, 60, 4))
    explanation = model.retriever.explain(history=history, item=3)
    assert sorted(explanation.history["item"]) == history[-10:]
    whole = logit_of(model.retriever, history, 3)
    without = logit_of(model.retriever, history[:-1], 3)
    got = dict(zip(explanation.history["item"], explanation.history["contribution"], strict=True))
    assert got[history[-1]] == pytest.approx(whole - without, abs=1e-3)


def test_popularity_is_the_fitted_part_of_the_lift(model):
    retriever, artifact = model.retriever, model.artifact
    explanation = retriever.explain("u005", item=1)
    found = retriever.recommend(["u005"], k=100, exclude_seen=False)
    codes = artifact.items.encode(found["item"].to_list())
    logits = np.empty(100)
    logits[codes] = found["score"].to_numpy() / float(artifact.towers.temperature.detach())
    counts = artifact.item_counts.numpy() + 1
    log_p = np.log(counts / counts.sum())
    slope, intercept = np.polyfit(log_p, logits, 1)
    code = artifact.items.encode([1])[0]
    assert explanation.popularity == pytest.approx(slope * log_p[code] + intercept - logits.mean(), abs=1e-3)
    assert explanation.lift == pytest.approx(logits[code] - logits.mean(), abs=1e-4)
    assert (
        explanation.popularity_share == pytest.approx(explanation.popularity / explanation.lift)
        if explanation.lift > 0
        else True
    )
    assert json.loads(json.dumps(explanation.to_dict()))["item"] == 1


def test_refusals(model):
    for ask, message in [
        (lambda r: r.explain("nobody", item=1), "query 'nobody'"),
        (lambda r: r.explain("u001", item=777), "item 777"),
        (lambda r: r.explain(item=1), "expected query, history or context; found none of them"),
        (lambda r: r.explain(history=[777], item=1), "none of its items"),
    ]:
        with pytest.raises(InputError, match=message):
            ask(model.retriever)


def test_titles_are_found_by_substring(model):
    found = model.retriever.search_titles("NUMBER 1", k=5)
    assert found.columns == ["item", "title", "interactions"]
    assert all("number 1" in title.lower() for title in found["title"])
    assert found["interactions"].is_sorted(descending=True)
    starts = model.retriever.search_titles("item number 99")
    assert starts["item"].to_list() == [99] and len(model.retriever.search_titles("%_.*")) == 0
    with pytest.raises(InputError, match="k: expected"):
        model.retriever.search_titles("x", k=0)


def test_describe_returns_everything_known_about_an_item(priced):
    found = priced.describe([4, 0])
    assert found["title"].to_list() == ["Item number 4", "Item number 0"]
    assert found["country"].to_list() == ["DE", "FR"]
    assert found["interactions"].to_list() == priced.artifact.item_counts[[4, 0]].tolist()
