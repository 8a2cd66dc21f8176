"""Vectors of a feature in files, and values of requests: what is no array, no list of ids and no text is refused."""

import os
from datetime import timedelta
from io import BytesIO

import numpy as np
import polars as pl
import pytest

from twotower.config.features import CategoricalFeature, DenseFeature, TimestampFeature
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.features.requests import encode_apart

IDS = pl.Series("item_id", ["a", "b", "c", "d"])
DATES = [pl.Series([2**31 - 1], dtype=pl.Int32).cast(pl.Date), pl.Series([2**62]).cast(pl.Datetime("ms"))]


def header(text: str) -> bytes:
    """Return the beginning of a .npy file, whose header NumPy evaluates as Python."""
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


def archive() -> bytes:
    stream = BytesIO()
    np.savez(stream, a=np.ones((2, 2)))
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\x93NUMPY", b"PK\x03\x04", b"1 2 3", archive(),
        header("{'descr':'<f4','fortran_order':False,'shape':(2,2),\n"), header("(" * 9000), header("-" * 9000 + "1"),
        header("'''\n"), header("{'descr':'<f4','fortran_order':False,'shape':(10000000000000000000000,2)}\n"),
        header("{'descr':'<f4','fortran_order':False,'shape':(1000000000000000000,2)}\n"),
        header("{'descr':'|O','fortran_order':False,'shape':(2,2)}\n"),
    ],
    ids=range(12),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_files_that_are_no_arrays_are_refused(tmp_path, content):
    np.save(tmp_path / "v.npy", np.ones((2, 2)))
    np.save(tmp_path / "ids.npy", np.array(["a", "c"]))
    for name in ("v.npy", "ids.npy"):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            vectors(tmp_path, "ids.npy")
        (tmp_path / name).write_bytes(kept)
    assert vectors(tmp_path, "ids.npy").arrays[0].any()


def vectors(folder, ids):
    declared = DenseFeature(column="image", file=str(folder / "v.npy"), ids=str(folder / ids))
    return EncodedTable.fit("item", [declared], None, ids=IDS)


@pytest.mark.parametrize(
    "matrix", [np.ones((2, 2), complex), np.ones((0, 2)), np.ones((2, 0)), np.ones(2), np.full((2, 2), 1e300)]
)
def test_matrices_that_are_no_vectors_are_refused(tmp_path, matrix):
    np.save(tmp_path / "v.npy", matrix)
    (tmp_path / "ids.txt").write_text("c\na\n" if len(matrix) else "")
    with pytest.raises(InputError, match="expected a matrix of numbers|only finite numbers"):
        vectors(tmp_path, "ids.txt")


def test_an_id_of_a_vector_is_a_line_whatever_its_characters(tmp_path):
    np.save(tmp_path / "v.npy", np.array([[0.0, 2.0], [5.0, 0.0]]))
    odd = "a\u2028b\x0cc\x85"
    (tmp_path / "ids.txt").write_text(f"{odd}\nc\n")
    declared = DenseFeature(column="image", file=str(tmp_path / "v.npy"), ids=str(tmp_path / "ids.txt"))
    found = EncodedTable.fit("item", [declared], None, ids=pl.Series("item_id", ["c", odd, "d"]))
    assert found.arrays[0].tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    (tmp_path / "ids.txt").write_text("c\nc\n")
    with pytest.raises(InputError, match=r"ids\.txt: id 'c' occurs twice"):
        vectors(tmp_path, "ids.txt")
    (tmp_path / "ids.txt").unlink()
    os.mkfifo(tmp_path / "ids.txt")
    with pytest.raises(InputError, match="a pipe or a device"):
        vectors(tmp_path, "ids.txt")


@pytest.mark.parametrize("dates", DATES)
def test_a_date_too_late_for_microseconds_is_named(dates):
    table = pl.DataFrame({"item_id": ["a"], "since": dates})
    with pytest.raises(InputError, match=r"column 'since', item 'a': expected a date before the year 290,000, found"):
        EncodedTable.fit("item", [TimestampFeature(column="since")], table, ids=table["item_id"])


@pytest.mark.parametrize(
    ("value", "message"),
    [("\ud800", "not valid Unicode"), (timedelta(1), "one value in each row .*found type Duration")],
)
def test_values_of_requests_that_are_no_text_are_named(value, message):
    table = pl.DataFrame({"item_id": ["a", "b"], "device": ["phone", "desk"]})
    features = EncodedTable.fit("item", [CategoricalFeature(column="device")], table, ids=table["item_id"]).features
    with pytest.raises(InputError, match=message):
        encode_apart(features, [{"device": value}], "context")
