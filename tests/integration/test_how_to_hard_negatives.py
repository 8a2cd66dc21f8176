"""The command and settings of docs/how-to/hard-negatives-for-text.md, run as written with a small random encoder."""

import re
import shlex
from pathlib import Path

import polars as pl
import pytest
import yaml

pytest.importorskip("sentence_transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

from support.tiny_text import WORDS, write_text_model
from twotower.cli import main as cli
from twotower.config.run import Config

PAGE = (Path(__file__).parents[2] / "docs" / "how-to" / "hard-negatives-for-text.md").read_text(encoding="utf-8")
SHORT = ["training.max_epochs=2", "evaluation.baselines=false", "training.batch_size=16", "training.logger=none"]


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_page_runs_as_written(tmp_path, monkeypatch, capsys):
    titles = [f"{WORDS[n]} {WORDS[n + 1]} {WORDS[n + 2]}" for n in range(30)]
    pl.DataFrame({"doc_id": [f"d{n}" for n in range(30)], "title": titles}).write_csv(
        tmp_path / "documents.tsv", separator="\t"
    )
    pairs = [
        (f"{WORDS[n % 30]} {WORDS[(n + n // 30) % 30]}", f"d{n % 30}", f"d{(n + 5) % 30} d{(n + 9) % 30}")
        for n in range(90)
    ]
    pl.DataFrame(pairs, schema=["text", "doc_id", "hard"], orient="row").write_csv(
        tmp_path / "pairs.tsv", separator="\t"
    )
    write_text_model(tmp_path / "text-model", width=16)
    (command,) = blocks("sh")
    settings = yaml.safe_load(next(one for one in blocks("yaml") if one.startswith("# hard.yaml")))
    settings["item_tower"]["dimension"] = 16
    (tmp_path / "hard.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [*shlex.split(command), *(word for one in SHORT for word in ("--set", one))])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    written = capsys.readouterr()
    assert ended.value.code == 0, written.err
    assert "training rows have items that were passed over, 2.0 each" in written.out + written.err
    monkeypatch.setattr("sys.argv", ["twotower", "audit", "hard"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code != 0 and "trained with objective.guard" in capsys.readouterr().err


def test_the_other_settings_of_the_page_are_settings():
    others = [yaml.safe_load(one) for one in blocks("yaml") if not one.startswith("# ")]
    assert len(others) == 2
    for values in others:
        Config.model_validate({**values, "data": {"query_text": "text", **values["data"]}})
