"""Documents and queries in words: each topic has words of its own, for queries others than for documents."""

import numpy as np
import polars as pl

TOPICS, DOCUMENTS = 8, 48


def documents():
    """Return the documents: id, title and text; the text has words of the topic, the title its number."""
    rng = np.random.default_rng(0)
    rows = []
    for one in range(DOCUMENTS):
        topic = one % TOPICS
        chosen = [f"doc{topic}{'abcdef'[k]}" for k in rng.permutation(6)[:4]]
        rows.append((f"d{one:02d}", f"paper {one}", " ".join([*chosen, "the", "study"])))
    return pl.DataFrame(rows, schema=["item_id", "title", "text"], orient="row")


def searches(rows=600, seed=1):
    """Return pairs of a text and a document of its topic, with users and times; some texts occur many times."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(rows):
        topic = int(rng.integers(TOPICS))
        text = " ".join(f"ask{topic}{'abcdef'[k]}" for k in sorted(rng.permutation(6)[:2]))
        document = TOPICS * int(rng.integers(DOCUMENTS // TOPICS)) + topic
        found.append((text, f"d{document:02d}", f"u{int(rng.integers(40)):02d}", 1_700_000_000 + 3600 * row))
    return pl.DataFrame(found, schema=["search", "item_id", "user_id", "timestamp"], orient="row")


#: Settings of a small, quick run.
SMALL = [
    "data.query_text=search",
    "item_tower.dimension=16",
    "item_tower.features=[{column: text, kind: text, min_count: 1}]",
    "query_tower.hidden=null",
    "training.batch_size=64",
    "training.learning_rate=0.02",
    "training.warmup_steps=5",
    "training.max_epochs=6",
    "training.accelerator=cpu",
    "training.logger=none",
    "objective.sources=[{in_batch: {}}, {uniform: {size: 20}}]",
    "evaluation.baselines=false",
]


def topic_of(items):
    """Return the topic of each document id."""
    return np.array([int(one[1:]) % TOPICS for one in items])
