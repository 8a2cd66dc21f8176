"""Splits, compared with plain loops over ids, and on real data."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.slow_reference import Row, as_questions, as_sequences, distinct, sequences
from twotower.data import Interactions, Split, by_time, from_parts, held_out_queries, leave_last_out
from twotower.data.datasets import registry
from twotower.errors import InputError

SECOND = 1_000_000
Questions = dict[Any, tuple[list[Any], list[Any]]]


def interactions(rows: list[Row], **columns: Any) -> Interactions:
    frame = pl.DataFrame([(q, i, t // SECOND) for q, i, t in rows], schema=["user", "item", "time"], orient="row")
    return Interactions.from_frame(frame.with_columns(**columns))


def some_rows(n: int = 400, seed: int = 0, queries: int = 25) -> list[Row]:
    rng = random.Random(seed)
    return [(rng.randint(1, queries), rng.randint(1, 40), rng.randint(0, 300) * SECOND) for _ in range(n)]


def slow_by_time(rows: list[Row], cuts: list[int], cold: str) -> tuple[dict[Any, Any], Questions, Questions]:
    lines = sequences(rows)
    train = {q: [x for x in line if x[1] < cuts[0]] for q, line in lines.items()}
    train = {q: line for q, line in train.items() if line}
    known = {item for line in train.values() for item, _ in line}
    questions: list[Questions] = [{}, {}]
    for k, (low, high) in enumerate(((cuts[0], cuts[1]), (cuts[1], None))):
        for q, line in lines.items():
            targets = [i for i, t in line if t >= low and (high is None or t < high)]
            if cold == "drop":
                targets = [i for i in targets if i in known] if q in train else []
            if targets:
                questions[k][q] = ([i for i, t in line if t < low], distinct(targets))
    return train, questions[0], questions[1]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["drop", "keep"]), st.floats(0.05, 0.3), st.floats(0.05, 0.3))
def test_by_time_matches_the_loops(seed: int, cold: Any, validation: float, test: float) -> None:
    rows = some_rows(seed=seed)
    data = interactions(rows)
    split = by_time(data, validation, test, cold=cold)
    cuts = split.settings["cuts"]
    ordered = sorted(t for line in sequences(rows).values() for _, t in line)
    assert cuts == [ordered[round(len(data) * (1 - test - validation))], ordered[round(len(data) * (1 - test))]]
    train, questions_validation, questions_test = slow_by_time(rows, cuts, cold)
    assert as_sequences(split.train) == train
    assert as_questions(data, split.validation) == questions_validation
    assert as_questions(data, split.test) == questions_test


def test_by_time_never_looks_ahead() -> None:
    split = by_time(interactions(some_rows(2000, queries=50)))
    assert split.train.timestamps is not None
    for holdout in (split.validation, split.test):
        assert holdout.history_timestamps is not None
        assert holdout.query_times is not None
        assert split.train.timestamps.max() < holdout.query_times.min()
        owner = np.repeat(np.arange(len(holdout)), np.diff(holdout.history_offsets))
        assert (holdout.history_timestamps < holdout.query_times[owner]).all()
        assert len(holdout.history_timestamps) == len(holdout.history_items)


def test_rows_of_one_timestamp_have_no_split_by_time() -> None:
    rows: list[Row] = [(query, item, 1_704_067_200 * SECOND) for query in range(9) for item in range(5)]
    with pytest.raises(InputError, match=r"same timestamp, 2024-01-01 00:00:00, .*data.split=leave-last-out"):
        by_time(interactions(rows))
    leave_last_out(interactions(rows))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_by_time_for_models_that_read_histories_keeps_queries_that_have_one(seed: int) -> None:
    """A query whose first rows lie in the validation has no training row, but a history when the test asks."""
    data = interactions(some_rows(400, seed, queries=120))
    plain, kept = by_time(data, 0.2, 0.3), by_time(data, 0.2, 0.3, histories=True)
    known = set(as_sequences(kept.train))
    items = {item for line in as_sequences(kept.train).values() for item, _ in line}
    everything = as_questions(data, by_time(data, 0.2, 0.3, cold="keep").test)
    expected = {
        query: (history, warm)
        for query, (history, targets) in everything.items()
        if history and (warm := [item for item in targets if item in items])
    }
    assert as_questions(data, kept.test) == expected
    assert as_questions(data, plain.test) == {q: asked for q, asked in expected.items() if q in known}
    assert as_questions(data, kept.validation) == as_questions(data, plain.validation)
    new = set(expected) - known
    assert kept.account.count("test: queries without training rows") == len(new)
    assert kept.settings["histories"] is True


def test_data_without_a_past_is_refused_with_what_to_use() -> None:
    with pytest.raises(InputError, match="every row has the same timestamp, 1970-01-01 00:00:05.*leave-last-out"):
        by_time(interactions([(q, i, 5 * SECOND) for q in range(9) for i in range(9)]))
    with pytest.raises(InputError, match="lower data.validation and data.test"):
        by_time(interactions([(q, i, (q + i > 0) * SECOND) for q in range(3) for i in range(3)]), 0.5, 0.49)


def test_the_account_of_by_time_adds_up() -> None:
    data = interactions(some_rows(2000, queries=300))
    split = by_time(data)
    account = split.account
    held = account.count("validation: rows held out") + account.count("test: rows held out")
    assert account.count("training rows") + held == len(data)
    assert account.count("test: targets") == len(split.test.target_items)
    assert account.count("test: cold queries") > 0
    assert "dropped" in str(account)


def test_training_negatives_are_never_later_than_the_cut() -> None:
    frame = pl.DataFrame({"user": [1] * 40, "item": list(range(20)) * 2, "time": list(range(40))})
    data = Interactions.from_frame(frame.with_columns(rating=pl.int_range(40) % 2), positive_label=1)
    split = by_time(data, cold="keep")
    assert split.train.negatives is not None
    assert split.train.negatives.timestamps is not None
    assert split.train.negatives.timestamps.max() < split.settings["cuts"][0]
    last = leave_last_out(data)
    assert last.train.negatives is not None
    assert last.train.negatives.timestamps is not None
    assert last.train.negatives.timestamps.max() < data.timestamps[-2]  # type: ignore[index]


@pytest.mark.parametrize("chosen_queries", [None, "chosen", [3, 5, 9], 4, 0.25])
def test_leave_last_out_matches_the_loops(chosen_queries: Any) -> None:
    rows = some_rows(120, queries=40)
    data = interactions(rows)
    data.query_table = pl.DataFrame({"user": data.queries.ids, "chosen": [q % 3 == 0 for q in data.queries.ids]})
    split = leave_last_out(data, chosen_queries)
    questions = as_questions(data, split.validation)
    lines = {q: [i for i, _ in line] for q, line in sequences(rows).items()}
    long = {q for q, line in lines.items() if len(line) >= 3}
    if chosen_queries is None:
        assert set(questions) == long
    elif chosen_queries == "chosen":
        assert set(questions) == {q for q in long if q % 3 == 0}
    elif isinstance(chosen_queries, list):
        assert set(questions) == long & set(chosen_queries)
    else:
        assert len(questions) == (
            chosen_queries if isinstance(chosen_queries, int) else round(chosen_queries * len(long))
        )
    assert questions == {q: (lines[q][:-2], lines[q][-2:-1]) for q in questions}
    assert as_questions(data, split.test) == {q: (lines[q][:-1], lines[q][-1:]) for q in long}
    expected = {q: line[: -2 if q in questions else -1] if q in long else line for q, line in lines.items()}
    assert {q: [i for i, _ in line] for q, line in as_sequences(split.train).items()} == expected
    assert split.account.count("short queries") == len(lines) - len(long)
    assert "data.split=time" in str(split.account)


def test_leave_last_out_can_drop_cold_items() -> None:
    data = Interactions.from_frame({"user": [1] * 4 + [2] * 4, "item": [1, 2, 3, 9, 1, 3, 2, 3]})
    assert as_questions(data, leave_last_out(data).test) == {1: ([1, 2, 3], [9]), 2: ([1, 3, 2], [3])}
    assert as_questions(data, leave_last_out(data, cold="drop").test) == {2: ([1, 3, 2], [3])}


def test_held_out_queries_are_never_trained_on() -> None:
    rows = some_rows(600, queries=60)
    data = interactions(rows)
    split = held_out_queries(data, 0.1, 0.2, fold_in=0.7, cold="keep", seed=3)
    lines = {q: [i for i, _ in line] for q, line in sequences(rows).items()}
    questions = as_questions(data, split.validation) | as_questions(data, split.test)
    assert (len(split.validation), len(split.test)) == (6, 12)
    assert not set(questions) & set(as_sequences(split.train))
    assert set(questions) | set(as_sequences(split.train)) == set(lines)
    for query, (history, targets) in questions.items():
        at = min(max(int(0.7 * len(lines[query])), 1), len(lines[query]) - 1)
        assert (history, targets) == (lines[query][:at], distinct(lines[query][at:]))
    again = held_out_queries(data, 0.1, 0.2, fold_in=0.7, cold="keep", seed=3)
    assert again.test.queries.tolist() == split.test.queries.tolist()
    assert held_out_queries(data, 0.1, 0.2, seed=4).test.queries.tolist() != split.test.queries.tolist()


def test_no_validation_is_an_empty_holdout() -> None:
    assert len(by_time(interactions(some_rows()), validation=0).validation) == 0
    assert len(held_out_queries(interactions(some_rows()), validation=0).validation) == 0


def test_ready_made_parts_share_vocabularies(tmp_path: Path) -> None:
    for name, lines in (("train", "1 5 6\n2 7\n"), ("valid", "1 8\n"), ("test", "1 6 9 9\n3 5\n")):
        (tmp_path / f"{name}.txt").write_text(lines)
    files = [tmp_path / f"{name}.txt" for name in ("train", "valid", "test")]
    split = from_parts(*files, items=pl.DataFrame({"item": [9], "title": ["nine"]}))
    assert split.data.items.ids.to_list() == [5, 6, 7, 8, 9]
    assert as_sequences(split.train) == {1: [(5, 0), (6, 0)], 2: [(7, 0)]}
    assert as_questions(split.data, split.validation) == {1: ([5, 6], [8])}
    assert as_questions(split.data, split.test) == {1: ([5, 6, 8], [6, 9]), 3: ([], [5])}
    dropped = from_parts(files[0], None, files[2], cold="drop")
    assert as_questions(dropped.data, dropped.test) == {1: ([5, 6], [6]), 3: ([], [5])}
    assert split.data.item_table is not None
    assert split.data.item_table["title"].to_list() == [None] * 4 + ["nine"]
    both = from_parts(files[:2], None, files[2])
    assert (len(both.train), len(both.validation)) == (4, 0)


def test_ready_made_parts_with_times_are_sorted_by_time() -> None:
    parts = [interactions([(1, 1, 5 * SECOND), (1, 2, 9 * SECOND)]), interactions([(1, 3, 7 * SECOND), (2, 4, SECOND)])]
    split = from_parts(parts[0], None, parts[1])
    assert as_sequences(split.data) == {1: [(1, 5 * SECOND), (3, 7 * SECOND), (2, 9 * SECOND)], 2: [(4, SECOND)]}


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ("ml-100k", (943, 1682, 100_000)),
        ("ml-1m", (6040, 3706, 1_000_209)),
        ("ml-1m-loo", (6040, 3416, 999_611)),
        ("online-retail", (4074, 3145, 264_510)),
        ("amazon/beauty.txt", (22_363, 12_101, 198_502)),
        ("amazon/sports.txt", (35_598, 18_357, 296_337)),
    ],
)
def test_real_data_has_the_published_counts(real_data: Path, path: str, counts: tuple[int, int, int]) -> None:
    data = registry.load(real_data / path)
    assert (data.num_queries, data.num_items, len(data)) == counts
    assert data.account.count("duplicates") == 0


def test_the_split_of_gowalla(real_data: Path) -> None:
    files = [real_data / "gowalla" / f"{name}.txt" for name in ("train", "valid", "test")]
    split = from_parts(files[:2], None, files[2])
    assert (split.data.num_queries, split.data.num_items) == (29_858, 40_981)
    assert (len(split.train), len(split.test.target_items)) == (810_128, 217_242)


def test_the_leave_one_out_protocol_of_ml_1m(real_data: Path) -> None:
    path = real_data / "ml-1m-loo" / "sequences.parquet"
    split = leave_last_out(Interactions.read(path), "validation_user")
    assert (len(split.validation), len(split.test)) == (512, 6040)
    plain = {row["user_id"]: row for row in pl.read_parquet(path).iter_rows(named=True)}
    for query, (history, targets) in as_questions(split.data, split.test).items():
        assert history + targets == plain[query]["items"]
    for query, (history, targets) in as_questions(split.data, split.validation).items():
        assert plain[query]["validation_user"]
        assert history + targets == plain[query]["items"][:-1]
    assert len(split.train) == 999_611 - 6040 - 512


def test_the_temporal_split_of_ml_1m(real_data: Path) -> None:
    files = [real_data / "ml-1m" / f"temporal_{name}_positives.parquet" for name in ("train", "val", "test")]
    split: Split = from_parts(*files)
    assert (len(split.train), split.account.count("validation: rows read"), split.account.count("test: rows read")) == (
        463_020,
        12_528,
        43_349,
    )
