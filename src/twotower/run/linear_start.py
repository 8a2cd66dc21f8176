"""Initial weights from a linear model in closed form.

Catalogs of up to 20,000 items start at EASE (Steck 2019), cut to rank D. EASE scores s(q, j) = sum over the history of
W_ij. The rank-D matrix that is closest to W on the training queries X is W V V^T, with V the D leading right singular
vectors of X W (reduced-rank regression). It has the form of two towers: summed history vectors W V, and item vectors V.

Larger catalogs, whose N x N matrix is too large to invert, start at the singular value decomposition of the scaled
training matrix A = R^-a X C^-b, with the row sums R and column sums C of X: history vectors C^-b V, item vectors C^b V
(the low-pass filter of GF-CF, Shen et al. 2021, which has a = b = 1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.loading.questions import QuestionBatches
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.ranking.baselines import distinct_rows, gram
from twotower.system.hardware import memory
from twotower.towers import EmbeddingTable, TwoTower
from twotower.towers.layers.mlp import DNN, MLP
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.towers.two_tower import QueryTower

#: Largest catalog whose item-item matrix is inverted, and number of matrices of this size that are in memory together.
MOST_ITEMS, MATRICES = 20_000, 3
#: The ridge penalty over the mean number of rows of an item.
RIDGE = 5.0
#: Powers a and b of the singular value decomposition, chosen on the validation queries.
#: The decomposition uses at most MOST_QUERIES queries.
POWERS, MOST_QUERIES = ((0.5, 0.35), (0.25, 0.45)), 1_000_000
#: Oversampling and iterations of subspace iteration (Halko et al. 2011).
EXTRA, ROUNDS = 16, 4
#: Scales of the scores to try, and number of questions to try them on.
SCALES, QUESTIONS = 2.0 ** torch.arange(0.0, 10.5, 0.5), 256
#: Shares of log p that the item bias can start at.
BIASES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class StartChoice:
    """The choices that a linear start makes on the validation queries.

    Attributes:
        bias: share of log p in the initial item bias.
        powers: a and b of the singular value decomposition; None for EASE.
    """

    bias: float = 0.0
    powers: tuple[float, float] | None = None


def refusal(towers: TwoTower) -> str | None:
    """Explain why towers cannot start at a linear model, or return None."""
    query, item = towers.query_tower, towers.item_tower
    pools = isinstance(query, QueryTower) and query.history is not None and query.history.heads == 1
    own = isinstance(query, QueryTower) and isinstance(query.history_items, EmbeddingTable)
    checks = {
        "the query tower does not pool the history with one head (query_tower.history.heads=1)": not pools,
        "the history has no table of its own (query_tower.history.share_table=false)": not own
        or query.history_items is item.ids,
        "the item tower has an MLP around its ids (item_tower.residual=true, or no hidden layers and features)": (
            item.ids is None or (item.mlp is not None and not item.residual)
        ),
        "scores are cosines (objective.similarity=dot)": towers.cosine,
        "tables are sharded over ranks (training.table_placement=replicated)": bool(shared_tables_of(towers)),
    }
    return next((reason for reason, applies in checks.items() if applies), None)


def can_invert(num_items: int) -> bool:
    """Return whether EASE can be computed: at most 20,000 items, and enough memory for its matrices."""
    return num_items <= MOST_ITEMS and MATRICES * 4 * num_items**2 <= (memory().available or math.inf)


def start_linear(
    towers: TwoTower,
    config: Config,
    train: Interactions,
    questions: QuestionBatches | None,
    ranks: Communicator,
    *,
    measure: Callable[[TwoTower], float] | None = None,
    choice: StartChoice | None = None,
    on_message: Callable[[object], None] | None = None,
) -> StartChoice | None:
    """Set the towers to the linear model if `training.start` requests it. Collective.

    The scores of EASE are not log-probabilities. They are scaled by the factor with the smallest softmax loss on a
    sample of training questions, and the item bias starts at the multiple of log p with the best validation metric.

    Args:
        towers: freshly built; changed in place.
        config: the settings, without "auto" except `training.start` and `training.start_ridge`.
        train: the training interactions.
        questions: the training questions, for the scale; None if training asks for the next item (the scale is then 1).
        ranks: the processes; the result of rank 0 is copied to the others.
        measure: the validation metric of towers; None if there is no validation (the bias then starts at zero).
        choice: the choices of a different run, used instead of `measure`.
        on_message: receives a description of the start; None discards it.

    Returns:
        The choices, or None if the towers keep their random weights.

    Raises:
        InputError: the towers cannot express a linear model and `training.start` is linear.
    """
    if config.training.start == "random":
        return None
    reason = refusal(towers)
    if reason is not None or (config.training.start == "auto" and questions is None):
        if config.training.start == "linear":
            raise InputError(f"training.start: linear: {reason}; or use training.start=random")
        return None
    dimension, size = config.item_tower.dimension, train.num_items
    counts = torch.from_numpy(train.item_counts()).double()
    query, item = towers.query_tower, towers.item_tower
    assert isinstance(query, QueryTower) and query.history is not None
    history_table, item_table = query.history_items, item.ids
    assert isinstance(history_table, EmbeddingTable) and isinstance(item_table, EmbeddingTable)
    with torch.no_grad():
        query.history.log_weight.zero_()
        if query.ids is not None:
            query.ids.weight.zero_()
        for mlp in filter(None, (query.mlp, item.mlp)):
            _silence(mlp)

        biases = BIASES if choice is None else (choice.bias,)

        def begin(history: Tensor, vectors: Tensor) -> tuple[float, float]:
            """Set tables, scale and bias; return the metric, 0 without validation, and the share of log p."""
            _set(history_table, history)
            _set(item_table, vectors)
            if questions is not None:
                scale = _scale(towers, questions).sqrt()
                for table in (history_table, item_table):
                    table.weight.mul_(scale.to(table.weight.dtype))
            return _choose_bias(towers, counts, biases, measure)

        if can_invert(size):
            ridge = config.training.start_ridge
            if ridge == "auto":
                ridge = RIDGE * max(float(counts.sum() / max(int((counts > 0).sum()), 1)), 1.0)
            said = f"EASE with ridge {ridge:.3g} over {size:,} items, cut to rank {dimension}"
            found = StartChoice(begin(*linear_factors(train, dimension, ridge))[1])
        else:
            powers = POWERS if choice is None or choice.powers is None else (choice.powers,)
            if measure is None:
                powers = powers[:1]
            tried = {}
            for pair in powers:
                factors = singular_factors(train, dimension, *pair)
                tried[pair] = (begin(*factors), factors)
            best = max(powers, key=lambda pair: tried[pair][0])
            if best != powers[-1]:
                begin(*tried[best][1])
            found = StartChoice(tried[best][0][1], best)
            said = (
                f"singular vectors of {train.num_queries:,} queries x {size:,} items, rank {dimension}, powers {best}"
            )
        if on_message is not None:
            on_message(f"linear start: {said}")
        ranks.copy_first([parameter.data for parameter in towers.parameters()])
    return found


def _choose_bias(
    towers: TwoTower, counts: Tensor, shares: tuple[float, ...], measure: Callable[[TwoTower], float] | None
) -> tuple[float, float]:
    """Set the bias, if the towers have one, to the best share of log p; return the validation metric and the share."""
    log_p = ((counts + 1.0) / (counts.sum() + len(counts))).log().float()[:, None]

    def metric(share: float) -> float:
        if towers.bias is not None:
            _set(towers.bias, share * log_p)
        return 0.0 if measure is None else measure(towers)

    if measure is None or towers.bias is None:
        shares = shares[:1]
    metrics = {share: metric(share) for share in shares}
    best = max(shares, key=metrics.__getitem__)
    if best != shares[-1]:
        assert towers.bias is not None
        _set(towers.bias, best * log_p)
    return metrics[best], best


def linear_factors(train: Interactions, dimension: int, ridge: float) -> tuple[Tensor, Tensor]:
    """Compute EASE's item-item matrix and cut it to rank D.

    Args:
        train: the training interactions; repeats count once.
        dimension: D.
        ridge: the penalty l2.

    Returns:
        History vectors H and item vectors V, float32 [N, D] each, with columns of equal norms. The score of item j for
        a history is <sum of H_i over its items, V_j>. Columns beyond the rank are zero.
    """
    size = train.num_items
    cooccurrence = gram(train)
    weights = cooccurrence.clone()
    weights.diagonal().add_(ridge)
    weights = torch.cholesky_inverse(torch.linalg.cholesky(weights))
    weights /= -weights.diagonal().clone()
    weights.fill_diagonal_(0.0)
    vectors = leading_eigenvectors(lambda basis: weights.T @ (cooccurrence @ (weights @ basis)), size, dimension)
    history = weights @ vectors
    balance = (history.norm(dim=0) / vectors.norm(dim=0).clamp(min=1e-12)).clamp(min=1e-12).sqrt()
    return _padded(history / balance, dimension), _padded(vectors * balance, dimension)


def singular_factors(train: Interactions, dimension: int, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Compute the leading right singular vectors V of A = R^-a X C^-b, for catalogs too large for EASE.

    The time is (D + 16) times nine passes over the training pairs; the memory is (Q + N) (D + 16) numbers. If there are
    more than a million queries, a random million is used.

    Args:
        train: the training interactions; repeats count once.
        dimension: D.
        a: power of the row sums R.
        b: power of the column sums C.

    Returns:
        History vectors C^-b V and item vectors C^b V, float32 [N, D] each. Columns beyond the rank are zero.
    """
    size = train.num_items
    offsets, items = distinct_rows(np.asarray(train.offsets), np.asarray(train.item_codes), size)
    pairs = sparse.csr_matrix((np.ones(len(items), dtype=np.float32), items, offsets), shape=(len(offsets) - 1, size))
    if pairs.shape[0] > MOST_QUERIES:
        chosen = np.random.default_rng(0).choice(pairs.shape[0], MOST_QUERIES, replace=False)
        pairs = pairs[np.sort(chosen)]
    rows, columns = (np.maximum(np.asarray(pairs.sum(axis)).ravel(), 1.0) for axis in (1, 0))
    scaled = (sparse.diags(rows**-a) @ pairs @ sparse.diags(columns**-b)).tocsr().astype(np.float32)
    transposed = scaled.T.tocsr()

    def multiply(basis: Tensor) -> Tensor:
        return torch.from_numpy(transposed @ (scaled @ basis.numpy()))

    vectors = leading_eigenvectors(multiply, size, dimension)
    weights = torch.from_numpy(columns).float()[:, None] ** b
    return _padded(vectors / weights, dimension), _padded(vectors * weights, dimension)


def leading_eigenvectors(multiply: Callable[[Tensor], Tensor], size: int, number: int) -> Tensor:
    """Compute eigenvectors of a symmetric positive semidefinite matrix M by subspace iteration.

    Args:
        multiply: M times a matrix float32 [size, columns].
        size: rows of M.
        number: number of eigenvectors; at most `size` are returned.

    Returns:
        Orthonormal columns, float32 [size, min(number, size)], with descending eigenvalues.
    """
    rank = min(number, size)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, min(rank + EXTRA, size), generator=generator))[0]
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(multiply(basis))[0]
    rotation = torch.linalg.eigh(basis.T @ multiply(basis))[1].flip(1)
    vectors: Tensor = (basis @ rotation)[:, :rank]
    return vectors


def _padded(vectors: Tensor, dimension: int) -> Tensor:
    missing = dimension - vectors.shape[1]
    return torch.cat([vectors, vectors.new_zeros(len(vectors), missing)], 1) if missing else vectors


def _scale(towers: TwoTower, questions: QuestionBatches) -> Tensor:
    """Return the factor of the scores with the smallest softmax loss on some questions, without seen items."""
    number = min(QUESTIONS, len(questions.queries))
    whole = questions.batch_of_all(number)
    asked = whole.asked
    assert asked is not None
    was_training = towers.training
    towers.eval()
    items = towers.item_embeddings()
    scores = towers.embed_queries(asked.queries, whole.history) @ items.T
    towers.train(was_training)
    row = torch.arange(len(scores)).repeat_interleave(whole.history.shape[1])
    seen = whole.history.reshape(-1)
    scores[row[seen >= 0], seen[seen >= 0]] = -torch.inf
    positive = scores[asked.of, whole.items]
    weights = torch.ones(len(positive)) if whole.weights is None else whole.weights
    per_question = torch.zeros(len(scores)).index_add_(0, asked.of, weights)
    losses = [
        (per_question * (scores * scale).logsumexp(1)).sum() - (weights * positive * scale).sum() for scale in SCALES
    ]
    return SCALES[int(torch.stack(losses).argmin())]


def _set(table: EmbeddingTable, values: Tensor) -> None:
    table.weight.copy_(values.to(table.weight.dtype))


def _silence(mlp: nn.Module) -> None:
    """Set the last layer of an MLP to zero, so that its output is zero at the start of training."""
    assert isinstance(mlp, MLP | DNN)
    last = mlp.projection if isinstance(mlp, DNN) else mlp.layers[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
