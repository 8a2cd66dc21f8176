"""Every objective with extreme inputs: no value and no gradient is NaN or infinite."""

import math

import pytest
import torch

from twotower.errors import InputError
from twotower.negatives import (
    Candidates,
    Catalog,
    CountedFrequency,
    InBatch,
    NegativeMask,
    Pool,
    Sampled,
    Uniform,
    corrections,
)
from twotower.objectives import (
    BPR,
    Embedded,
    GeneralisedBCE,
    Logistic,
    PositiveCorrectedSoftmax,
    RefinedLogQ,
    SampledSoftmax,
)

FREQUENCY = CountedFrequency(torch.tensor([5, 3, 2, 1]))
UNIFORM, IN_BATCH = Sampled(Uniform(4), 3), InBatch(FREQUENCY)

FORMS = {
    "softmax": SampledSoftmax,
    "positive corrected": PositiveCorrectedSoftmax,
    "refined": RefinedLogQ,
    "logistic": Logistic,
    "sampled logistic": lambda pool: Logistic(pool, corrected=True),
    "nce": lambda pool: Logistic(pool, corrected=True, keep_accidental=True),
    "gbce": lambda pool: GeneralisedBCE(pool, size=3, num_items=4),
    "bpr": BPR,
}
ROWS = [name for name in FORMS if name != "refined"]


def drawn_by_hand(log_count, mask, *, row_mask=None, positive_log_count=None):
    """Make candidates with given counts and masks."""
    mask = torch.as_tensor(mask)
    rows, size = mask.shape
    own = torch.arange(rows)
    return Candidates(
        items=torch.arange(rows, rows + size),
        log_expected_count=torch.as_tensor(log_count, dtype=torch.float32).expand(size).clone(),
        negative_mask=NegativeMask.of(mask),
        multiplicity=torch.ones(size, dtype=torch.int64),
        source=torch.zeros(size, dtype=torch.int64),
        positives=own,
        positive_log_count=torch.full((rows,), -1.0) if positive_log_count is None else positive_log_count,
        row_items=None if row_mask is None else torch.full(row_mask.shape, 99),
        row_log_expected_count=None if row_mask is None else torch.full(row_mask.shape, float(log_count)),
        row_mask=row_mask,
        log_unmasked=torch.full((rows,), math.log1p(-math.exp(-1.0))),
    )


def finite(form, drawn, query, positive, candidates, rows=None, temperature=1.0):
    """Check that the loss and all gradients are finite; return them."""
    objective = FORMS[form](
        Pool(UNIFORM) if form != "refined" else Pool(IN_BATCH, correction=corrections.Probability())
    )
    leaves = [t.clone().requires_grad_() for t in (query, positive, candidates, *(() if rows is None else (rows,)))]
    loss = objective(Embedded(*leaves), drawn, temperature=temperature)
    assert loss.shape == (len(query),)
    assert bool(torch.isfinite(loss).all())
    assert float(loss.detach().min()) >= -1e-6 or form == "refined"
    loss.sum().backward()
    parameters = [*leaves, *objective.parameters()]
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in parameters]
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    return loss.detach(), grads


@pytest.mark.parametrize("log_count", [-27.6, 0.0, 27.6])  # kappa of 1e-12, 1, 1e12
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("form", FORMS)
def test_logits_of_ten_thousand(form, size, log_count):
    drawn = drawn_by_hand(log_count, torch.tensor([[False, False], [False, True], [True, False]]))
    query, positive = torch.ones(3, 1), torch.tensor([[0.0], [size], [-size]])
    loss, _ = finite(form, drawn, query, positive, torch.tensor([[size], [-size]]))
    assert float(loss.max()) > 1e3, "a row on the wrong side of a large margin costs about the margin"


@pytest.mark.parametrize("form", FORMS)
def test_temperatures_from_tiny_to_huge(form):
    drawn = drawn_by_hand(0.0, torch.zeros(3, 2, dtype=torch.bool))
    rng = torch.Generator().manual_seed(0)
    query, positive, candidates = (torch.randn(n, 4, generator=rng) for n in (3, 3, 2))
    for temperature in (1e-4, 1e4):
        finite(form, drawn, query, positive, candidates, temperature=temperature)


@pytest.mark.parametrize("form", FORMS)
def test_every_candidate_masked(form):
    """Only the positive is left: zero loss for forms that compare, the positive's own term for binary forms."""
    rng = torch.Generator().manual_seed(0)
    query, positive, candidates, rows = (torch.randn(*s, 4, generator=rng) for s in ((3,), (3,), (2,), (3, 2)))
    mask = torch.ones(3, 2, dtype=torch.bool)
    forms = ((None, None), (mask, rows)) if form in ROWS else ((None, None),)
    for row_mask, row_candidates in forms:
        drawn = drawn_by_hand(0.0, mask, row_mask=row_mask, positive_log_count=torch.zeros(3))
        loss, grads = finite(form, drawn, query, positive, candidates, row_candidates)
        if form in {"softmax", "positive corrected", "refined", "bpr"}:
            assert loss.tolist() == [0.0] * 3
            assert all(float(grad.abs().max()) == 0.0 for grad in grads)
        else:
            beta = 1.0 - 0.75 * (1.0 - 1.0) if form == "gbce" else 1.0
            own = beta * torch.nn.functional.softplus(-(query * positive).sum(1))
            assert torch.allclose(loss, own, atol=1e-6)
            assert float(grads[2].abs().max()) == 0.0


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_pool(form):
    drawn = drawn_by_hand(0.0, torch.zeros(3, 0, dtype=torch.bool))
    rng = torch.Generator().manual_seed(0)
    finite(form, drawn, torch.randn(3, 4, generator=rng), torch.randn(3, 4, generator=rng), torch.zeros(0, 4))


@pytest.mark.parametrize("form", FORMS)
def test_empty_slots_with_infinite_count(form):
    """As in a draw on an accelerator: masked, and with log kappa = inf."""
    drawn = drawn_by_hand(torch.inf, torch.ones(3, 2, dtype=torch.bool))
    rng = torch.Generator().manual_seed(0)
    query, positive, candidates = (torch.randn(n, 4, generator=rng) for n in (3, 3, 2))
    drawn.multiplicity.zero_()
    finite(form, drawn, query, positive, candidates)


@pytest.mark.parametrize("form", ["sampled logistic", "nce"])
def test_a_positive_that_the_noise_never_draws(form):
    """kappa_y = 0: the binary forms that correct the positive treat it as certain."""
    drawn = drawn_by_hand(0.0, torch.zeros(3, 2, dtype=torch.bool), positive_log_count=torch.full((3,), -torch.inf))
    rng = torch.Generator().manual_seed(0)
    finite(form, drawn, *(torch.randn(n, 4, generator=rng) for n in (3, 3, 2)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 2])
def test_a_catalog_of_one_item(form, rows):
    frequency = CountedFrequency(torch.tensor([4]))
    source = Sampled(Uniform(1), 3) if form != "refined" else InBatch(frequency)
    correction = corrections.Probability() if form == "refined" else None
    objective = FORMS[form](Pool(source, correction=correction))
    if form == "refined" and rows == 1:
        with pytest.raises(InputError, match="a batch of one row has no other rows"):
            objective.draw(torch.zeros(rows, dtype=torch.int64))
        return
    drawn = objective.draw(torch.zeros(rows, dtype=torch.int64))
    table = torch.ones(1, 2, requires_grad=True)
    loss = objective(Embedded(torch.ones(rows, 2), table[drawn.positives], table[drawn.items]), drawn, temperature=0.1)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
    assert bool(torch.isfinite(table.grad).all())
    if form in {"softmax", "positive corrected", "refined", "bpr"}:
        assert loss.tolist() == [0.0] * rows


@pytest.mark.parametrize("form", FORMS)
def test_bfloat16(form):
    """Products are summed in float32: the only error of the loss is the rounding of the inputs."""
    rng = torch.Generator().manual_seed(0)
    query, positive, candidates = (torch.randn(n, 64, generator=rng).to(torch.bfloat16) for n in (6, 6, 30))
    mask = torch.rand(6, 30, generator=rng) < 0.2
    rows = torch.randn(6, 5, 64, generator=rng).to(torch.bfloat16) if form in ROWS else None
    drawn = drawn_by_hand(-9.0, mask, row_mask=None if rows is None else torch.zeros(6, 5, dtype=torch.bool))
    loss, grads = finite(form, drawn, query, positive, candidates, rows, temperature=4.0)
    assert loss.dtype == torch.float32
    assert grads[0].dtype == torch.bfloat16
    exact, exact_grads = finite(
        form,
        drawn,
        query.double(),
        positive.double(),
        candidates.double(),
        None if rows is None else rows.double(),
        temperature=4.0,
    )
    assert torch.allclose(loss.double(), exact, rtol=1e-5)
    for grad, other in zip(grads[:3], exact_grads[:3], strict=True):
        assert float((grad.double() - other).abs().max()) <= 0.01 * float(other.abs().max())


def test_a_catalog_of_one_item_that_is_always_included():
    """With one item, always included, the exact loss is zero."""
    objective = SampledSoftmax(Pool(Catalog(1)))
    drawn = objective.draw(torch.tensor([0, 0]))
    table = torch.ones(1, 2)
    loss = objective(Embedded(torch.ones(2, 2), table[drawn.positives], table[drawn.items]), drawn, temperature=1.0)
    assert loss.tolist() == [0.0, 0.0]
