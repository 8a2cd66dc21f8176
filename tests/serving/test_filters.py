"""Conditions, allow and deny lists: which items pass, what is refused, and that no result is lost."""

import numpy as np
import polars as pl
import pytest

from twotower.data.schema.vocabulary import Vocabulary
from twotower.errors import InputError
from twotower.serving.conditions import condition_mask
from twotower.serving.filters import allowed_items

ITEMS = Vocabulary([10, 20, 30, 40])
TABLE = pl.DataFrame(
    {
        "country": ["FR", "DE", None, "FR"],
        "price": [1.0, 30.0, 5.0, 25.0],
        "Two words": [1, 2, 3, 4],
        "tags": [["a", "b"], ["c"], [], ["a"]],
    }
)


@pytest.mark.parametrize(
    ("condition", "passing"),
    [
        ("country = 'FR' and price < 20", [10]),
        ("country = 'FR' or price < 20", [10, 30, 40]),
        ("not (country = 'FR')", [20]),
        ("country is null", [30]),
        ("country in ('FR', 'DE') and price between 2 and 30", [20, 40]),
        ("country like 'F%'", [10, 40]),
        ('"Two words" >= 3', [30, 40]),
        ("array_contains(tags, 'a')", [10, 40]),
        ("lower(country) = 'fr' and price * 2 > 10", [40]),
        ("case when price > 20 then true else false end", [20, 40]),
    ],
)
def test_a_condition_passes_the_items_it_holds_for(condition, passing):
    assert ITEMS.decode(np.flatnonzero(condition_mask(condition, TABLE, 4))).to_list() == passing


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("contry = 'FR'", "no column 'contry' in the item table; found 'country', 'price'"),
        ('country = "FR"', "no column 'FR'"),
        ("country > 3", "country is String"),
        ("price < 'cheap'", "a number cannot be compared with text (price is Float64)"),
        ("price", "true or false for each item, found a number (price is Float64)"),
        ("sum(price) > 2", "no function 'sum'; expected one of abs, array_contains"),
        ("1 = 1", "expected a condition that is true or false for each item"),
        ("country = ", "it ends too early; expected SQL such as price < 20"),
        ("price > 1; drop table items", "found ';' at character 10"),
        ("read_csv('/etc/passwd')", "no function 'read_csv'"),
        ("country in (select * from read_csv('/etc/passwd'))", "found 'read_csv' at character 27"),
        ("country = E'\\'' || (SELECT 1) || '", "expected DATE or TIMESTAMP before text in quotes"),
        ("price in (values (1))", "no function 'values'"),
        ("", "1 to 4,000 characters"),
        ("(" * 1900 + "1" + ")" * 1900, "at most 40 levels"),
        ("price = 1 or " * 400 + "true", "1 to 4,000 characters"),
        ("regexp_like(country, '(')", "no function 'regexp_like'"),
    ],
)
def test_an_invalid_condition_is_refused(condition, message):
    with pytest.raises(InputError, match="^filter") as raised:
        condition_mask(condition, TABLE, 4)
    assert message in str(raised.value)
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)


def test_lists_and_condition_combine():
    mask = allowed_items(ITEMS, TABLE, condition="price < 28", allow=[10, 20, 40, 99], deny=["40", 98])
    assert mask.tolist() == [True, False, False, False]
    assert allowed_items(ITEMS, TABLE) is None
    assert allowed_items(ITEMS, None, deny=[1, 2]) is None, "no known item is denied: no mask needed"


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"allow": [7, "x"]}, "allow: none of its ids"),
        ({"allow": []}, "allow: none of its ids"),
        ({"allow": "10"}, "allow: expected a list of ids, found '10'"),
        ({"deny": 10}, "deny: expected a list of ids, found 10"),
        ({"condition": "price < 3"}, "no item table"),
    ],
)
def test_invalid_lists_are_refused(lists, message):
    with pytest.raises(InputError, match=message):
        allowed_items(ITEMS, None, **lists)


def test_recommend_loses_nothing_to_a_filter(priced):
    """Filtered results are the complete unfiltered ranking without the items that do not pass."""
    everything = priced.recommend(["u003", "u010"], k=100)
    narrow = priced.recommend(["u003", "u010"], k=100, filter="country = 'FR' and price < 30", deny=[3, 9])
    table = priced.artifact.item_table
    kept = [
        j
        for j, (country, price) in enumerate(zip(table["country"], table["price"], strict=True))
        if country == "FR" and price < 30 and j not in (3, 9)
    ]
    expected = everything.filter(pl.col("item").is_in(kept))
    assert narrow["item"].to_list() == expected["item"].to_list() and len(narrow) > 10
    assert narrow["score"].to_list() == pytest.approx(expected["score"].to_list(), abs=1e-6)
    assert narrow["rank"].to_list() == [r for _, g in narrow.group_by("query", maintain_order=True) for r in
                                        range(1, len(g) + 1)]  # fmt: skip


def test_nothing_passes(priced):
    assert len(priced.recommend(["u003"], filter="price < 0")) == 0


def test_similar_is_filtered_as_well(priced):
    found = priced.similar([4], k=100, filter="array_contains(tags, 'new')", deny=[10])
    assert set(found["item"]) == {0, 20, 30, 40, 50, 60, 70, 80, 90}
