"""Column detection and vocabularies, compared with plain Python dictionaries."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twotower.data.schema.columns import ColumnRoles, title_column
from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["user_id", "item_id", "timestamp"], ("user_id", "item_id", "timestamp")),
        (["CustomerID", "StockCode", "InvoiceDate"], ("CustomerID", "StockCode", "InvoiceDate")),
        (
            ["household_id", "product_id", "transaction_timestamp"],
            ("household_id", "product_id", "transaction_timestamp"),
        ),
        (["user_id", "session_id", "movie_id", "ts", "date"], ("user_id", "movie_id", "ts")),
        (["query", "items"], ("query", "items", None)),
    ],
)
def test_usual_names_are_found(names: list[str], expected: tuple[str | None, ...]) -> None:
    found = ColumnRoles().resolve(names, "f.csv")
    assert (found.query, found.item, found.timestamp) == expected


def test_label_weight_and_group_are_found_and_named_columns_win() -> None:
    found = ColumnRoles(item="b").resolve(["user", "b", "rating", "weight", "market", "item_id"], "f.csv")
    assert found == ColumnRoles("user", "b", None, "weight", "rating", "market")


@pytest.mark.parametrize(
    ("given_columns", "names", "parts"),
    [
        (None, ["user_id", "price"], ["f.csv", "no item column", "'price'"]),
        (None, ["user_id", "item_id", "movie_id"], ["f.csv", "'item_id', 'movie_id'", "could each be the item"]),
        ({"item": "sku2"}, ["user_id", "sku"], ["f.csv", "'sku2'", "does not exist", "'sku'"]),
        ({"itm": "a"}, ["a"], ["'itm' is not a role", "'item'"]),
        ({"item": "a", "query": "a"}, ["a"], ["'a' has two roles"]),
    ],
)
def test_bad_columns_are_refused(given_columns: dict[str, str] | None, names: list[str], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        ColumnRoles.of(given_columns).resolve(names, "f.csv")
    for part in parts:
        assert part in str(caught.value)


ids_strategy = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=40),
    st.lists(st.text(min_size=1, max_size=5), unique=True, min_size=1, max_size=40),
)


@given(ids_strategy, st.lists(st.integers(0, 60), max_size=50))
def test_encode_and_decode_match_a_dictionary(ids: list[int] | list[str], picks: list[int]) -> None:
    vocabulary = Vocabulary(ids)
    table = {value: code for code, value in enumerate(ids)}
    unknown = 7 if isinstance(ids[0], int) else "not an id"
    wanted = [ids[p] if p < len(ids) else unknown for p in picks]
    codes = vocabulary.encode(pl.Series("x", wanted, dtype=vocabulary.ids.dtype))
    assert codes.dtype == np.int64
    assert codes.tolist() == [table.get(a, -1) for a in wanted]
    assert vocabulary.decode(codes).to_list() == [a if a in table else None for a in wanted]


def test_large_integers_keep_every_digit() -> None:
    ids = [2**53, 2**53 + 1, 2**62 + 1]
    assert Vocabulary(ids).encode(ids).tolist() == [0, 1, 2]


def test_text_is_accepted_for_integers_only_if_it_parses() -> None:
    vocabulary = Vocabulary([10, 20])
    assert vocabulary.encode(["20", "10", "30"]).tolist() == [1, 0, -1]
    with pytest.raises(InputError, match="'x' is not an integer"):
        vocabulary.encode(["20", "x"])
    assert Vocabulary(["a", "5"]).encode([5, 6]).tolist() == [1, -1]


@pytest.mark.parametrize("ids", [[1, "a"], [1.5], [True], [1, 1], [None, 1], ["a", None]])
def test_invalid_ids_are_refused(ids: list[object]) -> None:
    with pytest.raises(InputError):
        Vocabulary(ids)


def test_codes_out_of_range_are_refused() -> None:
    with pytest.raises(IndexError):
        Vocabulary([1, 2]).decode([2])
    with pytest.raises(IndexError):
        Vocabulary([1, 2]).decode([-2])


@pytest.mark.parametrize("ids", [[3, 1, 2], ["b", "a", "ü"]])
def test_write_and_read_again(tmp_path: Path, ids: list[int] | list[str]) -> None:
    vocabulary = Vocabulary(ids)
    vocabulary.write(tmp_path / "v.parquet")
    assert Vocabulary.read(tmp_path / "v.parquet") == vocabulary
    assert [p.name for p in tmp_path.iterdir()] == ["v.parquet"]


def test_damaged_vocabulary_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "v.parquet"
    Vocabulary([1, 2]).write(path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"v\.parquet"):
        Vocabulary.read(path)
    pl.DataFrame({"other": [1]}).write_parquet(path)
    with pytest.raises(InputError, match="expected one column 'id'"):
        Vocabulary.read(path)


def test_title_column() -> None:
    assert title_column(pl.DataFrame({"item_id": [1], "movie_title": ["x"], "description": ["y"]})) == "movie_title"
    assert title_column(pl.DataFrame({"item_id": [1], "description": ["y"]})) == "description"
    assert title_column(pl.DataFrame({"item_id": [1], "name": [3]})) is None
