"""Parts and new days whose ids have other types than those before them: CSV files have no types."""

from pathlib import Path

import pytest

from twotower.data import Interactions, by_time, from_parts
from twotower.data.schema.vocabulary import Vocabulary
from twotower.incremental.split import PastData, continued


def interactions(tmp_path: Path, name: str, first: int, guest: str | None) -> Interactions:
    rows = [(n % 6, n % 4, 1_704_070_800 + 3600 * (first + n)) for n in range(48)]
    lines = [f"{q},{i},{t}" for q, i, t in rows] + ([f"{guest},1,{rows[5][2]}"] if guest else [])
    (tmp_path / name).write_text("user_id,item_id,timestamp\n" + "\n".join(lines) + "\n")
    return Interactions.read(tmp_path / name)


def past_of(data: Interactions) -> PastData:
    sizes = data.offsets[1:] - data.offsets[:-1]
    return PastData(
        data.queries, data.items, data.offsets, data.item_codes, sizes,
        columns={"timestamps": data.timestamps}, last=int(data.timestamps.max()),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "kind"),
    [("guest", None, "text"), (None, "g7", "text"), (None, None, "whole"), ("a", "b", "text")],
)
def test_new_days_take_the_type_of_the_model(tmp_path, before, after, kind):
    old, new = interactions(tmp_path, "old.csv", 0, before), interactions(tmp_path, "new.csv", 100, after)
    split = continued(past_of(old), new, lambda data: by_time(data, 0.1, 0.2, cold="keep"))
    expected = [0, 1, 2, 3, 4, 5] if kind == "whole" else [*"012345", *sorted({x for x in (before, after) if x})]
    assert split.data.queries == Vocabulary(expected)
    assert split.data.items == Vocabulary([0, 1, 2, 3])
    assert len(split.data) == len(old) + len(new)
    assert ("queries now text" in str(split.account)) == (before is None and after is not None)


def test_ready_made_parts_of_two_types(tmp_path):
    parts = [interactions(tmp_path, f"{n}.csv", n, guest) for n, guest in enumerate((None, "x", None))]
    split = from_parts(*parts)
    assert split.data.queries.ids.to_list() == [*"012345", "x"]
    assert len(split.data) == sum(map(len, parts))
