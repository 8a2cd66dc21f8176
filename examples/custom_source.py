"""A source of your own: candidates of the same category as the row's positive, with their expected count.

    python examples/custom_source.py

An item of a different category is often an easy negative. For each row, this source draws items of the category of the
row's positive, and states their expected counts. Two tests check this claim: a chi-square test compares the number of
draws of every item with the claimed counts, and the estimated partition sum of the softmax is compared with its true
value.
"""

import math

import torch
from scipy import stats
from torch import Tensor

import twotower as tt
from twotower.negatives.sources import DrawRequest, RandomSource


class SameCategory(RandomSource):
    """n independent, uniform draws per row from the category of its positive: kappa_j = n / |category|, elsewhere 0.

    Args:
        category: category of each item, int64 [N], from 0 without gaps.
        size: n, the number of draws per row.
    """

    per_row = True
    varies_by_row = True  # the count depends on the row's positive
    category: Tensor
    by_category: Tensor
    members: Tensor
    first: Tensor

    def __init__(self, category: Tensor, size: int) -> None:
        super().__init__()
        members = torch.bincount(category)
        if size < 1 or not bool((members > 0).all()):
            raise tt.InputError("SameCategory: expected size >= 1 and categories from 0 without gaps")
        self.size = size
        # Buffers move with the pool (`pool.to(device)`). They follow from the arguments, so checkpoints omit them.
        self.register_buffer("category", category, persistent=False)
        self.register_buffer("by_category", category.argsort(stable=True), persistent=False)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("first", members.cumsum(0) - members, persistent=False)

    def draw(self, request: DrawRequest) -> Tensor:
        """Draw `size` items for each row, [B, size]; the pool masks the row's own positive among them."""
        own = self.category[request.positives][:, None]
        bits = torch.randint(2**62, (len(own), self.size), generator=request.generator, device=own.device)
        return self.by_category[self.first[own] + bits % self.members[own]]

    def draws(self, request: DrawRequest) -> int:
        """Return n, the number of draws per row."""
        del request
        return self.size

    def log_prob(self, items: Tensor, request: DrawRequest) -> Tensor:
        """Return -log |category| for items of the row's category and -inf for others; for items [B] or [B, R]."""
        positives = request.own_positives  # the rows of this process
        if len(items) != len(positives):
            raise tt.InputError(f"items: expected {len(positives)} rows, found {list(items.shape)}")
        own = self.category[positives].reshape(-1, *[1] * (items.ndim - 1))
        log_prob = -self.members[own].double().log().expand(items.shape)
        return log_prob.masked_fill(self.category[items] != own, -math.inf)


def main() -> None:
    """Draw 4,000 times for one row, and compare the draws with the claimed counts and with wrong counts."""
    generator = torch.Generator().manual_seed(0)
    category, positives, row, times = torch.tensor([0] * 8 + [1] * 4 + [2] * 12), torch.tensor([2, 9, 20]), 0, 4000
    source = SameCategory(category, size=5)
    others = tt.negatives.Sampled(tt.negatives.Uniform(len(category)), size=10, per_row=True)  # reaches every item
    pool, score = tt.negatives.Pool(source, others), torch.randn(len(category), generator=generator).double()
    seen, estimates = torch.zeros(len(category), dtype=torch.float64), torch.empty(times, dtype=torch.float64)
    for number in range(times):
        seen += source.draw(DrawRequest(positives, generator=generator))[row].bincount(minlength=len(category))
        drawn = pool.draw(positives, generator=generator)
        assert drawn.row_items is not None and drawn.row_mask is not None and drawn.row_log_expected_count is not None
        weighted = (score[drawn.row_items[row]] - drawn.row_log_expected_count[row]).exp()
        estimates[number] = score[positives[row]].exp() + weighted[~drawn.row_mask[row]].sum()

    everything = torch.arange(len(category)).expand(len(positives), -1)
    claimed = source.log_expected_count(everything, DrawRequest(positives))[row].exp()
    assert not seen[claimed == 0].any(), "an item was drawn whose claimed count is zero"
    inside = claimed > 0  # multinomial counts: one degree of freedom less than items
    p, wrong = (
        float(stats.chisquare(seen[inside].numpy(), times * claim[inside].numpy(), sum_check=False).pvalue)
        for claim in (claimed, 1.1 * claimed)
    )
    truth = float(score.exp().sum())
    errors = float((estimates.mean() - truth) / (estimates.std() / math.sqrt(times)))
    print(f"expected counts: p = {p:.3f}; for a claim that is 10 % too high: p = {wrong:.0e}")
    print(f"partition: {float(estimates.mean()):.2f}, true value {truth:.2f}, {errors:+.1f} standard errors apart")
    assert p > 1e-4 > wrong and abs(errors) < 4
    print("the counts are as claimed")


if __name__ == "__main__":
    main()
