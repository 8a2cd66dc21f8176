"""Training of user and item vectors on whole users, for gowalla.py and warm_items.py.

All rows of a user have the same query embedding and therefore the same softmax over the catalog, so it is computed once
per user instead of once per row:

    loss_u = sum over the user's items y of ( -s_uy + log sum_j exp s_uj ),
    s_uj   = cos(q_u, v_j) / T + a log p_j,        p_j = (training rows of j + 1) / (all of them + items),

This is exactly the full softmax loss over all rows, at the cost of one row per user, in bfloat16 with float32 sums. The
gradient and the weight of a row are the same as with `full-softmax`; the only difference from `twotower train` is that
a batch consists of whole users.

With layers > 0, the vectors are the tables after propagation over the graph of users and items, both in training and in
the finished model (He et al. 2020, LightGCN, eq. 3, 4 and 8, equal weights):

    [Q V] = 1/(K+1) sum_{k=0..K} A^k [Q0 V0],        A_uv = 1 / sqrt(n_u n_v) where user u has item v, else 0.

The result is one vector for each user and item, for every K.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from twotower.data import Holdout, Interactions
from twotower.index import ExactIndex
from twotower.index.popularity import PopularityDial


@dataclass(frozen=True)
class Settings:
    """Settings of a training run on whole users.

    Attributes:
        dimension: D.
        temperature: divides the cosine.
        learning_rate: learning rate of Adam, with warm-up over 20 steps and cosine decay to a twentieth.
        users: users per batch.
        epochs: number of epochs, without early stopping.
        layers: K, layers of the propagation over the graph.
        prior: a; the score includes a (log p_j - mean log p), both in training and in the finished model.
        start: "svd", "random" (N(0, 0.1^2)), or a file with the tables of another run (--runs).
        user_weight: exponent e of the weight n^e of a user with n rows; 1 weights all rows equally.
        seed: seed of initialization and order.
    """

    dimension: int = 64
    temperature: float = 0.1
    learning_rate: float = 1e-3
    users: int = 512
    epochs: int = 12
    layers: int = 0
    prior: float = 0.0
    start: str = "svd"
    user_weight: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Ranked:
    """A ranker with two tables of unit vectors.

    Attributes:
        users: [Q, D].
        items: [N, D].
        dial: popularity dial of the items' training counts.
        popularity: setting b of the dial; 1 for cosines alone.
    """

    users: Tensor
    items: Tensor
    dial: PopularityDial
    popularity: float = 1.0

    def rank(self, holdout: Holdout, k: int, exclude_seen: bool) -> NDArray[np.int64]:
        """Return the top k items of every query, int64 [E, k]."""
        seen = (holdout.history_offsets, holdout.history_items) if exclude_seen else None
        users = self.dial.queries(self.users[torch.from_numpy(holdout.queries)], self.popularity)
        return ExactIndex(self.dial.items(self.items)).search(users, k, seen)[1].numpy()


class Softmax(torch.autograd.Function):
    """The loss sum_u w_u log sum_j exp(<q_u, v_j> / T + a c_j) for unit vectors, with products in bfloat16.

    c_j = log p_j - mean log p, and a is the prior. The gradients are computed in the forward pass. A cosine is at most
    1, so exp(s - 1/T) cannot overflow and no maximum has to be subtracted. The product for the gradient also computes
    the row sums: the items have an additional coordinate 1 next to T c_j, padded to sixteen for the kernels.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, items: Tensor, coordinate: Tensor, weights: Tensor, temperature: float, prior: float
    ) -> Tensor:
        """Compute the loss, [B, D], [N, D], T c [N], [B] -> a scalar."""
        beside = torch.stack([coordinate, torch.ones_like(coordinate)], 1)
        wide = torch.cat([items, beside, items.new_zeros(len(items), 14)], 1).bfloat16()
        asked = torch.cat([query, query.new_tensor([prior] + 15 * [0.0]).expand(len(query), 16)], 1)
        weight = ((asked / temperature).bfloat16() @ wide.T).sub_(1.0 / temperature).exp_()
        sums = weight @ wide
        dimension = items.shape[1]
        total = sums[:, dimension + 1].float()
        scale = (weights / total)[:, None]
        by_query = sums[:, :dimension].float() * scale / temperature
        ctx.save_for_backward(by_query, (weight.T @ (query * scale).bfloat16()).float() / temperature)
        return ((total.log() + 1.0 / temperature) * weights).sum()

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        """Scale the saved gradients by the incoming gradient."""
        by_query, by_item = ctx.saved_tensors
        return outputs[0] * by_query, outputs[0] * by_item, None, None, None, None


class Propagation(torch.autograd.Function):
    """The mean of K + 1 powers of the graph's matrix times both tables. A is symmetric, so backward is the same map."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, graph: Graph) -> tuple[Tensor, Tensor]:
        """Propagate both tables, [Q, D], [N, D] -> the same shapes."""
        ctx.graph = graph
        return graph.propagate(users, items)

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> tuple[Tensor | None, ...]:
        """Propagate the gradients."""
        return (*ctx.graph.propagate(*(output.contiguous() for output in outputs)), None)


class Graph:
    """The graph of users and items, with edge weight 1 / sqrt(n_u n_v) for each training row.

    A layer sums rows for each user and item and is limited by memory bandwidth: bfloat16 rows with float32 sums took a
    third of the time of a sparse float32 product (D = 256).
    """

    def __init__(self, train: Interactions, layers: int) -> None:
        self.layers = layers
        users, items = (torch.from_numpy(codes.astype(np.int64)) for codes in (train.query_codes(), train.item_codes))
        by_item = torch.argsort(items, stable=True)
        self.items_of_users = items, torch.from_numpy(np.asarray(train.offsets, dtype=np.int64))
        counts = torch.from_numpy(train.item_counts())
        self.users_of_items = users[by_item], F.pad(counts.cumsum(0), (1, 0))
        self.root_users = self.items_of_users[1].diff().clamp(min=1).float().rsqrt()[:, None]
        self.root_items = counts.clamp(min=1).float().rsqrt()[:, None]

    def propagate(self, users: Tensor, items: Tensor) -> tuple[Tensor, Tensor]:
        """Propagate both tables, [Q, D], [N, D] -> the same shapes."""
        of_users, of_items = users.clone(), items.clone()
        for _ in range(self.layers):
            users, items = (
                self.root_users * summed(items * self.root_items, *self.items_of_users),
                self.root_items * summed(users * self.root_users, *self.users_of_items),
            )
            of_users += users
            of_items += items
        return of_users / (self.layers + 1), of_items / (self.layers + 1)


def summed(rows: Tensor, codes: Tensor, offsets: Tensor) -> Tensor:
    """Sum the rows of each owner, float32 [owners, D]; rows are read in bfloat16."""
    return F.embedding_bag(codes, rows.bfloat16(), offsets, mode="sum", include_last_offset=True).float()


class ByUsers:
    """Training of two tables on whole users."""

    def __init__(self, train: Interactions, settings: Settings) -> None:
        self.settings = settings
        self.offsets = torch.from_numpy(np.asarray(train.offsets, dtype=np.int64))
        self.items = torch.from_numpy(train.item_codes.astype(np.int64))
        self.sizes = self.offsets.diff()
        self.graph = Graph(train, settings.layers) if settings.layers else None
        self.dial = PopularityDial(torch.from_numpy(train.item_counts()), settings.temperature)
        self.coordinate = self.dial.coordinate()
        torch.manual_seed(settings.seed)
        scale, shapes = 0.1, ((train.num_queries, settings.dimension), (train.num_items, settings.dimension))
        tables = [torch.randn(shape) * scale for shape in shapes]
        if settings.start == "svd":
            found = singular_vectors(train, settings.dimension)
            tables = [F.normalize(table, dim=1) * scale * settings.dimension**0.5 for table in found]
        elif settings.start != "random":
            state = load_file(settings.start)
            tables = [state["table.0"], state["table.1"]]
            if tuple(table.shape for table in tables) != shapes:
                raise SystemExit(f"--start {settings.start}: the tables have other users, other items or another D")
        # The SVD returns views into a larger matrix, which cannot be saved as they are.
        self.tables = [table.contiguous().requires_grad_() for table in tables]
        self.optimizer = torch.optim.AdamW(self.tables, lr=settings.learning_rate, weight_decay=0.0, fused=True)
        self.users = self.sizes.nonzero().flatten()
        self.steps = -(-len(self.users) // settings.users) * settings.epochs

    def epoch(self, number: int) -> float:
        """Train one epoch over all users, in an order given by seed and epoch; return the mean loss per row."""
        order = torch.randperm(
            len(self.users), generator=torch.Generator().manual_seed(self.settings.seed * 1000 + number)
        )
        batches = torch.split(self.users[order], self.settings.users)
        total = 0.0
        for place, users in enumerate(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.learning_rate * self._factor(number * len(batches) + place)
            loss = self.loss(users)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += loss.item() / len(batches)
        return total

    def loss(self, users: Tensor) -> Tensor:
        """Compute the mean loss per row over some users."""
        of_users, of_items = self.vectors()
        query, items = F.normalize(of_users[users], dim=1), F.normalize(of_items, dim=1)
        sizes = self.sizes[users]
        row = torch.repeat_interleave(torch.arange(len(users)), sizes)
        first = self.offsets[users] - (sizes.cumsum(0) - sizes)
        positives = self.items[torch.arange(len(row)) + first[row]]
        weights = sizes.float() ** self.settings.user_weight
        temperature, prior = self.settings.temperature, self.settings.prior
        cosine = (query[row] * items.index_select(0, positives)).sum(1)
        score = (cosine + prior * self.coordinate[positives]) / temperature * (weights / sizes)[row]
        partition: Tensor = Softmax.apply(  # type: ignore[no-untyped-call]
            query, items, self.coordinate, weights, temperature, prior
        )
        return (partition - score.sum()) / weights.sum()

    def vectors(self) -> tuple[Tensor, Tensor]:
        """Return the vectors of users [Q, D] and items [N, D] before normalization."""
        if self.graph is None:
            return self.tables[0], self.tables[1]
        found: tuple[Tensor, Tensor] = Propagation.apply(*self.tables, self.graph)  # type: ignore[no-untyped-call]
        return found

    @torch.no_grad()
    def ranked(self, popularity: float = 1.0) -> Ranked:
        """Return the current model as a ranker, with the popularity dial at `popularity`."""
        users, items = (F.normalize(vectors, dim=1) for vectors in self.vectors())
        return Ranked(users, items, self.dial, popularity + self.settings.prior)

    def state(self) -> dict[str, Tensor]:
        """Return the tables and the optimizer state."""
        kept = {f"table.{n}": table.detach() for n, table in enumerate(self.tables)}
        for n, table in enumerate(self.tables):
            kept |= {f"{name}.{n}": value for name, value in self.optimizer.state[table].items()}
        return kept

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore a saved state."""
        for n, table in enumerate(self.tables):
            table.data.copy_(state[f"table.{n}"])
            self.optimizer.state[table] = {key: state[f"{key}.{n}"] for key in ("step", "exp_avg", "exp_avg_sq")}

    def _factor(self, step: int) -> float:
        if step < 20:
            return (step + 1) / 20
        return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add options for all settings except the seed, and for the dial settings to measure at."""
    for name, default in asdict(Settings()).items():
        if name != "seed":
            parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument(
        "--popularity", nargs="+", type=float, default=[1.0], metavar="B", help="settings of the popularity dial"
    )


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the options; with --final, only one dial setting is allowed, because the test is measured once."""
    asked = parser.parse_args()
    if asked.final and len(asked.popularity) > 1:
        parser.error("--popularity: the test is measured at a single setting, selected on the validation")
    return asked


def settings_of(asked: argparse.Namespace, seed: int) -> Settings:
    """Return the requested settings with a seed."""
    values: dict[str, Any] = {name: getattr(asked, name, seed) for name in asdict(Settings())}
    return Settings(**values)


def singular_vectors(train: Interactions, dimension: int) -> tuple[Tensor, Tensor]:
    """Compute u sqrt(s), v sqrt(s) of the truncated SVD of A_ui / sqrt(n_u n_i), by random projection."""
    codes = [torch.from_numpy(codes.astype(np.int64)) for codes in (train.query_codes(), train.item_codes)]
    shape = (train.num_queries, train.num_items)
    counts = [torch.bincount(c, minlength=n).clamp(min=1).float() for c, n in zip(codes, shape, strict=True)]
    values = (counts[0][codes[0]] * counts[1][codes[1]]) ** -0.5
    matrix = torch.sparse_coo_tensor(torch.stack(codes), values, shape).coalesce()
    flipped = matrix.t().coalesce()
    basis = matrix @ torch.randn(shape[1], dimension + 16)
    for _ in range(4):
        basis = torch.linalg.qr(matrix @ (flipped @ basis))[0]
    left, singular, right = torch.linalg.svd(flipped @ basis, full_matrices=False)
    root = singular[:dimension].sqrt()
    return (basis @ right.T)[:, :dimension] * root, left[:, :dimension] * root
