"""Settings of sources: types, and the K that `objective.negatives` replaces."""

import polars as pl
import pytest

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.objectives import build


@pytest.fixture(scope="module")
def train():
    return Interactions.from_frame(pl.DataFrame({"user_id": [0, 0, 1, 1, 2], "item_id": [0, 1, 1, 2, 3]}))


def pool(train, sources):
    settings = Config.load(None, ["objective.negatives=5", f"objective.sources={sources}"]).objective
    return build.build_pool(settings, train)


def test_only_a_size_of_k_is_the_number_of_negatives(train, monkeypatch):
    sizes = [member.size for member in pool(train, "[{uniform: {size: K}}, {log_uniform: {size: 7}}]").members()]
    assert sizes == [5, 7]
    columns = []

    def by_column(builder, *, column: "str", size: "int"):
        columns.append(column)
        return builder.uniform(size=size)

    monkeypatch.setattr(build._SourceBuilder, "log_uniform", by_column)
    assert pool(train, "[{log_uniform: {column: K, size: K}}]").members()[0].size == 5
    assert columns == ["K"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("size: 5.5", "frequency: size: expected a whole number, found 5.5"),
        ("size: true", "frequency: size: expected a whole number, found True"),
        ("size: 5, unique: K", "frequency: unique: expected true or false, found 'K'"),
        ("size: 5, per_row: 1", "frequency: per_row: expected true or false, found 1"),
        ("size: 5, power: K", "frequency: power: expected a number, found 'K'"),
        ("size: 5, power: true", "frequency: power: expected a number, found True"),
    ],
)
def test_a_setting_of_another_type_is_refused(train, options, message):
    with pytest.raises(InputError, match=message):
        pool(train, f"[{{frequency: {{{options}}}}}]")
