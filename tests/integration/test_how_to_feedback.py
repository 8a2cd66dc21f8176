"""The commands and settings of docs/how-to/learn-from-feedback.md, run as written on small data."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import yaml

from planted import planted
from twotower.cli import main as cli

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "learn-from-feedback.md"
#: Added to every training run, to make it short.
SHORT = ["training.max_epochs=1", "training.start=random", "evaluation.baselines=false", "training.recent_prior=false"]


def page():
    """Return the settings by file name, and the commands, as lists of words."""
    text = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n# (\S+)\n(.*?)```", text, re.DOTALL)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    return dict(blocks), [shlex.split(line) for line in commands]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make the files that the page names, and go to their folder."""
    rng = np.random.default_rng(2)
    clicks = planted(queries=40, rows=24).with_row_index("row")
    clicks = clicks.with_columns(
        request_id=pl.format("r{}", pl.col("row")), dwell=pl.Series(rng.exponential(30.0, len(clicks)))
    ).drop("row")
    clicks.write_parquet(tmp_path / "clicks.parquet")
    shown = clicks.drop("dwell").with_columns(clicked=pl.lit(1))
    beside = [shown.with_columns(item_id=pl.Series(rng.integers(0, 100, len(clicks))), clicked=0) for _ in range(5)]
    parts = [shown, *(one.cast(dict(shown.schema)) for one in beside)]
    pl.concat(parts).unique(["user_id", "item_id", "timestamp"], keep="first", maintain_order=True).write_parquet(
        tmp_path / "impressions.parquet"
    )
    ratings = pl.Series(rng.integers(2, 6, len(clicks)))
    clicks.select("user_id", "item_id", "timestamp", rating=ratings).write_csv(tmp_path / "ratings.csv")
    for name, text in page()[0].items():
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_as_written(folder, monkeypatch, capsys):
    settings, commands = page()
    assert set(settings) == {"feedback.yaml", "dislikes.yaml", "weights.yaml"} and len(commands) == 3
    assert all(len(text.splitlines()) <= 10 for text in settings.values())
    said = {}
    for command in commands:
        monkeypatch.setattr("sys.argv", [*command, *(word for one in SHORT for word in ("--set", one))])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        out = command[command.index("--out") + 1]
        said[out] = printed.out + printed.err
        metadata = json.loads((folder / out / "model" / "metadata.json").read_text())
        wanted = yaml.safe_load(settings[command[command.index("--config") + 1]])
        assert metadata["config"]["objective"].get("feedback") == (
            {**wanted["objective"]["feedback"], "form": "softmax"} if "objective" in wanted else None
        )
    pattern = (
        r"feedback: (\d+) of (\d+) training rows have items that were passed over, [\d.]+ each; 0 further items are cut"
    )
    for out in ("run", "dislikes"):
        found = re.search(pattern, " ".join(said[out].split()))
        assert found and int(found[1]) > 50, said[out]
    assert "feedback:" not in said["weighted"]
