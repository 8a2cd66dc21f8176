"""Tests of the optimizer against float64 loops and torch's own optimizers."""

import copy
import math

import pytest
import torch

from reference import adagrad_table, adam_table
from twotower.errors import InputError
from twotower.training import TableOptimizer
from twotower.training import optimizer as optimizer_module
from twotower.training.checkpoint.io import SafeCheckpointIO
from twotower.training.optimizer import combine_rows, parameter_groups, sum_copies

N, D = 9, 4
#: Codes of each step: duplicates, a row unused for long (7), rows never used (0, 8), a single row, all rows once.
STEPS = [[1, 3, 3, 5], [7, 1], [5, 5, 5], [3], [2, 4, 6], [1, 2, 3], [4], [6, 6, 1], [3, 3], [7, 7, 5]]


def tables(sparse, dtype=torch.float32):
    torch.manual_seed(0)
    weight = torch.randn(N, D, dtype=dtype)
    return [torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=sparse) for _ in range(2)]


def steps(optimizer, table, targets, codes=STEPS):
    for rows, target in zip(codes, targets, strict=True):
        loss = ((table(torch.tensor(rows)) - target) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def targets(dtype=torch.float32, codes=STEPS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(len(rows), D, dtype=dtype, generator=generator) for rows in codes]


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_sparse_rows_equal_the_float64_loop(rule):
    table, _ = tables(sparse=True, dtype=torch.float64)
    before = table.weight.detach().clone()
    loop = adam_table if rule == "adam" else adagrad_table
    expected = loop(before.tolist(), STEPS, [target.tolist() for target in targets(torch.float64)], lr=0.1, eps=1e-8)
    steps(TableOptimizer(table.parameters(), lr=0.1, rule=rule), table, targets(torch.float64))
    assert torch.allclose(table.weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    assert torch.equal(table.weight[[0, 8]], before[[0, 8]]), "untouched rows must not change"
    assert (table.weight - before).abs()[1:8].min() > 1e-3, "touched rows must change"


def test_a_table_with_two_uses_gets_both_gradients_once():
    """As when the history uses the item tower's table."""
    torch.manual_seed(0)
    weight = torch.randn(N, D, dtype=torch.float64)
    items, history = [[1, 2, 5], [5, 6], [2, 2]], [[5, 5, 2, 1], [3], [2, 7]]
    target, pull = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    for rule, loop in (("adam", adam_table), ("rowwise-adagrad", adagrad_table)):
        table = torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=True)
        optimizer = TableOptimizer(table.parameters(), lr=0.1, rule=rule)
        for own, seen in zip(items, history, strict=True):
            distinct = torch.tensor(sorted(set(own)))
            loss = ((table(distinct) - target) ** 2).sum() + ((table(torch.tensor(seen)) - pull) ** 2).sum()
            optimizer.zero_grad()
            loss.backward()
            assert not table.weight.grad.is_coalesced()
            optimizer.step()
        codes = [sorted(set(own)) + seen for own, seen in zip(items, history, strict=True)]
        toward = [
            [target.tolist()] * len(set(own)) + [pull.tolist()] * len(seen)
            for own, seen in zip(items, history, strict=True)
        ]
        expected = loop(weight.tolist(), codes, toward, lr=0.1, eps=1e-8)
        assert torch.allclose(table.weight, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12)


def test_dense_gradients_equal_adamw():
    ours, theirs = tables(sparse=False)
    steps(TableOptimizer(ours.parameters(), lr=0.1, weight_decay=0.05), ours, targets())
    steps(torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.05), theirs, targets())
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


def test_lazy_adam_equals_sparse_adam():
    ours, theirs = tables(sparse=True)
    steps(TableOptimizer(ours.parameters(), lr=0.1), ours, targets())
    steps(torch.optim.SparseAdam(theirs.parameters(), lr=0.1), theirs, targets())
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_rowwise_adagrad_of_width_one_is_adagrad(sparse):
    torch.manual_seed(0)
    weight = torch.randn(N, 1, dtype=torch.float64)
    ours, theirs = (
        torch.nn.Embedding.from_pretrained(weight.clone(), freeze=False, sparse=form) for form in (sparse, False)
    )
    goals = [target[:, :1] for target in targets(torch.float64)]
    steps(TableOptimizer(ours.parameters(), lr=0.1, eps=1e-10, rule="rowwise-adagrad"), ours, goals)
    steps(torch.optim.Adagrad(theirs.parameters(), lr=0.1, eps=1e-10), theirs, goals)
    assert torch.allclose(ours.weight, theirs.weight, rtol=1e-10, atol=1e-12)


def test_rowwise_adagrad_is_the_same_with_dense_and_sparse_gradients():
    dense, _ = tables(sparse=False)
    sparse, _ = tables(sparse=True)
    for table in (dense, sparse):
        steps(TableOptimizer(table.parameters(), lr=0.1, rule="rowwise-adagrad"), table, targets())
    assert torch.allclose(dense.weight, sparse.weight, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("codes", [[4, 1, 4, 4, 0], [0, 2, 5], [3], [2, 2], [5, 4, 3]])
def test_rows_are_combined_as_coalesce_does(codes, dtype):
    values = torch.randn(len(codes), 3, dtype=dtype)
    gradient = torch.sparse_coo_tensor(torch.tensor([codes]), values, (6, 3), check_invariants=True)
    rows, sums = combine_rows(gradient)
    exact = torch.sparse_coo_tensor(torch.tensor([codes]), values.double(), (6, 3), check_invariants=True).coalesce()
    assert torch.equal(rows, exact.indices()[0])
    # A bfloat16 gradient is summed in float32.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    assert torch.allclose(sums.double(), exact.values(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_rows_whose_copies_are_kept_are_updated_once(rule, monkeypatch):
    """On an accelerator the distinct rows are not counted: the same updates, here on the CPU."""
    ours, other = tables(sparse=True, dtype=torch.float64)
    steps(TableOptimizer(ours.parameters(), lr=0.1, rule=rule), ours, targets(torch.float64))
    given = []

    def with_copies(gradient):
        rows, sums = sum_copies(gradient._indices()[0], gradient._values())
        given.append(len(rows) - len(rows.unique()))
        return rows, sums

    monkeypatch.setattr(optimizer_module, "combine_rows", with_copies)
    steps(TableOptimizer(other.parameters(), lr=0.1, rule=rule), other, targets(torch.float64))
    assert max(given) == 2
    assert torch.allclose(ours.weight, other.weight, rtol=0, atol=1e-13)


def test_sums_of_copies():
    rows, sums = sum_copies(torch.tensor([3, 1, 3, 0]), torch.tensor([[1.0], [2.0], [4.0], [8.0]]))
    assert rows.tolist() == [0, 1, 3, 3] and sums[:, 0].tolist() == [8.0, 2.0, 5.0, 5.0]
    rows, sums = sum_copies(torch.empty(0, dtype=torch.int64), torch.empty(0, 3))
    assert rows.shape == (0,) and sums.shape == (0, 3)


def test_combining_no_rows_gives_none():
    gradient = torch.sparse_coo_tensor(
        torch.empty(1, 0, dtype=torch.int64), torch.empty(0, 3), (6, 3), check_invariants=True
    )
    rows, sums = combine_rows(gradient)
    assert rows.shape == (0,) and sums.shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_a_resumed_state_continues_identically(rule, dtype, tmp_path):
    ours, other = tables(sparse=True, dtype=dtype)
    first = TableOptimizer(ours.parameters(), lr=0.1, rule=rule)
    steps(first, ours, targets(dtype)[:5], STEPS[:5])
    io = SafeCheckpointIO()
    io.save_checkpoint({"weight": ours.weight.detach(), "optimizer": first.state_dict()}, tmp_path / "c")
    saved = io.load_checkpoint(tmp_path / "c")
    other.weight.data.copy_(saved["weight"])
    second = TableOptimizer(other.parameters(), lr=0.1, rule=rule)
    second.load_state_dict(saved["optimizer"])
    for mine, theirs in zip(first.state[ours.weight].values(), second.state[other.weight].values(), strict=True):
        assert mine.dtype == theirs.dtype == torch.float32 and torch.equal(mine, theirs)
    for optimizer, table in ((first, ours), (second, other)):
        torch.manual_seed(3)  # for rounding bfloat16 tables; checkpoints of a fit save the generator
        steps(optimizer, table, targets(dtype)[5:], STEPS[5:])
    assert torch.equal(ours.weight, other.weight)


def test_a_state_of_another_model_is_refused():
    ours, _ = tables(sparse=True)
    state = TableOptimizer([*ours.parameters(), torch.nn.Parameter(torch.zeros(2))], lr=0.1).state_dict()
    with pytest.raises(InputError, match="does not fit this model"):
        TableOptimizer(ours.parameters(), lr=0.1).load_state_dict(copy.deepcopy(state))


def test_one_optimizer_updates_layers_and_tables_by_their_rules():
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"table": torch.nn.Embedding(N, D, sparse=True), "layer": torch.nn.Linear(D, 3)})
    twin = copy.deepcopy(model)
    groups = parameter_groups(model, 0.1, lr=0.01, table_rule="rowwise-adagrad", table_lr=0.5)
    decayed, rest, table = groups
    assert [p is model["layer"].weight for p in decayed["params"]] == [True] and decayed["weight_decay"] == 0.1
    assert [p is model["layer"].bias for p in rest["params"]] == [True] and rest["weight_decay"] == 0.0
    assert [p is model["table"].weight for p in table["params"]] == [True] and table["weight_decay"] == 0.0
    ours = TableOptimizer(groups, lr=0.01)
    theirs = [
        torch.optim.AdamW([twin["layer"].weight], lr=0.01, weight_decay=0.1),
        torch.optim.AdamW([twin["layer"].bias], lr=0.01, weight_decay=0.0),
        TableOptimizer(twin["table"].parameters(), lr=0.5, rule="rowwise-adagrad"),
    ]
    for rows in STEPS:
        for net, optimizers in ((model, [ours]), (twin, theirs)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            net["layer"](net["table"](torch.tensor(rows))).square().sum().backward()
            for optimizer in optimizers:
                optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, twin.state_dict()[name], atol=1e-6), name
    assert {tuple(state) for state in ours.state_dict()["state"].values()} == {
        ("step", "mean", "variance"),
        ("step", "sum"),
    }


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_a_parameter_without_gradient_does_not_change(rule, sparse):
    ours, _ = tables(sparse)
    before = ours.weight.detach().clone()
    TableOptimizer(ours.parameters(), lr=0.1, rule=rule).step()
    assert torch.equal(ours.weight, before)


def test_wrong_rules_are_refused():
    with pytest.raises(ValueError, match="expected one of adam, rowwise-adagrad"):
        TableOptimizer([torch.nn.Parameter(torch.zeros(2, 2))], lr=0.1, rule="sgd")
    with pytest.raises(ValueError, match="expected tables"):
        TableOptimizer([torch.nn.Parameter(torch.zeros(2))], lr=0.1, rule="rowwise-adagrad")


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_a_step_allocates_nothing_as_large_as_the_table(rule):
    from torch.profiler import ProfilerActivity, profile

    rows, width = 200_000, 16
    table = torch.nn.Embedding(rows, width, sparse=True)
    optimizer = TableOptimizer(table.parameters(), lr=0.1, rule=rule)

    def step():
        optimizer.zero_grad()
        table(torch.tensor([5, 7, 7, 199_999])).square().sum().backward()
        optimizer.step()

    step()  # the state is created at the first step
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as found:
        step()
    largest = max(event.cpu_memory_usage for event in found.events())
    assert 0 < largest < rows * width * 4 / 100, f"{largest} bytes at once, the table has {rows * width * 4}"


def test_stochastic_rounding_is_unbiased():
    from twotower.training.optimizer import round_stochastically

    torch.manual_seed(0)
    exact = torch.tensor([1.0 + 1 / 512, -3.0 - 1 / 100, 1e-3, 1.0, 0.0, -1e-30])
    many = round_stochastically(exact.expand(100_000, -1))
    assert many.dtype == torch.bfloat16
    lower, upper = many.double().min(0).values, many.double().max(0).values
    assert torch.equal(lower[3:5], upper[3:5]), "values that bfloat16 represents are unchanged"
    assert (lower < upper)[[0, 1, 2, 5]].all() and ((upper - lower) <= exact.abs().double() / 127).all()
    spread = (upper - lower) / 2 / math.sqrt(100_000)
    assert ((many.double().mean(0) - exact.double()).abs() <= 5 * spread).all()


@pytest.mark.parametrize("rule", ["adam", "rowwise-adagrad"])
def test_small_steps_of_a_bfloat16_table_are_not_lost(rule):
    """Steps are a tenth of bfloat16's resolution: with rounding to nearest, all of them would vanish."""
    torch.manual_seed(0)
    table = torch.nn.Embedding.from_pretrained(torch.ones(4, 256, dtype=torch.bfloat16), freeze=False, sparse=True)
    lr = 4e-4
    optimizer = TableOptimizer(table.parameters(), lr=lr, rule=rule)
    moved = 0.0
    for t in range(1, 101):
        optimizer.zero_grad()
        table(torch.tensor([1, 2])).float().sum().backward()
        optimizer.step()
        moved += lr if rule == "adam" else lr / math.sqrt(t)
    assert torch.equal(table.weight[[0, 3]], torch.ones(2, 256, dtype=torch.bfloat16))
    assert moved > (0.03 if rule == "adam" else 0.007)
    mean = float(1 - table.weight[1:3].detach().double().mean())
    assert mean == pytest.approx(moved, rel=0.1)
    nearest = torch.ones(1, dtype=torch.bfloat16)
    for _ in range(100):
        nearest = (nearest.float() - lr).to(torch.bfloat16)
    assert float(nearest) == 1.0, "the test would not detect a stall"
