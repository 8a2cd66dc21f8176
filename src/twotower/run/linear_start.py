"""Initial weights from a linear model in closed form.

Catalogs of up to 20,000 items start at EASE (Steck 2019), truncated to rank D. EASE scores s(q, j) = sum of W_ij over
the history. The rank-D matrix closest to W on the training queries X is W V V^T, with V the D leading right singular
vectors of X W (reduced-rank regression). It has the form of two towers: summed history vectors W V, and item vectors V.
Items of the history are not ranked, so the diagonal of W counts as missing: it is filled in with the diagonal of the
truncated matrix, as in matrix completion (Mazumder et al. 2010), so that no rank is spent on reproducing its zeros.
`benchmarks/small_catalogs.py` measures what this gains.

Larger catalogs, whose N x N matrix is too large to invert, start at the singular value decomposition of the scaled
training matrix A = R^-a X C^-b, with the row sums R and column sums C of X: history vectors C^-b V, item vectors C^b V
(the low-pass filter of GF-CF, Shen et al. 2021, which has a = b = 1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from twotower.config.run import Config
from twotower.data import Interactions
from twotower.data.loading.questions import QuestionBatches
from twotower.distributed.communicator import Communicator
from twotower.errors import InputError
from twotower.ranking import EASE, Ranker
from twotower.ranking.baselines import distinct_rows, ease_weights, gram
from twotower.run.validation import simplest
from twotower.system.hardware import memory
from twotower.towers import EmbeddingTable, TwoTower
from twotower.towers.layers.mlp import DNN, MLP
from twotower.towers.sharded_lookup import shared_tables_of
from twotower.towers.two_tower import QueryTower

#: Largest catalog whose item-item matrix is inverted, and number of matrices of this size that are in memory together.
MOST_ITEMS, MATRICES = 20_000, 4
#: Ridge penalties to try, as multiples of the mean number of rows per item; without a validation, the first is used.
#: Larger catalogs than `FEW_ITEMS`, where each penalty takes long, try two of them.
RIDGES, FEW_ITEMS = (5.0, 2.0, 1.0, 10.0), 8_000
#: Maximum number of values in a table whose rank is above D.
MOST_NUMBERS = 5_200_000
#: Powers a and b of the singular value decomposition, chosen on the validation queries.
#: The decomposition uses at most MOST_QUERIES queries.
POWERS, MOST_QUERIES = ((0.5, 0.35), (0.25, 0.45)), 1_000_000
#: Oversampling and iterations of subspace iteration (Halko et al. 2011).
EXTRA, ROUNDS = 16, 4
#: Number of times that the diagonal is filled in and the factors are updated.
FILLS = 2
#: Scales of the scores to try, and number of questions to try them on.
SCALES, QUESTIONS = 2.0 ** torch.arange(0.0, 10.5, 0.5), 256
#: A function that returns the validation metric of each query for a model.
Measure = Callable[[TwoTower | Ranker], NDArray[np.float64]]
#: Shares of log p to try as the initial item bias.
BIASES = (0.0, 0.5, 1.0)


@dataclass(frozen=True)
class StartChoice:
    """The choices that a linear start makes on the validation queries.

    Attributes:
        bias: share of log p in the initial item bias.
        powers: a and b of the singular value decomposition; None for EASE.
        ridge: the ridge penalty of EASE as a multiple of the mean number of rows per item; None for singular vectors or
            a ridge that was set, and in models of earlier versions.
        rank: D; None in models of earlier versions.
    """

    bias: float = 0.0
    powers: tuple[float, float] | None = None
    ridge: float | None = None
    rank: int | None = None

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> StartChoice:
        """Restore the choices from JSON values."""
        return cls(**{**saved, "powers": saved["powers"] and tuple(saved["powers"])})


def refusal(towers: TwoTower) -> str | None:
    """Explain why towers cannot start at a linear model, or return None."""
    query, item = towers.query_tower, towers.item_tower
    pools = isinstance(query, QueryTower) and query.history is not None and query.history.heads == 1
    own = isinstance(query, QueryTower) and isinstance(query.history_items, EmbeddingTable)
    checks = {
        "the query tower does not pool the history with one head (query_tower.history.heads=1)": not pools,
        "the history does not have its own table (query_tower.history.share_table=false)": not own
        or query.history_items is item.ids,
        "the item tower has an MLP around its ids (item_tower.residual=true, or no hidden layers and features)": (
            item.ids is None or (item.mlp is not None and not item.residual)
        ),
        "vectors of features are added to those of ids (item_tower.projection=true, query_tower.projection=true)": (
            item.mlp is None and item.features is not None
        )
        or (isinstance(query, QueryTower) and query.mlp is None and bool(query.features or query.context)),
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
    measure: Measure | None = None,
    choice: StartChoice | None = None,
    on_message: Callable[[object], None] | None = None,
) -> StartChoice | None:
    """Set the towers to the linear model if `training.start` requests it. Collective.

    The scores of EASE are not log-probabilities. They are scaled by the factor with the smallest softmax loss on a
    sample of training questions. Three choices are made on the validation queries: the ridge penalty of EASE at full
    rank, if `training.start_ridge` is auto; the multiple of log p at which the item bias starts; and the rank, among
    the multiples `training.start_ranks` of D. A ridge other than the default and a larger rank are taken only if they
    are better by more than one standard error (`simplest`). The factors of all ranks start from one decomposition.

    Args:
        towers: freshly built; changed in place, including D.
        config: the settings, without "auto" except `training.start` and `training.start_ridge`.
        train: the training interactions.
        questions: the training questions, for the scale; None if training asks for the next item (the scale is then 1).
        ranks: the processes; the result of rank 0 is copied to the others.
        measure: the validation metric of towers; None if there is no validation (the bias then starts at zero, and
            ridge and rank are the first ones).
        choice: the choices of a different run, used instead of `measure`.
        on_message: receives a description of the initial weights; None discards it.

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
    with torch.no_grad():
        query.history.log_weight.zero_()
        if query.ids is not None:
            query.ids.weight.zero_()
        for mlp in filter(None, (query.mlp, item.mlp)):
            _silence(mlp)

        start = _Start(towers, counts, questions, measure, choice)
        if can_invert(size):
            chosen = _start_at_ease(start, config, train)
            said = (
                f"EASE with ridge {chosen[1]:.3g} over {size:,} items, truncated to rank {towers.item_tower.dimension}"
            )
            found = chosen[0]
        else:
            found = _start_at_singular_vectors(start, train)
            said = (
                f"singular vectors of {train.num_queries:,} queries x {size:,} items, rank {dimension}, powers "
                f"{found.powers}"
            )
        if on_message is not None:
            on_message(f"linear start: {said}")
        ranks.copy_first([parameter.data for parameter in towers.parameters()])
    return found


class _Start:
    """Towers that are set to linear models and measured."""

    def __init__(
        self,
        towers: TwoTower,
        counts: Tensor,
        questions: QuestionBatches | None,
        measure: Measure | None,
        choice: StartChoice | None,
    ) -> None:
        self.towers, self.questions, self.measure, self.choice = towers, questions, measure, choice
        self.log_p = ((counts + 1.0) / (counts.sum() + len(counts))).log().float()[:, None]

    def at(self, history: Tensor, vectors: Tensor, bias: float | None = None) -> tuple[NDArray[np.float64], float]:
        """Set tables, scale and bias; return each query's metric (one 0 without validation) and the share of log p.

        Args:
            history: H, [N, D].
            vectors: V, [N, D].
            bias: the share of log p; None to choose it.
        """
        self.towers.resize(vectors.shape[1])
        query, item = self.towers.query_tower, self.towers.item_tower
        assert isinstance(query, QueryTower) and isinstance(query.history_items, EmbeddingTable)
        assert item.ids is not None
        for table, values in ((query.history_items, history), (item.ids, vectors)):
            _set(table, values)
        self._set_bias(0.0)  # an earlier rank may have set it, and the scale is that of the vectors alone
        if self.questions is not None:
            scale = _scale(self.towers, self.questions).sqrt()
            for table in (query.history_items, item.ids):
                table.weight.mul_(scale.to(table.weight.dtype))
        shares = BIASES if bias is None else (bias,)
        if self.choice is not None:
            shares = (self.choice.bias,)
        if self.measure is None or self.towers.bias is None:
            shares = shares[:1]
        metrics = {share: self._metric(share) for share in shares}
        best = max(shares, key=lambda share: metrics[share].mean())
        if best != shares[-1]:
            self._set_bias(best)
        return metrics[best], best

    def _metric(self, share: float) -> NDArray[np.float64]:
        self._set_bias(share)
        return np.zeros(1) if self.measure is None else self.measure(self.towers)

    def _set_bias(self, share: float) -> None:
        if self.towers.bias is not None:
            _set(self.towers.bias, share * self.log_p)


def _start_at_ease(start: _Start, config: Config, train: Interactions) -> tuple[StartChoice, float]:
    """Set the towers to EASE, and return the choices and the ridge penalty."""
    counts, choice = train.item_counts(), start.choice
    mean = max(float(counts.sum() / max(int((counts > 0).sum()), 1)), 1.0)
    asked = config.training.start_ridge
    if choice is not None and choice.ridge is not None:
        factors: tuple[float | None, ...] = (choice.ridge,)
    elif asked != "auto" or choice is not None or start.measure is None:
        factors = (RIDGES[0] if asked == "auto" else None,)
    else:
        factors = RIDGES if train.num_items <= FEW_ITEMS else RIDGES[:2]
    ranks = _ranks(start, config, train.num_items)
    products = gram(train)

    def penalty(factor: float | None) -> float:
        return float(asked) if factor is None else factor * mean

    best, weights = factors[0], None
    if len(factors) > 1:
        assert start.measure is not None
        # The first factor is the usual choice, so its matrix is kept to avoid inverting it again.
        weights = ease_weights(products.clone(), penalty(best))
        measured = {best: start.measure(EASE.of_weights(weights))}
        for factor in factors[1:]:
            measured[factor] = start.measure(EASE.of_products(products, penalty(factor)))
        best = simplest(measured)
        weights = weights if best == factors[0] else None
    by_rank = linear_factors(products, ranks, penalty(best), weights)
    bias, measures, rank = None, {}, ranks[0]
    if len(ranks) > 1:
        for rank in ranks:
            measures[rank], bias = start.at(*by_rank[rank], bias)
        rank = simplest(measures)
    _, share = start.at(*by_rank[rank])
    return StartChoice(share, None, best, rank), penalty(best)


def _ranks(start: _Start, config: Config, num_items: int) -> list[int]:
    """Return the ranks to try, ascending: the chosen rank, or the multiples of D that are below N and small enough."""
    dimension = config.item_tower.dimension
    if start.choice is not None:
        return [start.choice.rank or dimension]
    if start.measure is None or not start.towers.is_linear:
        return [dimension]
    multiples = sorted(set(config.training.start_ranks or [1]))
    ranks = [multiple * dimension for multiple in multiples]
    return [rank for rank in ranks if rank == ranks[0] or rank <= min(MOST_NUMBERS // num_items, num_items // 2)]


def _start_at_singular_vectors(start: _Start, train: Interactions) -> StartChoice:
    """Set the towers to singular vectors, and return the choices."""
    dimension, choice = start.towers.item_tower.dimension, start.choice
    powers = POWERS if choice is None or choice.powers is None else (choice.powers,)
    if start.measure is None:
        powers = powers[:1]
    tried = {}
    for pair in powers:
        factors = singular_factors(train, dimension, *pair)
        tried[pair] = (start.at(*factors), factors)
    best = max(powers, key=lambda pair: tried[pair][0][0].mean())
    if best != powers[-1]:
        start.at(*tried[best][1])
    return StartChoice(tried[best][0][1], best, None, dimension)


def linear_factors(
    products: Tensor, ranks: Sequence[int], ridge: float, weights: Tensor | None = None
) -> dict[int, tuple[Tensor, Tensor]]:
    """Compute EASE's item-item matrix W and truncate it to each of several ranks.

    The truncation to rank D begins with reduced-rank regression of W, whose diagonal is zero. Then, `FILLS` times, the
    diagonal of W is set to that of the truncated matrix, and one step of subspace iteration updates the factors.

    Args:
        products: X^T X, float32 [N, N] (`gram`).
        ranks: numbers D.
        ridge: the penalty l2.
        weights: the item-item matrix (`ease_weights`) if already computed, whose diagonal is changed; None computes it.

    Returns:
        For each D, history vectors H and item vectors V, float32 [N, D] each, with columns of equal norms. The score of
        item j for a history without j is <sum of H_i over its items, V_j>. Columns beyond the rank are zero.
    """
    size = len(products)
    if weights is None:
        weights = ease_weights(products.clone(), ridge)

    def multiply(basis: Tensor) -> Tensor:
        return weights.T @ (products @ (weights @ basis))

    leading = leading_eigenvectors(multiply, random_basis(size, max(ranks)), ROUNDS)
    found = {}
    for rank in ranks:
        weights.fill_diagonal_(0.0)
        basis = leading[:, : rank + EXTRA]
        for _ in range(FILLS if rank < size else 0):
            vectors = basis[:, :rank]
            weights.diagonal().copy_(((weights @ vectors) * vectors).sum(1))
            basis = leading_eigenvectors(multiply, basis, 1)
        vectors = basis[:, :rank]
        history = weights @ vectors
        balance = (history.norm(dim=0) / vectors.norm(dim=0).clamp(min=1e-12)).clamp(min=1e-12).sqrt()
        found[rank] = _padded(history / balance, rank), _padded(vectors * balance, rank)
    return found


def singular_factors(train: Interactions, dimension: int, a: float, b: float) -> tuple[Tensor, Tensor]:
    """Compute the leading right singular vectors V of A = R^-a X C^-b, for catalogs too large for EASE.

    The time is (D + 16) times nine passes over the training pairs; the memory is (Q + N) (D + 16) numbers. If there are
    more than a million queries, a random million is used.

    Args:
        train: the training interactions; repeated pairs count once.
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

    vectors = leading_eigenvectors(multiply, random_basis(size, dimension), ROUNDS)[:, :dimension]
    weights = torch.from_numpy(columns).float()[:, None] ** b
    return _padded(vectors / weights, dimension), _padded(vectors * weights, dimension)


def random_basis(size: int, number: int) -> Tensor:
    """Return a random start of a subspace iteration for `number` eigenvectors, float32 [size, at most number + 16]."""
    generator = torch.Generator().manual_seed(0)
    basis: Tensor = torch.linalg.qr(torch.randn(size, min(number + EXTRA, size), generator=generator))[0]
    return basis


def leading_eigenvectors(multiply: Callable[[Tensor], Tensor], basis: Tensor, rounds: int) -> Tensor:
    """Compute eigenvectors of a symmetric positive semidefinite matrix M by subspace iteration.

    Args:
        multiply: M times a matrix float32 [N, columns].
        basis: orthonormal columns to start from, with `EXTRA` more than the eigenvectors that have to be accurate.
        rounds: number of multiplications before the last one, which rotates the basis to eigenvectors.

    Returns:
        Orthonormal columns of the shape of the basis, with descending eigenvalues.
    """
    for _ in range(rounds):
        basis = torch.linalg.qr(multiply(basis))[0]
    rotation: Tensor = torch.linalg.eigh(basis.T @ multiply(basis))[1].flip(1)
    return basis @ rotation


def _padded(vectors: Tensor, dimension: int) -> Tensor:
    missing = dimension - vectors.shape[1]
    return torch.cat([vectors, vectors.new_zeros(len(vectors), missing)], 1) if missing else vectors


def _scale(towers: TwoTower, questions: QuestionBatches) -> Tensor:
    """Return the factor of the scores that has the smallest softmax loss on some questions, without seen items."""
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
