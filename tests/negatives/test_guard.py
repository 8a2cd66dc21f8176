"""The guard: which candidates it masks, by loops over cosines, and that the sum over the others stays unbiased."""

from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch

from support.drawing import standard_errors_off
from twotower.config.run import Config
from twotower.data import Interactions, with_eligibility
from twotower.errors import InputError
from twotower.features import text as texts
from twotower.negatives import Catalog, DrawRequest, Guard, HardNegatives, Pool, Sampled, Uniform
from twotower.objectives.build import build_objective, leaves_out_items

N, QUERIES, WIDTH = 12, 5, 3
RANDOM = torch.Generator().manual_seed(0)
ITEMS = torch.nn.functional.normalize(torch.randn(N, WIDTH, generator=RANDOM), dim=1)
ASKED = torch.nn.functional.normalize(torch.randn(QUERIES, WIDTH, generator=RANDOM), dim=1)
#: Items 3 and 4 have the same text; item 7 and query 4 have none.
ITEMS[4], ITEMS[7], ASKED[4] = ITEMS[3], 0.0, 0.0
ROWS = [(0, 3), (0, 5), (1, 4), (2, 0), (3, 7), (4, 2), (-1, 2)]


def masked(query, positive, margin, relative):
    """Return the masked items of a row, by loops."""
    found = set()
    if query in (-1, 4) or positive == 7:
        return found
    cosines = [float(ASKED[query].double() @ ITEMS[j].double()) for j in range(N)]
    own = cosines[positive]
    for j in range(N):
        if j not in (positive, 7) and cosines[j] >= min(own - margin, own - relative * abs(own)) - 1e-6:
            found.add(j)
    return found


def request(**options):
    queries, items = torch.tensor(ROWS).T
    return DrawRequest(items.clone(), queries.clone(), **options)


@pytest.mark.parametrize(("margin", "relative"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.5), (0.1, 0.9)])
def test_masks_are_those_of_loops(margin, relative):
    pool = Pool(Sampled(Uniform(N), 30, per_row=True), Catalog(N))
    pool.guard = Guard(ASKED, ITEMS, margin=margin, relative_margin=relative)
    drawn, count = pool.draw(request(generator=torch.Generator().manual_seed(1))), 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(pool.draw(request()).mask, drawn.mask), "half precision would move the limits"
    tiles = torch.cat(list(drawn.negative_mask.matrices([0, 2, len(ROWS)])))
    for row, (query, positive) in enumerate(ROWS):
        wanted = masked(query, positive, margin, relative)
        assert {j for j in range(N) if drawn.mask[row, drawn.items == j].any()} == wanted | {positive}
        assert torch.equal(tiles[row], drawn.mask[row])
        live = set(drawn.row_items[row][~drawn.row_mask[row]].tolist()) - {-1}
        assert live.isdisjoint(wanted | {positive})
        count += len(wanted)
    assert count > 10 and 4 in masked(0, 3, 0.0, 0.0)


def test_the_sum_over_the_other_items_is_unbiased_and_a_forgotten_mask_is_detected():
    rows, query, positive = 4000, 1, 4
    pool = Pool(Sampled(Uniform(N), 6, per_row=True))
    scores = torch.randn(N, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    out = [*masked(query, positive, 0.2, 0.0)]
    target = float(scores.exp().sum() - scores[out].exp().sum())
    errors = []
    for guard in (Guard(ASKED, ITEMS, margin=0.2), None):
        pool.guard = guard
        drawn = pool.draw(
            torch.full((rows,), positive),
            queries=torch.full((rows,), query),
            generator=torch.Generator().manual_seed(5),
        )
        weights = torch.where(drawn.row_mask, 0.0, torch.exp(-drawn.row_log_expected_count)).double()
        sums = scores[positive].exp() + (weights * scores[drawn.row_items.clamp(min=0)].exp()).sum(1)
        errors.append(standard_errors_off(sums, target))
    assert errors[0] < 4 and errors[1] > 8 and len(out) > 1


def test_parts_of_a_batch_and_strata_have_the_same_masks():
    mined = HardNegatives(QUERIES, 3)
    mined.refresh(torch.arange(QUERIES), torch.arange(3 * QUERIES).reshape(QUERIES, 3) % N)
    pool = Pool(mined, Catalog(N))
    pool.guard = Guard(ASKED, ITEMS, margin=0.4)
    whole = pool.draw(request())
    part = pool.draw(DrawRequest(torch.tensor(ROWS)[:, 1], torch.tensor(ROWS)[2:5, 0], rows=slice(2, 5)))
    assert torch.equal(whole.mask[2:5], part.mask) and torch.equal(whole.row_mask[2:5], part.row_mask)
    for row, (query, positive) in enumerate(ROWS):
        out = masked(query, positive, 0.4, 0.0) | {positive, -1}
        assert whole.row_mask[row].tolist() == [j in out for j in whole.row_items[row].tolist()]
    alone = Pool(Catalog(N))
    alone.guard = pool.guard
    with pytest.raises(InputError, match="pass DrawRequest"):
        alone.draw(torch.tensor([1]))


@pytest.fixture
def encoder(monkeypatch):
    """Replace sentence models by vectors that depend on the text and the model alone; record what is encoded."""
    asked = []

    def vectors(names, model):
        asked.append((model, names.to_list()))
        found = [np.random.default_rng(list(f"{model}{name}".encode())).normal(size=WIDTH) for name in names]
        return np.stack(found).astype(np.float32)

    monkeypatch.setattr("twotower.objectives.guard.embed_texts", vectors)
    monkeypatch.setattr(texts, "embed_texts", vectors)
    return asked


@pytest.fixture(scope="module")
def data():
    return Interactions.from_frame(
        pl.DataFrame({"query_id": [0, 0, 1, 2, 2], "item_id": [0, 1, 1, 2, 0]}),
        items=pl.DataFrame({"item_id": [0, 1, 2], "title": ["a", None, "b "], "body": ["x", "", "y"]}),
        queries=pl.DataFrame({"query_id": [0, 1, 2], "words": ["q", "r", None]}),
    )


READS = [
    "item_tower.features=[{column: title, kind: text, model: m, prompt: 'p: '}]",
    "query_tower.features=[{column: words, kind: text, model: m, prompt: 'q: '}]",
]


def guard_of(data, *changes):
    config = Config.load(None, ["query_tower.history=null", "objective.sources=[{uniform: {size: 4}}]", *changes])
    return build_objective(config, data).pool.guard


def test_texts_and_model_are_those_of_the_towers_or_of_the_settings(data, encoder):
    guard = guard_of(data, *READS, "objective.guard={margin: 0.2}")
    assert encoder == [("m", ["q: q", "q: r"]), ("m", ["p: a", "p: b"])]
    assert guard.get_buffer("has_text").tolist() == [True, False, True] and guard.margin == 0.2
    assert guard.queries.norm(dim=1).tolist() == pytest.approx([1.0, 1.0, 0.0])
    encoder.clear()
    guard_of(data, *READS, "objective.guard={model: other, items: [title, body], query: words, item_prompt: 'd: '}")
    assert encoder == [("other", ["q", "r"]), ("other", ["d: a x", "d: b  y"])]
    assert guard_of(data) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["objective.name=refined-logq", "objective.sources=null"], "refined-logq: it normalises"),
        (["objective.name=nce", "objective.sources=[{uniform: {size: 4}}]"], "nce: it keeps drawn copies"),
        (["objective.guard={items: [titel], model: m}"], "items: no column 'titel' in the item table"),
        (["query_tower.features=none"], "guard.query: the towers have no text feature"),
        (["item_tower.features=none"], "guard.items: the towers have no text feature"),
        (["item_tower.features=[{column: title, kind: text}]"], "guard.model: no text feature of the items has"),
        (["data.query_text=text", "data.columns.query=query_id"], "a text belongs to a row"),
    ],
)
def test_what_a_guard_cannot_compare_is_rejected(data, encoder, changes, message):
    with pytest.raises(InputError, match=message) as error:
        guard_of(data, *READS, "objective.guard={}", *changes)
    assert "\n" not in str(error.value)


def test_a_guard_and_a_rule_of_eligible_items_mask_together(data, encoder):
    table = data.item_table.with_columns(until=pl.Series(["2020-01-01", None, None]))
    timed = Interactions.from_frame(
        pl.DataFrame({"query_id": [0, 0, 1], "item_id": [0, 1, 2], "timestamp": [1_500_000_000, 1_600_000_000, 9**9]}),
        items=table,
        queries=data.query_table,
    )
    ruled = with_eligibility(timed, available_until="until")
    pool = build_objective(
        Config.load(None, [*READS, "query_tower.history=null", "objective.sources=[{catalog: {}}]"]), ruled
    ).pool
    queries, items = torch.tensor([0, 1]), torch.tensor([1, 2])
    at = DrawRequest(items, queries, times=torch.tensor([1_600_000_000, 1_400_000_000]) * 10**6)
    alone = pool.draw(at).mask
    pool.guard = Guard(*(torch.ones(3, 1) for _ in range(2)))
    assert alone.tolist() == [[True, True, False], [False, False, True]]
    assert pool.draw(at).mask.all(), "one vector for all: all are as near as the positive"


def test_an_audit_has_no_such_target():
    assert leaves_out_items(Config.load(None, ["objective.guard={}"]).objective) == "objective.guard"
    mined = "objective.sources=[{mined: {size: 2, ranks: [2, 5], skipped: mask}}, {in_batch: {}}]"
    assert "mined" in leaves_out_items(Config.load(None, [mined]).objective)
    assert leaves_out_items(Config.load(None, [mined.replace("mask", "keep")]).objective) is None


@pytest.mark.parametrize("value", [["a"], b"\xff"])
def test_a_column_that_is_no_text_is_named(data, encoder, value):
    odd = replace(data, item_table=data.item_table.with_columns(odd=pl.Series([value] * data.num_items)))
    with pytest.raises(InputError, match=r"objective\.guard\.items: column 'odd' has .*; expected text"):
        guard_of(odd, *READS, "objective.guard={items: [odd]}")
