"""Tests of slices against loops: deciles, cold and warm, columns of the tables."""

import io
import math
import re
from datetime import timedelta

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from support.reference_ranking import metrics as slow_metrics
from support.reference_ranking import parts, top_items
from support.stand_ins import FakeHoldout, Scores, Train
from twotower.errors import InputError
from twotower.evaluation import COLD, DECILES, SLICES, check_slices, evaluate, popularity_parts, popularity_thirds
from twotower.evaluation.slices import column_slices


@given(st.lists(st.integers(0, 20), min_size=1, max_size=40), st.integers(1, 12))
def test_parts_equal_slow_loops(counts, number):
    assert popularity_parts(np.array(counts), number).tolist() == parts(counts, number)


def test_parts_by_hand():
    counts = np.array([50, 10, 10, 10, 10, 10])
    assert popularity_parts(counts, 10).tolist() == [0, 5, 6, 7, 8, 9]
    assert popularity_parts(counts, 3).tolist() == popularity_thirds(counts).tolist() == [0, 1, 1, 2, 2, 2]
    assert popularity_parts(np.zeros(2, dtype=np.int64), 4).tolist() == [3, 3]
    with pytest.raises(ValueError, match="parts"):
        popularity_parts(counts, 0)


GENRES = ["comedy", "drama", "war", "other", None]


@st.composite
def problems(draw):
    n, q = draw(st.integers(2, 15)), draw(st.integers(1, 6))
    item = st.integers(0, n - 1)
    train = Train(draw(st.lists(st.lists(item, max_size=8), min_size=q, max_size=q)), n)
    e = draw(st.integers(1, 5))
    holdout = FakeHoldout([[]] * e, draw(st.lists(st.lists(item, min_size=1, max_size=5), min_size=e, max_size=e)))
    holdout.queries = np.array(draw(st.lists(st.integers(-1, q - 1), min_size=e, max_size=e)), dtype=np.int64)
    genres = draw(st.lists(st.lists(st.sampled_from(GENRES[:4]), max_size=3), min_size=n, max_size=n))
    train.item_table = pl.DataFrame({"genres": genres}, schema={"genres": pl.List(pl.String)})
    regions = draw(st.lists(st.sampled_from(GENRES), min_size=q, max_size=q))
    train.query_table = pl.DataFrame({"region": regions}, schema={"region": pl.String})
    scores = draw(st.lists(st.lists(st.integers(-2, 2), min_size=n, max_size=n), min_size=e, max_size=e))
    return train, holdout, scores, draw(st.integers(1, n))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_every_slice_equals_slow_loops(problem):
    train, holdout, scores, k = problem
    result = evaluate(
        Scores(torch.tensor(scores).float()), holdout, train=train, ks=(k,), exclude_seen=False, baselines=False,
        slices=("items.genres", "queries.region"),
    )  # fmt: skip
    counts, genres = train.item_counts().tolist(), train.item_table["genres"].to_list()
    regions = [None if q < 0 else train.query_table["region"][int(q)] for q in holdout.queries]
    seen = [q >= 0 and len(train.rows[q]) > 0 for q in holdout.queries]
    decile = parts(counts, 10)
    everything, everybody = set(range(train.num_items)), [True] * len(holdout)
    expected = {f"decile {d + 1}": ({j for j in everything if decile[j] == d}, everybody) for d in range(10)}
    expected["cold items"] = ({j for j in everything if not counts[j]}, everybody)
    expected["warm items"] = ({j for j in everything if counts[j]}, everybody)
    expected["cold queries"] = (everything, [not s for s in seen])
    expected["warm queries"] = (everything, seen)
    for name in {g for row in genres for g in row or ["missing"]}:
        expected[f"items.genres={name}"] = ({j for j in everything if name in (genres[j] or ["missing"])}, everybody)
    asked_regions = ["missing" if region is None else region for region in regions]
    in_table = {"missing" if r is None else r for r in train.query_table["region"]} | set(asked_regions)
    for name in in_table:
        expected[f"queries.region={name}"] = (everything, [region == name for region in asked_regions])

    row = result["model"]
    assert set(row.slices) == set(result.slice_sizes) == {*SLICES, *expected}
    assert list(result.slice_groups) == ["thirds", "deciles", "cold", "items.genres", "queries.region"]
    assert result.slice_groups["deciles"] == DECILES and result.slice_groups["cold"] == COLD
    assert {name for group in result.slice_groups.values() for name in group} == set(row.slices)
    for label, (items, queries) in expected.items():
        lists = [top_items(scores[e], k) for e in range(len(holdout))]
        wanted = [set(t) & items if queries[e] else set() for e, t in enumerate(holdout.targets)]
        slow = [slow_metrics(r, t, k)[:2] if t else (math.nan, math.nan) for r, t in zip(lists, wanted, strict=True)]
        for place, metric in enumerate(("Recall", "NDCG")):
            values = [value[place] for value in slow]
            np.testing.assert_allclose(row.per_query[f"{label}/{metric}@{k}"], values, err_msg=label)
            known = [value for value in values if not math.isnan(value)]
            mean = math.fsum(known) / len(known) if known else math.nan
            assert row.slices[label][f"{metric}@{k}"] == pytest.approx(mean, nan_ok=True)
        assert result.slice_sizes[label] == {
            "items": len(items), "targets": sum(map(len, wanted)), "queries": sum(map(bool, wanted)),
        }  # fmt: skip


def of_items(values, **column):
    train = Train([[0]], len(values))
    train.item_table = pl.DataFrame({"x": pl.Series(values, **column)})
    found = column_slices(train, np.array([0]), ["items.x"])["items.x"]
    return {name.removeprefix("items.x="): np.flatnonzero(part.items).tolist() for name, part in found.items()}


def test_numbers_are_cut_in_quarters():
    assert of_items([5, 1, 3, 4, 2, 8, 7, 6]) == {
        "1 to 2": [1, 4],
        "3 to 4": [2, 3],
        "5 to 6": [0, 7],
        "7 to 8": [5, 6],
    }
    # Equal values stay together; a null or NaN is missing.
    assert of_items([0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 2.0, 3.0, 4.0, None, math.nan]) == {
        "0.5": [0, 1, 2, 3, 4], "1 to 2": [5, 6], "3 to 4": [7, 8], "missing": [9, 10],
    }  # fmt: skip
    assert of_items([3, 1, 1, None]) == {"1": [1, 2], "3": [0], "missing": [3]}  # few values are slices of their own
    assert of_items([True, False, True]) == {"true": [0, 2], "false": [1]}
    days = pl.date_range(pl.date(2020, 1, 1), pl.date(2020, 1, 8), eager=True)
    assert list(of_items(days)) == [f"2020-01-0{d} to 2020-01-0{d + 1}" for d in (1, 3, 5, 7)]


def test_only_the_most_frequent_values_get_their_own_slice():
    values = [f"v{v:02d}" for v in range(30) for _ in range(40 - v)]
    found = of_items(values)
    assert list(found) == [*(f"v{v:02d}" for v in range(20)), "other"]
    assert len(found["other"]) == sum(40 - v for v in range(20, 30))
    assert sorted(row for rows in found.values() for row in rows) == list(range(len(values)))
    lists = of_items([["a", "b"], ["b", "b"], [], None, [None]], dtype=pl.List(pl.String))
    assert lists == {"b": [0, 1], "a": [0], "missing": [2, 3, 4]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("items.genre", "no column 'genre'; the table of items has 'genres', 'year'"),
        ("queries.age", "no table of queries"),
        ("genres", "expected items.COLUMN"),
        ("items.", "expected items.COLUMN"),
        ("users.age", "expected items.COLUMN"),
    ],
)
def test_slices_by_missing_columns_are_refused(name, message):
    train = Train([[0]], 1)
    train.item_table = pl.DataFrame({"genres": ["a"], "year": [1]})
    with pytest.raises(InputError, match=message):
        check_slices(train, [name])
    with pytest.raises(InputError, match=message):
        evaluate(
            Scores(torch.rand(1, 1)), FakeHoldout([[]], [[0]]), train=train, ks=(1,), baselines=False, slices=[name]
        )
    check_slices(train, ["items.genres"])


@pytest.mark.parametrize("value", [b"\xff", timedelta(1), [b"\xff"], [["a"]]])
def test_values_without_a_name_are_refused_before_any_work(value):
    train = Train([[0]], 1)
    train.item_table = pl.DataFrame({"zz": [value]})
    with pytest.raises(InputError, match=r"evaluation\.slices: column 'zz' has .*; expected text"):
        check_slices(train, ["items.zz"])


def test_the_terminal_shows_cold_and_user_slices_in_80_columns():
    random = np.random.default_rng(0)
    train = Train([random.integers(0, 40, 10).tolist() for _ in range(30)], 50)  # 10 items are cold
    holdout = FakeHoldout([[]] * 20, random.integers(0, 50, (20, 3)).tolist())
    plain = str(evaluate(Scores(torch.rand(20, 50)), holdout, train=train, baselines=False, ks=(10,)))
    assert "cold items" in plain and "decile" not in plain
    train.item_table = pl.DataFrame({"kind": [f"a kind with a very long name, number {j % 3}" for j in range(50)]})
    rankers = {f"objective-number-{j}": Scores(torch.rand(20, 50)) for j in range(9)}
    result = evaluate(
        Scores(torch.rand(20, 50)), holdout, train=train, baselines=rankers, ks=(10,), slices=["items.kind"]
    )
    text = str(result)
    own = text[text.index("Recall@10") :]
    assert "items.kind=a kind with a very…" in own and "queries" in own
    assert max(map(len, own.split("\n\n")[0].splitlines())) <= 80
    warm = Train([list(range(50))] * 70, 50)
    holdout.queries = np.arange(20)
    assert "cold" not in str(evaluate(Scores(torch.rand(20, 50)), holdout, train=warm, baselines=False, ks=(10,)))


def test_values_of_the_data_are_shown_as_text():
    """Markup would raise an error or change the value, and escape sequences would reach the terminal."""
    values = ["[/b]", "[red]x", "a [live] b", "\x1b[31my", "a\nb", "\u202ecba"]
    random = np.random.default_rng(0)
    train = Train([random.integers(0, 48, 10).tolist() for _ in range(30)], 48)
    train.item_table = pl.DataFrame({"kind": [values[j % 6] for j in range(48)]})
    holdout = FakeHoldout([[]] * 20, random.integers(0, 48, (20, 3)).tolist())
    scores = Scores(torch.rand(20, 48))
    result = evaluate(scores, holdout, train=train, baselines=False, ks=(10,), slices=["items.kind"])
    console = Console(width=120, record=True, file=io.StringIO(), force_terminal=False)
    console.print(result)
    for text in (str(result), console.export_text()):
        for value in ("[/b]", "[red]x", "a [live] b", r"\x1b[31my", r"a\nb", r"\u202ecba"):
            assert f"items.kind={value} " in text
        assert not re.search("[\x1b\u202e]", text)
