"""Checksums of folders, and checks of files before they are read."""

import json
import os
import subprocess

import pytest

from twotower.errors import InputError
from twotower.system.checksums import CHECKSUMS, is_plain, read_json, require_file, verify_checksums, write_checksums


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "a b.bin").write_bytes(bytes(range(0, 256, 8)))
    (tmp_path / "tables" / "c").write_bytes(b"")
    write_checksums(tmp_path)
    return tmp_path


def test_checksums_are_those_of_sha256sum(folder):
    assert verify_checksums(folder, "copy it again")
    subprocess.run(["sha256sum", "--check", "--strict", "--quiet", CHECKSUMS], cwd=folder, check=True)


@pytest.mark.parametrize("name", ["a b.bin", CHECKSUMS])
def test_every_flipped_bit_is_found(folder, name):
    content = (folder / name).read_bytes()
    for place in range(0, len(content), 3):
        for bit in range(8):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bit
            (folder / name).write_bytes(flipped)
            with pytest.raises(InputError, match="copy it again$") as refusal:
                verify_checksums(folder, "copy it again")
            assert "\n" not in str(refusal.value)
    (folder / name).write_bytes(content)
    assert verify_checksums(folder, "")


def test_a_folder_of_an_older_version_has_none(tmp_path):
    (tmp_path / "a").touch()
    assert not verify_checksums(tmp_path, "")


@pytest.mark.parametrize("name", ["../a", "/etc/hostname", "tables/../../a", "a/./b\\c", "nul\x00"])
def test_names_that_leave_the_folder_are_refused(folder, name):
    (folder / CHECKSUMS).write_text(f"{'0' * 64}  {name}\n")
    with pytest.raises(InputError, match="is not the name of a file in this folder"):
        verify_checksums(folder, "")


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "gone").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    require_file(tmp_path / "file", "")
    for name, what in (("link", "a link"), ("gone", "a link"), ("pipe", "not a regular"), ("none", "missing")):
        with pytest.raises(InputError, match=what):
            require_file(tmp_path / name, "")
    assert [is_plain(name) for name in ("a.b", "ä", "", ".", "..", "a/b", "a\\b", "C:", "a\n", 3, "x" * 300)] == [
        *(True, True),
        *[False] * 9,
    ]


def test_json_is_bounded(tmp_path):
    path = tmp_path / "a.json"
    for text, message in (
        ("[" * 100_000, "nested too deeply"),
        ("[]", "a JSON object"),
        ("{}" + " " * 99, "at most 50"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_json(path, most=50 if "at most" in message else 1 << 20)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
