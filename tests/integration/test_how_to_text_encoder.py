"""The commands and settings of docs/how-to/train-a-text-encoder.md, run as written with a small random encoder."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import polars as pl
import pytest

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")

from support.tiny_text import WORDS, write_text_model
from twotower.cli import main as cli
from twotower.serving import Retriever

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "train-a-text-encoder.md"
#: Added to the training run, to make it short.
SHORT = ["training.max_epochs=1", "evaluation.baselines=false"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make the files that the page names, and go to their folder."""
    random = np.random.default_rng(0)
    topics = [random.choice(WORDS, 6).tolist() for _ in range(30)]
    asked = [" ".join(random.permutation(topics[n // 2])[:3]) for n in range(60)]
    pl.DataFrame({"item_id": range(30), "title": [" ".join(topic) for topic in topics]}).write_csv(
        tmp_path / "documents.csv"
    )
    pl.DataFrame({"query_id": range(60), "text": asked}).write_csv(tmp_path / "questions.csv")
    answers = [(n, item) for n in range(60) for item in (n // 2, *((n // 2 + 1 + random.permutation(29)[:3]) % 30))]
    pl.DataFrame(answers, schema=["query_id", "item_id"], orient="row").write_csv(tmp_path / "pairs.csv")
    write_text_model(tmp_path / "text-model", width=384)
    (name, text), *others = re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert not others
    (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_runs_as_written(folder, monkeypatch, capsys):
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    commands = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("twotower")]
    assert [command[1] for command in commands] == ["train", "recommend"]
    printed = []
    for command in commands:
        short = [word for one in SHORT for word in ("--set", one)] if command[1] == "train" else []
        monkeypatch.setattr("sys.argv", [*command, *short])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed.append(capsys.readouterr())
        assert ended.value.code == 0, printed[-1].err
    assert "text encoders" in printed[0].out + printed[0].err, "the plan has the memory of the encoder"
    assert printed[1].out.count("│ ") >= 10
    metadata = json.loads((folder / "run" / "model" / "metadata.json").read_text())
    assert metadata["config"]["item_tower"]["features"][0]["train"] == "lora"
    new = "how do shock waves form"
    retriever = Retriever.load(folder / "run")
    retriever.catalog.add([{"item_id": 1000, "title": new}])
    assert retriever.recommend(features=[{"text": new}], k=1)["item"].to_list() == [1000]
