"""The commands of docs/objectives.md, "The source documents, statement by statement", run as written on small data."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from twotower.cli import main as cli
from twotower.config.run import Config

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"
TITLE = "## The source documents, statement by statement\n"
#: Added to every training run, to make it short.
SHORT = [
    "training.max_epochs=1",
    "training.batch_size=128",
    "item_tower.dimension=8",
    "query_tower.history.length=10",
    "evaluation.baselines=false",
    "training.recent_prior=false",
    "training.start=random",
]
#: The objectives of the four documents.
STATED = {
    "full-softmax",
    "sampled-softmax-uniform",
    "in-batch",
    "in-batch-logq",
    "in-batch-logq-batch-probability",
    "in-batch-logq-all",
    "in-batch-importance",
    "uniform-importance",
    "refined-logq",
    "mixed",
    "mixed-by-source",
    "mixed-by-source-batch-probability",
    "expected-count",
    "negative-sampling",
    "logistic-observed",
    "logistic-popular",
    "sampled-logistic",
    "nce",
}


def documents():
    """Return the commands of each document, as lists of words, by its title."""
    text = PAGE.read_text(encoding="utf-8").split(TITLE)[1].split("\n## ")[0]
    found = {}
    for part in text.split("\n### ")[1:]:
        lines = [line for block in re.findall(r"```sh\n(.*?)```", part, re.DOTALL) for line in block.splitlines()]
        found[part.partition("\n")[0]] = [shlex.split(line) for line in lines if not line.startswith("#")]
    return found


DOCUMENTS = documents()


def rows(first, items, seed):
    rng = np.random.default_rng(seed)
    item = np.minimum(rng.geometric(0.08, 900) - 1, items - 1)
    user = rng.integers(0, 40, 900)
    return pl.DataFrame({
        "user_id": [f"u{q}" for q in user],
        "item_id": [f"i{j}" for j in item],
        "timestamp": first + np.sort(rng.integers(0, 10_000_000, 900)),
        "rating": rng.integers(1, 6, 900),
        "market": ["north" if q % 2 else "south" for q in user],
    })  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Make interactions and an item table with items that have no rows, then newer ones of both, and ids that left."""
    path = tmp_path_factory.mktemp("statements")
    rows(1_600_000_000, 50, 0).write_csv(path / "purchases.csv")
    rows(1_620_000_000, 50, 1).write_csv(path / "newer.csv")
    colours = pl.Series(["red", "green", "blue"] * 20)
    items = pl.DataFrame({"item_id": [f"i{j}" for j in range(60)], "colour": colours, "price": np.arange(60) * 0.7})
    items.write_csv(path / "items.csv")
    items.tail(58).with_columns(price=pl.col("price") + 1).write_csv(path / "newer_items.csv")
    (path / "gone.txt").write_text("i3\ni55\n")
    return path


def run(words, patch):
    patch.setattr(sys, "argv", words)
    cli._STATE["debug"] = False
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code or 0


def with_settings(words):
    """Return a command with the short settings, which its own replace."""
    short = [setting for setting in SHORT if not any(word.startswith(setting.split("=")[0]) for word in words)]
    settings = [part for setting in short for part in ("--set", setting)]
    return [*words, *settings, *(["--force"] if words[1] == "train" else ["--seeds", "1", "--no-audit"])]


@pytest.mark.parametrize("title", DOCUMENTS)
def test_the_commands_of_a_document_run(title, files, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(files)
    places = {name: str(tmp_path / name.lower()) for name in ("DIR", "NEXT", "SWEEP")}
    places |= {"DATA": "purchases.csv", "NEWER": "newer.csv"}
    for words in DOCUMENTS[title]:
        if words[1] in ("compare", "audit"):
            continue  # below: they take longer
        line = [places.get(word, word) for word in words]
        done = run(with_settings(line) if words[1] == "train" else line, monkeypatch)
        output = capsys.readouterr()
        assert done == 0, f"{shlex.join(line)}\n{output.out[-1500:]}{output.err[-1500:]}"
        if words[1] == "train":
            settings = Config.load(Path(line[line.index("--out") + 1]) / "config.yaml")
            asked = [word.partition("=")[2] for word in words if word.startswith("objective.name=")]
            assert "--from" in words or settings.objective.name == (asked or ["expected-count"])[0]


@pytest.mark.slow
def test_the_longer_commands_run(files, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(files)
    places = {"DIR": str(tmp_path / "run"), "SWEEP": str(tmp_path / "sweep"), "DATA": "purchases.csv"}
    longer = [words for commands in DOCUMENTS.values() for words in commands if words[1] in ("compare", "audit")]
    assert {words[1] for words in longer} == {"compare", "audit"}
    train = ["twotower", "train", "DATA", "--out", "DIR", "--set", "objective.name=mixed"]
    assert run(with_settings([places.get(word, word) for word in train]), monkeypatch) == 0
    for words in longer:
        line = [places.get(word, word) for word in words]
        done = run(with_settings(line) if words[1] == "compare" else line, monkeypatch)
        output = capsys.readouterr()
        assert done == 0, f"{shlex.join(line)}\n{output.out[-1500:]}{output.err[-1500:]}"
    document = json.loads((tmp_path / "sweep" / "results.json").read_text(encoding="utf-8"))
    assert [point["value"] for point in document["sweep"]["curves"][0]["points"]] == [0, 64, 256]


def test_every_objective_of_the_documents_has_a_command():
    names = {word.partition("=")[2] for commands in DOCUMENTS.values() for words in commands for word in words
             if word.startswith("objective.name=")}  # fmt: skip
    assert names == STATED and len(DOCUMENTS) == 4
    assert all(words[0] == "twotower" for commands in DOCUMENTS.values() for words in commands)
