"""Ids without a vocabulary: the hash, collision rates, ids that are codes, and refused inputs."""

import hashlib
import subprocess
import sys

import numpy as np
import polars as pl
import pytest

from data.prepare.test_shards import folder_of_shards
from data.test_interactions import frame_of, some_rows
from planted import planted
from support.slow_reference import as_sequences, sequences
from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.prepare import chunks
from twotower.data.prepare.chunks import HashColumn
from twotower.data.schema.vocabulary import (
    CodedIds,
    Hashed,
    HashedIds,
    Vocabulary,
    expected_shared,
    hash_ids,
    read_vocabulary,
)
from twotower.errors import InputError
from twotower.run import read_data

MASK = 2**64 - 1


def slow_hash(value: int | str) -> int:
    """Hash an integer with splitmix64's finaliser, in Python integers; other text with BLAKE2b."""
    if isinstance(value, str):
        if not (value.lstrip("-").isdigit() and str(int(value)) == value and -(2**63) <= int(value) < 2**63):
            return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
        value = int(value)
    z = (value + 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_the_hash_matches_plain_python():
    numbers = [0, 1, -1, 7, 2**40, 2**63 - 1, -(2**63)]
    texts = ["7", "007", "-1", "-0", "+7", "é", "u1", "", "9223372036854775807", "9223372036854775808", "7"]
    assert hash_ids(numbers).tolist() == [slow_hash(n) for n in numbers]
    assert hash_ids(texts).tolist() == [slow_hash(t) for t in texts]
    assert hash_ids(["7", "-1"]).tolist() == hash_ids([7, -1]).tolist()
    # The first output of splitmix64 with seed 0, as printed by its authors' program.
    assert int(hash_ids([0])[0]) == 0xE220A8397B1DCDAF


def test_the_hash_is_the_same_in_another_process():
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from twotower.data.schema.vocabulary import hash_ids; print(hash_ids(['u1', 'é', '12']).tolist())",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(hash_ids(["u1", "é", "12"]).tolist())


def test_the_expected_fraction_of_ids_that_share_a_row():
    # 4 ids in 3 rows: an id is alone if the 3 others are in other rows, with probability (2/3)^3.
    assert expected_shared(4, 3) == pytest.approx(1 - (2 / 3) ** 3, abs=1e-12)
    assert expected_shared(1, 3) == 0.0 == expected_shared(0, 3)
    assert expected_shared(10**9, 2**31 - 1) == pytest.approx(1 - np.exp(-(10**9) / (2**31 - 1)), abs=1e-6)


@pytest.mark.parametrize("text", [False, True])
def test_ids_collide_as_often_as_the_closed_form_predicts(text):
    ids, rows = 20_000, 50_000
    values = pl.Series([f"user-{n}" for n in range(ids)]) if text else pl.Series(np.arange(ids) * 3)
    column = HashColumn(Hashed(rows))
    codes = column.take(values, "", "")
    counts = np.bincount(codes, minlength=rows)
    shared = float((counts[codes] > 1).mean())
    assert column.collisions() == (ids, shared)
    # 0.33. The ids of one row are correlated: allow twice the variance of independent ids.
    p = expected_shared(ids, rows)
    assert abs(shared - p) < 5 * np.sqrt(2 * p * (1 - p) / ids)
    # The rows are uniform: chi-square over 1,000 bins of 50 rows, mean 999, deviation 45.
    bins = counts.reshape(1000, -1).sum(1)
    assert 999 - 5 * 45 < ((bins - ids / 1000) ** 2 / (ids / 1000)).sum() < 999 + 5 * 45


def test_a_sample_of_the_rows_measures_the_same(monkeypatch):
    ids, rows = 40_000, 60_000
    monkeypatch.setattr(chunks, "SAMPLE", 3000)
    column, other = HashColumn(Hashed(rows)), HashColumn(Hashed(rows))
    for half, start in ((column, 0), (other, ids // 2)):
        for left in range(start, start + ids // 2, 5000):
            half.take(pl.Series(np.arange(left, left + 5000)), "", "")
            half.take(pl.Series(np.arange(left, left + 100)), "", "")  # repeated ids
    column.join(other.state())
    count, shared = column.collisions()
    assert column._halvings >= 3
    assert count == pytest.approx(ids, rel=0.1)
    assert shared == pytest.approx(expected_shared(ids, rows), abs=0.06)


def test_a_hashed_row_has_the_rows_of_all_its_ids(tmp_path):
    rows = some_rows(600, text=True)
    path = tmp_path / "a.parquet"
    frame_of(rows).write_parquet(path)
    data = Interactions.read(path, query_ids=Hashed(16))
    expected = sequences([(slow_hash(query) % 16, item, time) for query, item, time in rows])
    found = {}
    for code in range(16):
        span = slice(int(data.offsets[code]), int(data.offsets[code + 1]))
        items = data.items.decode(data.item_codes[span]).to_list()
        if items:
            found[code] = list(zip(items, data.timestamps[span].tolist(), strict=True))
    assert found == expected
    line = next(line for line in str(data.account).splitlines() if "query ids hashed" in line)
    ids = {query for query, _, _ in rows}
    counts = np.bincount([slow_hash(query) % 16 for query in ids], minlength=16)
    shared = counts[counts > 1].sum() / len(ids)
    for part in ("26", "16 rows", f"{(counts > 0).sum()} are used", f"{shared:.2%}", f"{expected_shared(26, 16):.2%}"):
        assert part in line, (part, line)
    assert data.queries == HashedIds(Hashed(16)) and data.queries != CodedIds(16)
    assert data.queries.encode(["k5", None]).tolist() == [slow_hash("k5") % 16, -1]


def test_codes_skip_the_vocabulary_and_are_the_same_data(tmp_path):
    frame = planted(queries=30).with_columns(user_id=pl.col("user_id").str.slice(1).cast(pl.Int64) * 2)
    frame.write_parquet(tmp_path / "a.parquet")
    plain = Interactions.read(tmp_path / "a.parquet")
    coded = Interactions.read(tmp_path / "a.parquet", query_ids="codes", item_ids="codes")
    assert len(coded.queries) == 59 and len(coded.items) == int(frame["item_id"].max()) + 1
    assert as_sequences(coded) == as_sequences(plain)
    assert coded.queries.decode([58, 0, -1]).to_list() == [58, 0, None]
    assert coded.queries.encode(["4", "58", "59"]).tolist() == [4, 58, -1]
    assert coded.queries.encode([-1, 3, 2**40]).tolist() == [-1, 3, -1]
    assert "29 of the codes 0 to 58 occur in no row" in str(coded.account)
    assert coded.fingerprint != plain.fingerprint
    coded.save(tmp_path / "saved")
    again = Interactions.open(tmp_path / "saved")
    assert again.queries == coded.queries and again.fingerprint == coded.fingerprint
    again.known_fingerprint = None
    assert again.fingerprint == coded.fingerprint


@pytest.mark.parametrize("kind", [Hashed(40), "codes"])
def test_shards_and_one_file_give_the_same(tmp_path, kind):
    rows = some_rows(300)
    frame_of(rows).write_parquet(tmp_path / "a.parquet")
    one = Interactions.read(tmp_path / "a.parquet", query_ids=kind)
    several = Interactions.read(folder_of_shards(tmp_path / "shards"), query_ids=kind)
    assert several.fingerprint == one.fingerprint
    lines = [str(data.account).splitlines()[-1] for data in (one, several)]
    assert lines[0] == lines[1] and "query ids" in lines[0]


def test_ids_are_written_and_read_back(tmp_path):
    for ids in (CodedIds(7), HashedIds(Hashed(9)), Vocabulary(["a", "b"])):
        ids.write(tmp_path / "ids.parquet")
        assert read_vocabulary(tmp_path / "ids.parquet") == ids
    (tmp_path / "ids.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="not a readable vocabulary"):
        read_vocabulary(tmp_path / "ids.parquet")


REFUSED = {
    "text as codes": ({"query_ids": "codes"}, pl.DataFrame({"user_id": ["a"], "item_id": [1]}), "text such as 'a'"),
    "a negative code": ({"item_ids": "codes"}, pl.DataFrame({"user_id": [1], "item_id": [-3]}), "'item_id': -3"),
    "a code too large": ({"item_ids": "codes"}, pl.DataFrame({"user_id": [1], "item_id": [2**31]}), "2147483648"),
    "ids taken for codes": (
        {"query_ids": "codes"},
        pl.DataFrame({"user_id": [1_500_000_000, 3], "item_id": [1, 2]}),
        "look like ids",
    ),
    "hashed items": ({"item_ids": Hashed(9)}, pl.DataFrame({"user_id": [1], "item_id": [1]}), "distinguished"),
    "another word": ({"query_ids": "hash"}, pl.DataFrame({"user_id": [1], "item_id": [1]}), "expected 'vocabulary'"),
    "a table of hashed queries": (
        {"query_ids": Hashed(9), "queries": pl.DataFrame({"user_id": [1], "age": [3]})},
        pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2]}),
        "joined by id",
    ),
    "more items than codes": (
        {"item_ids": "codes", "catalog": "table", "items": pl.DataFrame({"item_id": [1, 2, 9]})},
        pl.DataFrame({"user_id": [1, 1], "item_id": [1, 2]}),
        "largest code",
    ),
}


@pytest.mark.parametrize(("options", "frame", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(options, frame, words):
    with pytest.raises(InputError, match=words):
        Interactions.from_frame(frame, **options)


@pytest.mark.parametrize("rows", [1, 2**31])
def test_rows_out_of_range_are_refused(rows):
    with pytest.raises(InputError, match="expected 2 to"):
        Hashed(rows)


def test_id_kinds_in_the_settings_of_a_run(tmp_path):
    frame_of(some_rows()).write_parquet(tmp_path / "a.parquet")
    settings = Config.load(None, ["data.query_ids={hashed: 64}", "data.item_ids=codes", "data.workers=2"])
    assert Config.model_validate(settings.model_dump(mode="json")) == settings
    data = read_data(tmp_path / "a.parquet", settings.data)
    assert data.queries == HashedIds(Hashed(64)) and data.items == CodedIds(141)
    for wrong in ("data.query_ids={hashed: 1}", "data.item_ids={hashed: 64}", "data.query_ids=hash"):
        with pytest.raises(InputError, match="data"):
            Config.load(None, [wrong])


def test_hashed_ids_have_no_list():
    with pytest.raises(InputError, match="hashed ids are not stored"):
        _ = HashedIds(Hashed(9)).ids
