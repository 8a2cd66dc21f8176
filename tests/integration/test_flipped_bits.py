"""Bit flips in stored files: all refused, in models, checkpoints and prepared data; the slow test makes many."""

import random
import shutil

import numpy as np
import pytest
import torch

from support.hostile_folders import sound_folder
from twotower.data import Interactions
from twotower.errors import InputError
from twotower.serving import Retriever
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.checkpoint.lazy import open_checkpoint


def model(folder):
    sound_folder(folder, changes=True)
    return Retriever.load


def checkpoint(folder):
    state = {
        "state_dict": {"weight": torch.randn(30, 4), "bias": torch.randn(4)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(30, 4)}}}],
        "epoch": 3,
        "global_step": 40,
    }
    SafeCheckpointIO().save_checkpoint(state, folder)
    return SafeCheckpointIO().load_checkpoint


def opened_checkpoint(folder):
    checkpoint(folder)
    return open_checkpoint


def prepared(folder):
    rng = np.random.default_rng(0)
    rows = {
        "user": rng.integers(0, 9, 99),
        "item": rng.integers(0, 9, 99),
        "time": np.arange(99) + 1_700_000_000,
        "rating": rng.integers(1, 6, 99),
        "weight": rng.random(99),
        "device": rng.choice(["a", "b"], 99),
    }
    items = {"item": list(range(9)), "title": list("abcdefghi")}
    Interactions.from_frame(rows, items=items, positive_label=3, context=["device"]).save(folder)
    return Interactions.open


def flipped(folder, times, seed=0):
    """Flip one bit of one file at a time; yield what was flipped, and restore the file afterwards."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    draw = random.Random(seed)
    for number in range(times):
        path = files[number % len(files)]
        content = path.read_bytes()
        place = draw.randrange(8 * len(content))
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        yield f"{path.relative_to(folder)}, bit {place}"
        path.write_bytes(content)


KINDS = {
    "model": (model, 168),
    "checkpoint": (checkpoint, 60),
    "opened": (opened_checkpoint, 60),
    "data": (prepared, 90),
}


def check(make, folder, times):
    load = make(folder)
    load(folder)
    taken = []
    for what in flipped(folder, times):
        try:
            load(folder)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        taken.append(what)
    assert not taken
    load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_some_flipped_bits_are_refused(tmp_path, kind):
    make, _ = KINDS[kind]
    check(make, tmp_path / "stored", 25)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_flipped_bits_are_refused(tmp_path, kind):
    make, times = KINDS[kind]
    check(make, tmp_path / "stored", times)


@pytest.mark.parametrize("make", [checkpoint, prepared])
def test_what_older_versions_wrote_is_read(tmp_path, make):
    load = make(tmp_path / "stored")
    for path in (tmp_path / "stored").rglob("SHA256SUMS"):
        path.unlink()
    load(tmp_path / "stored")


def test_a_damaged_cache_is_prepared_again(tmp_path):
    source = tmp_path / "a.csv"
    source.write_text("user_id,item_id,timestamp\n" + "".join(f"u{n % 5},i{n % 7},{n}\n" for n in range(60)))
    before = np.array(Interactions.read(source, cache=tmp_path / "cache").item_codes)
    column = tmp_path / "cache" / "item_codes.npy"
    content = bytearray(column.read_bytes())
    content[-1] ^= 64
    column.write_bytes(content)
    assert np.array_equal(Interactions.read(source, cache=tmp_path / "cache").item_codes, before)
    shutil.rmtree(tmp_path / "cache")
