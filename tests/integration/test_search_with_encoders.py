"""Texts as queries, or beside a query id, read by an encoder that is trained: fitted, saved, asked in words, judged."""

import numpy as np
import polars as pl
import pytest

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")
pytest.importorskip("peft", reason="pip install 'twotower[text]'")
pytest.importorskip("bm25s", reason="pip install 'twotower[text]'")

from support.tiny_text import WORDS, write_text_model
from twotower.config.run import Config
from twotower.run.judgements import evaluate_judged
from twotower.run.run_folder import train_run
from twotower.serving import Retriever
from twotower.towers.text import text_transformers

COMMON = [
    "data.query_text=text",
    "data.split=random",
    "query_tower.history=null",
    "query_tower.hidden=null",
    "query_tower.projection=false",
    "item_tower.dimension=16",
    "item_tower.id_embedding=false",
    "item_tower.projection=false",
    "objective.sources=[{in_batch: {}}]",
    "training.question=next",
    "training.batch_size=32",
    "training.max_epochs=1",
    "training.accelerator=cpu",
    "training.logger=none",
    "evaluation.baselines=false",
]


@pytest.fixture
def files(tmp_path):
    """Write documents, and pairs of a text and a document that has its words, with users."""
    random = np.random.default_rng(0)
    topics = [random.choice(WORDS, 6).tolist() for _ in range(20)]
    titles = {"item_id": range(20), "title": [" ".join(topic) for topic in topics]}
    pl.DataFrame(titles).write_csv(tmp_path / "documents.csv")
    asked = [" ".join(random.permutation(topics[n % 20])[:3]) for n in range(60)]
    rows = [(asked[n], (n + step) % 20, f"u{n % 12}") for n in range(60) for step in range(4)]
    pl.DataFrame(rows, schema=["text", "item_id", "user_id"], orient="row").write_csv(tmp_path / "pairs.csv")
    return tmp_path, write_text_model(tmp_path / "encoder")


@pytest.mark.parametrize("train", ["full", "lora"])
@pytest.mark.parametrize("beside_ids", [False, True], ids=["texts alone", "beside user ids"])
def test_texts_are_encoded_by_what_was_trained(files, train, beside_ids):
    folder, encoder = files
    read = f"{{kind: text, model: {encoder}, train: {train}, column: "
    side = "context" if beside_ids else "features"
    chosen = [
        f"data.items={folder / 'documents.csv'}",
        f"query_tower.{side}=[{read}text}}]",
        f"item_tower.features=[{read}title}}]",
        *(["data.columns.query=user_id"] if beside_ids else []),
    ]
    model, _ = train_run(
        folder / "pairs.csv", folder / "run", Config.load(None, [*COMMON, *chosen]), progress=False, on_message=str
    )
    encoders = text_transformers(model.artifact.towers)
    assert encoders and all(one.train_mode == train for one in encoders)
    asked = ["ba de fi", "ko la mi"]
    found = Retriever.load(folder / "run").recommend(text=asked, k=20)
    assert found.equals(model.retriever.recommend(text=asked, k=20)), "loaded as trained"
    first, second = found["item"][:20].to_list(), found["item"][20:].to_list()
    assert sorted(first) == sorted(second) == list(range(20)) and first != second
    (folder / "qrels.tsv").write_text("q1 0 3 2\nq1 0 4 1\nq2 0 5 1\n")
    pl.DataFrame({"query_id": ["q1", "q2"], "text": ["ba de", "fi ko"]}).write_csv(folder / "queries.csv")
    judged = evaluate_judged(folder / "run", folder / "qrels.tsv", folder / "queries.csv")
    assert len(judged.per_query()) > 0
