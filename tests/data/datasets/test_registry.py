"""Known data sets: archives made here in the original layouts, checksums, and messages for failed downloads."""

import hashlib
import zipfile
from pathlib import Path

import polars as pl
import pytest

from twotower.data.datasets import download, registry
from twotower.data.datasets.download import Site, Wheel, fetch
from twotower.data.io.folders import cache_root
from twotower.errors import InputError

FLAGS = "|".join(["0"] * 5 + ["1"] + ["0"] * 13)


def archive(folder: Path, members: dict[str, str]) -> Path:
    path = folder / "made.zip"
    with zipfile.ZipFile(path, "w") as out:
        for name, content in members.items():
            out.writestr(name, content.encode("latin-1"))
    return path


ORIGINAL_100K = {
    "ml-100k/u.data": "1\t2\t5\t880000000\n1\t3\t1\t880000001\n",
    "ml-100k/u.item": f"2|Amélie (2001)|01-Jan-2001||url|{FLAGS}\n3|No Year|||url|{FLAGS}\n",
    "ml-100k/u.user": "1|24|M|technician|08571\n",
}
WHEEL_100K = {
    "recbole/dataset_example/ml-100k/ml-100k.inter": "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    "1\t2\t5\t880000000\n1\t3\t1\t880000001\n",
    "recbole/dataset_example/ml-100k/ml-100k.item": "item_id:token\tmovie_title:token_seq\trelease_year:token\t"
    "class:token_seq\n"
    "2\tAmelie\t2001\tComedy\n3\tNo Year\t\tComedy\n",
    "recbole/dataset_example/ml-100k/ml-100k.user": "user_id:token\tage:token\tgender:token\toccupation:token\t"
    "zip_code:token\n"
    "1\t24\tM\ttechnician\t08571\n",
}  # fmt: skip
ORIGINAL_1M = {
    "ml-1m/ratings.dat": "1::2::5::978300760\n1::3::4::978300761\n",
    "ml-1m/movies.dat": "2::Amélie (2001)::Comedy|Romance\n3::No Year::Drama\n",
    "ml-1m/users.dat": "1::F::1::10::48067\n",
}


@pytest.mark.parametrize(
    ("name", "members", "title", "genres"),
    [
        ("movielens-100k", ORIGINAL_100K, "Amélie", "Comedy"),
        ("movielens-100k", WHEEL_100K, "Amelie", "Comedy"),
        ("movielens-1m", ORIGINAL_1M, "Amélie", "Comedy Romance"),
    ],
)
def test_every_layout_gives_the_same_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, members: dict[str, str], title: str, genres: str
) -> None:
    made = archive(tmp_path, members)

    def local(places: object, use: object, _name: str) -> None:
        with zipfile.ZipFile(made) as opened:
            use(opened)  # type: ignore[operator]

    monkeypatch.setattr(registry, "fetch", local)
    assert [row["cached"] for row in registry.available()] == [False] * 3
    data = registry.load(name)
    assert (len(data), data.num_items, data.num_queries) == (2, 2, 1)
    assert data.item_table is not None
    assert data.query_table is not None
    assert data.item_table.row(0) == (2, title, 2001, genres)
    assert data.item_table["year"].to_list() == [2001, None]
    assert data.query_table["zip_code"].dtype == pl.String
    assert {row["name"]: row["cached"] for row in registry.available()}[name]
    monkeypatch.setattr(registry, "fetch", lambda *_: pytest.fail("fetched again"))
    assert registry.load(name).fingerprint == data.fingerprint


def test_an_unpacked_movielens_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "unpacked"
    folder.mkdir()
    for name, content in ORIGINAL_1M.items():
        (folder / Path(name).name).write_bytes(content.encode("latin-1"))
    data = registry.load(folder)
    assert len(data) == 2
    assert data.item_table is not None
    assert data.item_table["title"].to_list() == ["Amélie", "No Year"]
    (folder / "movies.dat").write_bytes(b"2::Only two\n")
    with pytest.raises(InputError, match=r"movies\.dat: row 1 has 2 fields, expected 3"):
        registry.load(folder)


def test_a_folder_named_in_the_environment_comes_first(real_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_DATA", str(real_data))
    monkeypatch.setattr(registry, "fetch", lambda *_: pytest.fail("fetched"))
    assert len(registry.load("movielens-100k")) == 100_000


def test_a_wrong_checksum_is_refused_and_the_download_discarded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = archive(tmp_path, ORIGINAL_1M)

    def pip(command: list[str], **_: object) -> object:
        target = Path(command[command.index("--dest") + 1]) / "a.whl"
        target.write_bytes(made.read_bytes())
        return type("Done", (), {"returncode": 0, "stderr": ""})()

    monkeypatch.setattr(download.subprocess, "run", pip)
    used: list[str] = []
    with pytest.raises(InputError, match="checksum sha256"):
        fetch([Wheel("some==1", "0" * 64)], lambda z: used.extend(z.namelist()), "some")
    assert not used
    right = hashlib.sha256(made.read_bytes()).hexdigest()
    fetch([Wheel("some==1", right)], lambda z: used.extend(z.namelist()), "some")
    assert used == list(ORIGINAL_1M)
    assert "downloading some==1 from the Python package index" in capsys.readouterr().err


def test_places_are_tried_in_order_and_the_error_gives_advice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        download.subprocess, "run", lambda *_, **__: type("Done", (), {"returncode": 1, "stderr": "no index"})()
    )
    nowhere = Site("http://127.0.0.1:9/ml.zip", "md5:" + "0" * 32)
    with pytest.raises(InputError) as caught:
        fetch([nowhere, Wheel("some==1", "0" * 64)], lambda _: None, "some")
    for part in ("127.0.0.1:9", "no index", "TWOTOWER_DATA"):
        assert part in str(caught.value)
    printed = capsys.readouterr().err
    assert 0 <= printed.find("127.0.0.1") < printed.find("some==1")


def test_an_archive_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = archive(tmp_path, {"other": ""})

    def local(_places: object, use: object, _name: str) -> None:
        with zipfile.ZipFile(made) as opened:
            use(opened)  # type: ignore[operator]

    monkeypatch.setattr(registry, "fetch", local)
    with pytest.raises(InputError, match=r"ratings\.dat is not in the archive"):
        registry.load("movielens-1m")
    assert not list((cache_root() / "datasets").iterdir())


@pytest.mark.parametrize(
    ("name", "part"), [("movielens-20m", "known data sets: movielens-100k"), ("gone/a.csv", "no such file or folder")]
)
def test_unknown_names_are_refused(name: str, part: str) -> None:
    with pytest.raises(InputError, match=part):
        registry.load(name)
