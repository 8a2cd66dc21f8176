"""Rows sorted by item id are found, and their order is not used; random rows of each query are held out."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from support.slow_reference import as_questions, as_sequences
from twotower.data import Interactions, from_parts, held_out_queries, leave_last_out, random_rows
from twotower.data.splits.row_order import sorted_by_item
from twotower.errors import InputError

Pairs = list[tuple[int, int]]


def some_pairs(seed: int = 0, queries: int = 80, items: int = 50, repeats: bool = False) -> Pairs:
    rng = np.random.default_rng(seed)
    pairs = []
    for query in range(queries):
        size = int(rng.integers(1, 20))
        pairs += [(query, int(item)) for item in rng.choice(items, size, replace=repeats)]
    return [pairs[place] for place in rng.permutation(len(pairs))]


def interactions(pairs: Pairs, **options: Any) -> Interactions:
    return Interactions.from_frame(pl.DataFrame(pairs, schema=["user", "item"], orient="row"), **options)


def items_of(data: Interactions) -> dict[Any, list[Any]]:
    return {query: [item for item, _ in line] for query, line in as_sequences(data).items()}


def test_files_sorted_by_item_are_found_and_others_are_not() -> None:
    pairs = some_pairs()
    assert not sorted_by_item(interactions(pairs))
    assert sorted_by_item(interactions(sorted(pairs))), "by query, then item"
    assert sorted_by_item(interactions(sorted(pairs, key=lambda pair: pair[1]))), "by item alone"
    assert sorted_by_item(interactions(sorted(some_pairs(repeats=True)))), "with repeated pairs"
    nearly = sorted(pairs)
    nearly[10], nearly[11] = nearly[11], nearly[10]
    assert sorted_by_item(interactions(nearly))
    text = pl.DataFrame(sorted((f"u{q}", f"i{i:03d}") for q, i in pairs), schema=["user", "item"], orient="row")
    assert sorted_by_item(Interactions.from_frame(text))
    timed = pl.DataFrame(sorted(pairs), schema=["user", "item"], orient="row").with_row_index("time")
    assert not sorted_by_item(Interactions.from_frame(timed)), "timestamps are the order"


def test_an_order_that_chance_or_growing_ids_explain_is_not_taken_for_sorted() -> None:
    assert not sorted_by_item(interactions([(query, item) for query in range(10) for item in (1, 2, 3)])), "20 steps"
    one_each = [(query, query % 7) for query in range(500)]
    assert not sorted_by_item(interactions(one_each)), "no query has two rows"
    rng = np.random.default_rng(0)
    # Ids are given in the order in which items appear, and queries mostly take recent ones.
    news = [(int(rng.integers(40)), max(0, moment // 4 - int(rng.geometric(0.08)))) for moment in range(2000)]
    assert not sorted_by_item(interactions(news))


@pytest.mark.parametrize(("name", "expected"), [("steam/train.csv", False), ("gowalla/train.txt", False),
                                                ("ml-1m-loo", False), ("amazon/beauty.txt", False)])  # fmt: skip
def test_published_files(real_data: Path, name: str, expected: bool) -> None:
    assert sorted_by_item(Interactions.read(real_data / name)) is expected


def test_leave_last_out_is_refused_and_other_splits_shuffle() -> None:
    pairs = sorted(some_pairs(1))
    data = interactions(pairs)
    with pytest.raises(InputError, match="sorted by item id.*use data.split=random"):
        leave_last_out(data)
    for split in (random_rows(data), held_out_queries(data)):
        assert split.account.count("sorted by item id") == len(data)
        assert not sorted_by_item(split.train)
        assert split.data.fingerprint == data.fingerprint
        assert {q: sorted(line) for q, line in items_of(split.data).items()} == items_of(data)
        assert items_of(split.data) != items_of(data)
    again = random_rows(interactions(pairs))
    assert items_of(again.data) == items_of(random_rows(data).data), "the same shuffle every time"


def test_ready_made_parts_are_shuffled_within_each_part() -> None:
    pairs = some_pairs(2)
    parts = [interactions(sorted(pairs[start::3]), catalog="interactions") for start in range(3)]
    split = from_parts(*parts)
    assert split.account.count("sorted by item id") == len(pairs)
    train = items_of(parts[0])
    assert {q: sorted(line) for q, line in items_of(split.train).items()} == train
    assert items_of(split.train) != train
    for query, (history, targets) in as_questions(split.data, split.test).items():
        known = train.get(query, [])
        assert sorted(history[: len(known)]) == known, "training rows come before validation rows"
        assert sorted(history[len(known) :]) == items_of(parts[1]).get(query, [])
        assert sorted(targets) == items_of(parts[2])[query]


@pytest.mark.parametrize("repeats", [False, True])
def test_random_rows_match_the_loops(repeats: bool) -> None:
    pairs = some_pairs(3, queries=400, items=60, repeats=repeats)
    data = interactions(pairs)
    split = random_rows(data, 0.1, 0.2, cold="keep", seed=5)
    lines: dict[int, list[int]] = {}
    for query, item in pairs:
        lines.setdefault(query, []).append(item)
    train = items_of(split.train)
    held = {name: as_questions(data, getattr(split, name)) for name in ("validation", "test")}
    for query, line in lines.items():
        _, validation = held["validation"].get(query, ([], []))
        history, test = held["test"].get(query, ([], []))
        assert set(train[query]) | set(validation) | set(test) == set(line)
        assert not (set(train[query]) & set(validation) | set(train[query]) & set(test) | set(validation) & set(test))
        assert train[query] == [item for item in line if item in set(train[query])], "training rows keep their order"
        if test:
            assert history == [item for item in line if item not in test]
        if validation:
            assert held["validation"][query][0] == train[query]
        if len(set(line)) < 3:
            assert train[query] == line
    long = sum(len(set(line)) for line in lines.values() if len(set(line)) >= 3)
    for name, share in (("validation", 0.1), ("test", 0.2)):
        assert len(getattr(split, name).target_items) == pytest.approx(share * long, rel=0.08)
    again = random_rows(data, 0.1, 0.2, cold="keep", seed=5)
    assert np.array_equal(again.test.target_items, split.test.target_items)
    other = random_rows(data, 0.1, 0.2, cold="keep", seed=6)
    assert not np.array_equal(other.test.target_items, split.test.target_items)


def test_random_rows_are_drawn_from_all_places_of_a_query() -> None:
    pairs = [(query, 100 * query + place) for query in range(2000) for place in range(5)]
    split = random_rows(interactions(pairs[::-1]), 0.2, 0.2, cold="keep")
    for holdout in (split.validation, split.test):
        places = np.bincount(np.asarray(split.data.items.decode(holdout.target_items)) % 100, minlength=5)
        assert places.sum() == 2000 and places.min() > 330 and places.max() < 470


def test_random_rows_hold_out_no_observed_negative_of_a_held_out_pair() -> None:
    frame = pl.DataFrame({"user": [q for q in range(50) for _ in range(12)], "item": list(range(12)) * 50})
    frame = pl.concat([frame, frame]).with_columns(rating=pl.Series([1] * len(frame) + [0, 1] * (len(frame) // 2)))
    split = random_rows(Interactions.from_frame(frame, positive_label=1), 0.1, 0.2, cold="keep")
    assert split.train.negatives is not None
    below = items_of(split.train.negatives)
    for holdout in (split.validation, split.test):
        for query, (_, targets) in as_questions(split.data, holdout).items():
            assert not set(below[query]) & set(targets)
    assert len(split.train.negatives) == split.account.count("training negatives") > 200


def test_impossible_random_splits_say_which_setting_to_change(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="use a larger data.validation"):
        random_rows(interactions([(1, 1), (1, 2), (2, 1), (2, 2)]))
    with pytest.raises(InputError, match="data.validation=0.6, data.test=0.6"):
        random_rows(interactions(some_pairs()), 0.6, 0.6)
