"""The loss over nested widths: against float64 loops, against towers cut by hand, and in whole training runs."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

import reference
import twotower as tt
from support.conformance import Cell, build
from training.test_fit import config, interrupt_at, weights
from training.test_step import batch
from twotower.config.run import Config
from twotower.errors import InputError, Interrupted
from twotower.index.prefix import Prefix
from twotower.negatives import CountedFrequency, InBatch, Pool, Sampled, Uniform
from twotower.objectives import Embedded, SampledSoftmax
from twotower.objectives.build import OBJECTIVES, build_objective
from twotower.towers import build_towers
from twotower.training import compute_loss
from twotower.training.step import nested_loss

WIDTHS = (2, 3, 6)


def cut(row, width, dimension, *, cosine):
    """Shorten one vector by hand; coordinates after the first D are kept."""
    first = [float(x) for x in row[:width]]
    length = math.sqrt(sum(x * x for x in first)) if cosine and width < dimension else 1.0
    return [x / length for x in first] + [float(x) for x in row[dimension:]]


def loops(flat, shapes, drawn, *, cosine, of_widths, temperature):
    """Compute the nested loss one row, candidate and width at a time."""
    tensors, at = [], 0
    for rows, columns in shapes:
        tensors.append([flat[at + row * columns : at + (row + 1) * columns] for row in range(rows)])
        at += rows * columns
    total = 0.0
    for width, weight in zip(WIDTHS, of_widths, strict=True):
        short = [[cut(row, width, WIDTHS[-1], cosine=cosine) for row in rows] for rows in tensors]
        losses = reference.sampled_softmax(
            *short, drawn.log_expected_count.tolist(), drawn.mask.tolist(), temperature=temperature
        )
        total += weight / sum(of_widths) * sum(losses) / len(losses)
    return total


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("extra", [0, 1])
@pytest.mark.parametrize("of_widths", [None, (1.0, 3.0, 0.5)])
def test_value_and_gradient_equal_loops(cosine, extra, of_widths):
    rng = torch.Generator().manual_seed(4)
    positives = torch.tensor([0, 1, 2, 1])
    objective = SampledSoftmax(Pool(InBatch(CountedFrequency(torch.ones(7))), Sampled(Uniform(7), 3), unique=True))
    drawn = objective.draw(positives, generator=rng)
    table = torch.randn(7, WIDTHS[-1] + extra, dtype=torch.float64, generator=rng)
    query = torch.randn(4, WIDTHS[-1] + extra, dtype=torch.float64, generator=rng)
    vectors = [query, table[positives], table[drawn.items]]
    vectors = [one.clone().requires_grad_() for one in vectors]
    towers = SimpleNamespace(
        widths=WIDTHS,
        nested_weights=of_widths,
        temperature=0.5,
        at_width=lambda embedded, width: Prefix(width, WIDTHS[-1], cosine)(embedded),
    )
    loss = nested_loss(towers, objective, Embedded(*vectors), drawn)
    given = {"cosine": cosine, "of_widths": of_widths or (1.0, 1.0, 1.0), "temperature": 0.5}
    flat, shapes = torch.cat([one.detach().flatten() for one in vectors]).tolist(), [one.shape for one in vectors]
    assert loss.item() == pytest.approx(loops(flat, shapes, drawn, **given), rel=1e-6)  # log counts are float32
    found = torch.cat([one.flatten() for one in torch.autograd.grad(loss, vectors)])
    expected = reference.finite_difference(lambda values: loops(values, shapes, drawn, **given), flat)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-7)
    assert found.abs().min() > 0


def narrowed(towers, width):
    """Copy towers that embed at one width only, cut by hand."""
    one = copy.copy(towers)
    one.nested = ()

    def short(embed):
        def embedded(*given, **options):
            whole = embed(*given, **options)
            dimension = towers.item_tower.dimension
            if width == dimension:
                return whole
            first = whole[:, :width]
            if towers.cosine:
                first = first / first.norm(dim=1, keepdim=True)
            return torch.cat([first, whole[:, dimension:]], 1)

        return embedded

    for name in ("embed_queries", "embed_items", "embed_sequences"):
        setattr(one, name, short(getattr(towers, name)))
    return one


def assert_mean_over_widths(towers, loss_of, parameters, widths):
    """Compare value and gradients of a step with the mean of the steps of towers cut to each width."""
    loss = loss_of(towers)
    expected = sum(loss_of(narrowed(towers, width)) for width in widths) / len(widths)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert loss.item() != pytest.approx(loss_of(narrowed(towers, widths[-1])).item(), rel=1e-6)
    found, wanted = (torch.autograd.grad(one, parameters, allow_unused=True) for one in (loss, expected))
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "cell",
    [
        Cell("in-batch + uniform", known=True, duplicates="unique", feedback="softmax"),
        Cell("in-batch + uniform", batches="whole sequences", feedback="logistic"),
        Cell("in-batch + uniform", batches="horizon questions", feedback="pairwise"),
        Cell("catalog", batches="eligible rows"),
        Cell("in-batch + uniform", batches="eligible whole sequences", known=True),
        Cell("memory", batches="rows in blocks of 9"),
        Cell("in-batch + uniform per row", "grouped", "rows within groups"),
        Cell("mined + in-batch + uniform", "streaming", "rows"),
    ],
    ids=lambda cell: f"{cell.sources}, {cell.batches}, {cell.feedback}",
)
def test_every_width_shares_the_candidates_of_a_step(cell):
    """With feedback, rules for eligible items, sequences, questions and blocks: one draw, losses at all widths."""
    run = build(cell)
    run.towers.nested = (3, 8)
    rows = next(iter(run.batches))
    drawn = []

    def loss_of(towers):
        goal = copy.deepcopy(run.objective)  # sources with a memory change when they draw
        goal.draw, draw = lambda *given, **options: drawn.append(1) or draw(*given, **options), type(goal).draw
        draw = draw.__get__(goal)
        return compute_loss(towers, goal, rows, known_positives=run.known, generator=torch.Generator().manual_seed(7))[
            0
        ]

    parameters = [one for one in run.towers.parameters() if one.requires_grad]
    loss_of(run.towers)
    draws = len(drawn)
    assert_mean_over_widths(run.towers, loss_of, parameters, (3, 8, 16))
    assert len(drawn) == 6 * draws  # a step over three widths draws as often as a step at one


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"logistic-observed"}))
@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_every_objective_with_bias_and_popularity(planted_split, name, similarity):
    train = planted_split.train
    changes = [
        "item_tower={dimension: 8, nested: [3, 5], bias: true, popularity: 0.5}",
        f"objective.similarity={similarity}",
        f"objective.name={name}",
        "query_tower={history: null, id_embedding: true, hidden: []}",
    ]
    settings = Config.load(None, changes)
    torch.manual_seed(0)
    towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items).double()
    objective = build_objective(settings, train).double()
    towers.set_popularity(torch.from_numpy(train.item_counts()))
    torch.nn.init.normal_(towers.bias.weight)
    rows = batch(train, weighted=True)

    def loss_of(one):
        return compute_loss(one, objective, rows, generator=torch.Generator().manual_seed(1))[0]

    parameters = [one for one in (*towers.parameters(), *objective.parameters()) if one.requires_grad]
    assert_mean_over_widths(towers, loss_of, parameters, (3, 5, 8))


def test_one_width_is_bitwise_the_plain_run(planted_split):
    plain = tt.fit(planted_split, config("training.max_epochs=1"), progress=False)
    same = tt.fit(planted_split, config("training.max_epochs=1", "item_tower.nested=[16]"), progress=False)
    assert torch.equal(weights(plain), weights(same)) and plain.fit.history == same.fit.history
    assert tt.evaluate(same, planted_split.test, baselines=False).widths is None


NESTED = (
    "item_tower.nested=[4, 8]",
    "item_tower.bias=true",
    "training.max_epochs=1",
    "query_tower.dropout=0.2",
    "training.micro_batch=16",
)


def test_a_resumed_run_with_a_gradient_cache_equals_an_uninterrupted_one(planted_split, tmp_path, monkeypatch):
    whole = tt.fit(planted_split, config(*NESTED), directory=tmp_path / "whole", progress=False)
    with monkeypatch.context() as patch:
        interrupt_at(7, patch)
        with pytest.raises(Interrupted):
            tt.fit(planted_split, config(*NESTED), directory=tmp_path / "cut", progress=False)
    resumed = tt.fit(planted_split, config(*NESTED), directory=tmp_path / "cut", resume=True, progress=False)
    assert torch.equal(weights(whole), weights(resumed)) and whole.fit.history == resumed.fit.history


def test_micro_batches_give_the_gradients_of_the_whole_step(planted_split):
    train = planted_split.train
    settings = Config.load(None, ["item_tower={dimension: 8, nested: [3], hidden: [9], bias: true}"])
    torch.manual_seed(0)
    towers = build_towers(settings, num_queries=train.num_queries, num_items=train.num_items).double().eval()
    objective = build_objective(settings, train).double()
    found = []
    for micro_batch in (None, 5):
        loss = compute_loss(
            towers, objective, batch(train), micro_batch=micro_batch, generator=torch.Generator().manual_seed(1)
        )[0]
        towers.zero_grad()
        loss.backward()
        found.append([loss.detach(), *(p.grad.to_dense().clone() for p in towers.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert sum(float(one.abs().max()) > 1e-6 for one in found[0]) > 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nested: [8, 4]", "ascending widths, each once"),
        ("nested: [4, 4]", "ascending widths, each once"),
        ("nested: [32]", "32 is wider than the embeddings; expected widths up to dimension, 16"),
        ("nested: [0]", "greater than or equal to 1"),
        ("nested: [4], nested_weights: [1, 1, 1]", r"one weight for each of the widths \[4, 16\], found 3"),
        ("nested: [4], nested_weights: [1, 0]", "greater than 0"),
    ],
)
def test_impossible_widths_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Config.load(None, [f"item_tower={{dimension: 16, {change}}}"])


def test_weights_of_widths_need_a_fixed_number_of_widths():
    with pytest.raises(InputError, match="set start_ranks to"):
        Config.load(None, ["item_tower={nested: [4], nested_weights: [1, 2]}", "training.start_ranks=[1, 2]"])
    assert Config.load(None, ["item_tower={dimension: 8, nested: [4, 8]}"]).item_tower.widths == (4, 8)
