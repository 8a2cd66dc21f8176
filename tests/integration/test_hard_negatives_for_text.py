"""Listed and mined negatives and a memory, for queries that are texts, read by an encoder that is trained."""

import numpy as np
import polars as pl
import pytest
import torch

pytest.importorskip("transformers", reason="pip install 'twotower[text]'")

from support.tiny_text import WORDS, write_text_model
from twotower.config.run import Config
from twotower.data import KnownPositives
from twotower.features.from_config import context_to_read, encode_features
from twotower.objectives.build import build_objective
from twotower.run.batches import make_batches, make_slates
from twotower.run.data import read_data
from twotower.run.mining import make_mining
from twotower.towers import build_towers
from twotower.training import compute_loss

ITEMS, ASKED, WEIGHT = 14, 20, 3.0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write pairs of a text and a document with listed negatives, beside users too, and the negatives as pairs."""
    folder, random = tmp_path_factory.mktemp("listed"), np.random.default_rng(0)
    titles = [" ".join(random.choice(WORDS, 4)) for _ in range(ITEMS)]
    pl.DataFrame({"item_id": [f"d{n}" for n in range(ITEMS)], "title": titles}).write_csv(folder / "documents.csv")
    rows = []
    for n in range(2 * ASKED):
        item, *others = (f"d{j}" for j in random.permutation(ITEMS)[: 1 + n % 4])
        rows.append((f"u{n % 3}", " ".join(titles[int(item[1:])].split()[: 1 + n % 3]), item, " ".join(others)))
    frame = pl.DataFrame(rows, schema=["user_id", "text", "item_id", "hard"], orient="row")
    frame.write_csv(folder / "pairs.csv")
    listed = frame.with_columns(pl.col("hard").str.split(" ")).explode("hard").filter(pl.col("hard") != "")
    listed.select("user_id", pl.format(" {} ", "text").alias("text"), item_id="hard").write_csv(folder / "beside.csv")
    listed.select("text", item_id="hard").write_csv(folder / "negatives.csv")
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_text_model(tmp_path_factory.mktemp("text") / "tiny", dropout=0.0)


def settings(files, *more):
    return Config.load(
        None,
        [
            "data.query_text=text",
            f"data.items={files / 'documents.csv'}",
            "data.catalog=table",
            f"objective.feedback={{weight: {WEIGHT}}}",
            "training.question=next",
            "training.batch_size=16",
            *more,
        ],
    )


def loaded(files, config):
    return read_data(files / "pairs.csv", config.data, context=context_to_read(config))


def slates(files, *more):
    """Return the slates of all rows as (text, positive, negatives)."""
    config = settings(files, *more)
    data = loaded(files, config)
    found = make_slates(config, data).of(np.arange(len(data))).items
    own = data.context["text"] if config.data.columns.query else data.queries.ids[data.query_codes()]
    ids = [set(data.items.decode(row[row >= 0].numpy()).to_list()) for row in found]
    return sorted(zip(own, data.items.decode(data.item_codes), map(sorted, ids), strict=True))


def by_hand(files, of_texts):
    """Return the same from the file: a row's own list, or those of its text; never an item that the text has."""
    rows = pl.read_csv(files / "pairs.csv").rows()
    found = []
    for user, text, item, hard in rows:
        key = (text,) if of_texts else (user, text)
        same = [row for row in rows if (row[1:2] if of_texts else row[:2]) == key]
        known = {row[2] for row in rows if (row[1] == text if of_texts else row[0] == user)}
        listed = {one for row in same for one in (row[3] or "").split()}
        found.append((text, item, sorted((listed if of_texts != "own" else set((hard or "").split())) - known)))
    return sorted(found)


def test_the_negatives_of_texts_are_those_of_the_files(files):
    assert slates(files, "data.feedback.column=hard") == by_hand(files, "own")
    assert slates(files, f"data.feedback.file={files / 'negatives.csv'}") == by_hand(files, True)
    assert sum(len(one[2]) for one in by_hand(files, "own")) > 30
    beside = slates(
        files, "data.columns.query=user_id", f"data.feedback={{file: {files / 'beside.csv'}, request: text}}"
    )
    assert beside == by_hand(files, False)


def test_listed_ids_that_are_not_in_the_catalog_are_counted(files):
    config = settings(files, "data.feedback.column=hard", "data.catalog=interactions")
    data = loaded(files, config)
    listed = [one for row in pl.read_csv(files / "pairs.csv")["hard"].fill_null("") for one in row.split()]
    unknown = sum(one not in data.items.ids.to_list() for one in listed)
    assert (f"; {unknown} listed ids are not in the catalog" in str(make_slates(config, data))) == (unknown > 0)
    renamed = config.changed("data", feedback=config.data.feedback)
    data = loaded(files, renamed)
    data.context = data.context.with_columns(hard=pl.lit("x1 x2"))
    with pytest.raises(ValueError, match=f"{2 * len(data)} ids are not in the catalog"):
        make_slates(renamed, data)


def run_of(files, model, *more):
    """Build what a run has: towers, objective, a batch, known positives and the data."""
    text = f"kind: text, model: {model}, train: full"
    config = settings(
        files,
        f"query_tower.features=[{{column: text, {text}}}]",
        f"item_tower.features=[{{column: title, {text}}}]",
        "query_tower.hidden=null",
        "query_tower.projection=false",
        "item_tower.projection=false",
        "item_tower.id_embedding=false",
        "item_tower.dimension=16",
        "objective.temperature=0.2",
        *more,
    ).resolved(2 * ASKED)
    data = loaded(files, config)
    encoded = encode_features(config, data)
    sizes = {"num_queries": data.num_queries, "num_items": data.num_items}
    torch.manual_seed(0)
    towers = build_towers(config, **sizes, item_features=encoded["item"], query_features=encoded["query"]).train()
    return config, data, towers, build_objective(config, data), list(make_batches(config, data))


def exact(towers, data, batch, omega):
    """Return the loss of a batch and its gradients: -s_y + log sum_j omega_j exp s_j, row by row."""
    queries = towers.embed_queries(batch.queries, torch.empty(len(batch), 0, dtype=torch.int64))
    scores = (queries @ towers.embed_items(torch.arange(data.num_items)).T).double() / towers.temperature
    losses = []
    for row, item in enumerate(batch.items.tolist()):
        total = sum(omega[row, j] * scores[row, j].exp() for j in range(data.num_items) if j != item)
        losses.append(torch.log(scores[row, item].exp() + total) - scores[row, item])
    loss = torch.stack(losses).mean()
    gradients = torch.autograd.grad(loss, trained(towers), allow_unused=True)
    return loss, gradients


def trained(towers):
    return [parameter for parameter in towers.parameters() if parameter.requires_grad]


def assert_step(towers, objective, batch, known, expected, micro_batch=5):
    generator = torch.Generator().manual_seed(3)
    loss, _, _ = compute_loss(
        towers, objective, batch, known_positives=known, micro_batch=micro_batch, generator=generator
    )
    towers.zero_grad()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(expected[0].detach()), rel=1e-5)
    moved = 0
    for parameter, gradient in zip(trained(towers), expected[1], strict=True):
        if gradient is not None:
            assert torch.allclose(parameter.grad, gradient, rtol=1e-3, atol=1e-5)
            moved += int(gradient.abs().max() > 1e-4)
    assert moved > 10


def test_listed_negatives_count_more_in_the_loss_of_a_trained_encoder(files, model):
    _, data, towers, objective, (batch, *_) = run_of(
        files, model, "data.feedback.column=hard", "objective.sources=[{catalog: {}}]"
    )
    known = KnownPositives(data)
    omega = torch.ones(len(batch), data.num_items, dtype=torch.float64)
    rows, texts = pl.read_csv(files / "pairs.csv").rows(), data.queries.ids
    for row, query in enumerate(batch.queries.tolist()):
        own = {one[2] for one in rows if one[1] == texts[query]}
        listed = data.context["hard"][int(batch.rows[row])]
        for j, one in enumerate(data.items.ids):
            omega[row, j] = 0.0 if one in own else 1.0 + WEIGHT * (one in (listed or "").split())
    assert (omega > 1).sum() > 8
    assert_step(towers, objective, batch, known, exact(towers, data, batch, omega))


def test_mined_negatives_are_ranked_by_the_encoder_and_replace_their_part_of_the_sum(files, model):
    """With `top` and kappa = 1 beside the catalog the loss is the softmax without the skipped items."""
    config, data, towers, objective, (batch, *_) = run_of(
        files,
        model,
        "objective.feedback=null",
        "objective.sources=[{mined: {size: 2, ranks: [2, 6], margin: 0.1, skipped: mask}}, {catalog: {}}]",
    )
    make_mining(objective, config, data, towers)(towers)
    with torch.no_grad():
        towers.eval()
        queries = towers.embed_queries(batch.queries, torch.empty(len(batch), 0, dtype=torch.int64))
        scores = queries @ towers.embed_items(torch.arange(data.num_items)).T
        towers.train()
    omega, skipped = torch.ones(len(batch), data.num_items, dtype=torch.float64), 0
    for row, (query, item) in enumerate(zip(batch.queries.tolist(), batch.items.tolist(), strict=True)):
        own = data.item_codes[data.offsets[query] : data.offsets[query + 1]].tolist()
        omega[row, own] = 0.0
        ranked = [j for j in scores[row].argsort(descending=True).tolist() if j not in own]
        for place, j in enumerate(ranked[:6], start=1):
            if place < 2 or scores[row, j] > scores[row, item] - 0.1:
                omega[row, j], skipped = 0.0, skipped + 1
    assert skipped > len(batch), "some are above the margin"
    assert_step(towers, objective, batch, KnownPositives(data), exact(towers, data, batch, omega))


def test_a_guard_masks_listed_and_other_items_in_the_loss(files, model, monkeypatch):
    """The guide scores an item by the last letter of the text; equal letters are as near as the positive."""

    def vectors(names, named):
        assert named == "guide"
        return np.eye(4, dtype=np.float32)[[ord(name[-1]) % 4 for name in names]]

    monkeypatch.setattr("twotower.objectives.guard.embed_texts", vectors)
    _, data, towers, objective, (batch, *_) = run_of(
        files,
        model,
        "data.feedback.column=hard",
        "objective.sources=[{catalog: {}}]",
        "objective.guard={model: guide, margin: 0.5}",
    )
    omega = torch.ones(len(batch), data.num_items, dtype=torch.float64)
    rows, texts, titles = pl.read_csv(files / "pairs.csv").rows(), data.queries.ids, data.item_table["title"]
    kinds = set()
    for row, (query, item) in enumerate(zip(batch.queries.tolist(), batch.items.tolist(), strict=True)):
        own = {one[2] for one in rows if one[1] == texts[query]}
        listed = data.context["hard"][int(batch.rows[row])]
        near = [ord(title[-1]) % 4 == ord(texts[query][-1]) % 4 for title in titles]
        for j, one in enumerate(data.items.ids):
            is_listed = one in (listed or "").split()
            masked = near[j] or not near[item]  # a cosine is 0 or 1, so without a near positive all items are masked
            omega[row, j] = 0.0 if one in own or masked else 1.0 + WEIGHT * is_listed
            kinds.add((is_listed, masked))
    assert len(kinds) == 4
    assert_step(towers, objective, batch, KnownPositives(data), exact(towers, data, batch, omega))


def test_remembered_items_are_encoded_by_the_present_weights(files, model):
    """A memory has codes, so the step after a change of the weights has no stale vectors."""
    _, data, towers, objective, (first, second, *_) = run_of(
        files, model, "objective.feedback=null", "objective.sources=[{memory: {size: 16}}]", "objective.unique=false"
    )
    objective.draw(first.items)
    with torch.no_grad():
        for parameter in towers.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    (memory,) = objective.pool.members()
    assert memory.age == 1.0 and sorted(memory.items.tolist()) == sorted(first.items.tolist())
    # Both batches are of one epoch of 40 rows: kappa_j = 16 c_j / 39.
    kappa = torch.bincount(torch.from_numpy(data.item_codes.astype(np.int64)), minlength=data.num_items) * 16 / 39
    omega = torch.bincount(first.items, minlength=data.num_items).double() / kappa
    omega = omega.nan_to_num(0.0).expand(len(second), -1).clone()
    known = KnownPositives(data)
    for row, query in enumerate(second.queries.tolist()):
        omega[row, data.item_codes[data.offsets[query] : data.offsets[query + 1]].tolist()] = 0.0
    expected = exact(towers, data, second, omega)
    assert_step(towers, objective, second, known, expected)
