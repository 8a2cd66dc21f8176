"""Error of the softmax partition sum estimated from a pool's candidates; uses scores, unlike the ranking metrics."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from twotower.errors import InputError
from twotower.losses.softmax import candidate_logits, log_sum_exp
from twotower.negatives import Pool

#: Number of logits in memory at a time, rows x N: 16 MB in float64.
_BLOCK = 1 << 21


@dataclass(frozen=True)
class PartitionError:
    """Deviation of the estimated log partition sum from the exact one, in nats.

    Attributes:
        mean: mean of log Z_hat - log Z over rows and draws. Z_hat is unbiased, but its log is not: with few candidates
            the mean is below 0 by about half the variance.
        std: standard deviation over rows and draws.
        per_row_mean: [B] mean over draws.
        per_row_std: [B] standard deviation over draws; NaN for one draw.
        num_draws: number of draws.
    """

    mean: float
    std: float
    per_row_mean: NDArray[np.float64]
    per_row_std: NDArray[np.float64]
    num_draws: int

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain types for JSON."""
        return {"mean": self.mean, "std": self.std, "num_rows": len(self.per_row_mean), "num_draws": self.num_draws}


@torch.no_grad()
def partition_error(
    queries: Tensor,
    items: Tensor,
    positives: Tensor,
    pool: Pool,
    *,
    temperature: float | Tensor = 1.0,
    draws: int = 1,
    generator: torch.Generator | None = None,
) -> PartitionError:
    """Compare the partition sum estimated from a pool's candidates with the exact one.

        Z(x)     = sum_{j=1..N} exp s(x, j),   s = <u, v> / T
        Z_hat(x) = exp s(x, y) + sum_{candidates j that are not masked} exp(s(x, j) - log kappa_j)
        error    = log Z_hat - log Z

    (docs/theory.md, section 2.) The pool draws in evaluation mode, so that its state does not change. Only the row's
    own positive is masked, since Z sums over the whole catalog.

    Args:
        queries: u(x) of the rows of a batch, [B, D].
        items: v(j), [N, D].
        positives: item codes of the rows, int64 [B]: the batch that in-batch sources draw from.
        pool: the pool that candidates are drawn from.
        temperature: T > 0.
        draws: number of draws for the batch; a pool that depends only on the batch draws the same candidates each
            time.
        generator: random generator for the draws.

    Returns:
        The errors in nats.

    Raises:
        InputError: `queries` has no rows, or `draws` is less than 1.
    """
    if draws < 1 or not len(queries):
        raise InputError(f"expected at least 1 draw and 1 row, got {draws} and {len(queries)}")
    queries, items = queries.double(), items.double()
    exact = torch.cat(
        [
            torch.logsumexp(part @ items.T / temperature, 1)
            for part in torch.split(queries, max(1, _BLOCK // len(items)))
        ]
    )
    was_training = pool.training
    pool.eval()
    errors = []
    for _ in range(draws):
        drawn = pool.draw(positives, generator=generator).collapse()
        rows = drawn.row_items
        positive, logits = candidate_logits(
            queries,
            items[positives],
            items[drawn.items],
            drawn.log_expected_count,
            mask=drawn.mask,
            row_candidates=None if rows is None else items[rows.clamp(min=0)],
            row_log_expected_count=drawn.row_log_expected_count,
            row_mask=drawn.row_mask,
            temperature=temperature,
        )
        errors.append(torch.logaddexp(positive, log_sum_exp(logits)) - exact)
    pool.train(was_training)
    error = torch.stack(errors).cpu().numpy()
    spread = error.std(axis=0, ddof=1) if draws > 1 else np.full(error.shape[1], np.nan)
    return PartitionError(float(error.mean()), float(error.std()), error.mean(axis=0), spread, draws)
