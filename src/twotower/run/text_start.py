"""Initial weights from text similarity: towers that read the same sentence model start at the cosine of its vectors.

With one linear map each, u = P t(query) and v = P (sum of t(item) over the text features), with the same P [D, width].
The rows of P are the D leading right singular vectors of the item texts' vectors, so <u, v> is close to the inner
product of the texts' vectors, and equal to it if D is at least the width. Training then starts from the sentence model
and not from two random projections, which a few thousand pairs cannot align.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from twotower.config.features import TextFeature
from twotower.config.run import Config
from twotower.distributed.communicator import Communicator
from twotower.features.text import TextEncoder
from twotower.towers import TwoTower
from twotower.towers.features import FeatureInputs
from twotower.towers.layers.mlp import DNN, MLP
from twotower.towers.two_tower import QueryTower

#: Maximum number of items whose texts determine P.
SAMPLE = 20_000


def start_at_texts(
    towers: TwoTower,
    config: Config,
    ranks: Communicator,
    *,
    on_message: Callable[[object], None] | None = None,
) -> bool:
    """Set the towers to the similarity of their texts, if both are one linear map of the same sentence model.

    The query tower must have neither ids nor a history, which would be added to the text.

    Args:
        towers: the newly built towers; changed in place.
        config: the settings; `training.start` must be auto.
        ranks: the processes; the result of rank 0 is copied to the others.
        on_message: receives a description of the initial weights; None discards it.

    Returns:
        False if the towers keep their random weights.
    """
    query, item = towers.query_tower, towers.item_tower
    if config.training.start != "auto" or not isinstance(query, QueryTower) or query.ids or query.history:
        return False
    if item.features is None or item.residual:
        return False
    asked, own = _linear(query.mlp), _linear(item.mlp)
    if asked is None or own is None:
        return False
    first = query.features.width if query.features is not None else 0
    requests = query.context.inputs if query.context is not None else None
    sides = [*_texts(query.features, 0), *_texts(requests, first)]
    offers = list(_texts(item.features, item.dimension if item.ids is not None else 0))
    shared = {model for model, _, _ in sides} & {model for model, _, _ in offers}
    if len(shared) != 1:
        return False
    with torch.no_grad():
        chosen = [(place, at) for model, place, at in offers if model in shared]
        projection = _projection(
            [item.features.get_buffer(f"rows{place}")[:-1, :-1] for place, _ in chosen], item.dimension
        )
        for linear, places in (
            (asked, [at for model, _, at in sides if model in shared]),
            (own, [at for _, at in chosen]),
        ):
            linear.weight.zero_()
            linear.bias.zero_()
            for at in places:
                linear.weight[:, at : at + projection.shape[1]] = projection.to(linear.weight)
        ranks.copy_first([parameter.data for parameter in towers.parameters()])
    if on_message is not None:
        size = f"{item.dimension} of {projection.shape[1]} dimensions"
        on_message(f"start: text similarity from {next(iter(shared))}, {size}")
    return True


def _linear(mlp: nn.Module | None) -> nn.Linear | None:
    """Return the layer of a tower that consists of one linear map; None for other towers."""
    if isinstance(mlp, DNN) and not len(mlp.blocks):
        return mlp.projection
    if isinstance(mlp, MLP) and len(mlp.layers) == 1 and isinstance(mlp.layers[0], nn.Linear):
        return mlp.layers[0]
    return None


def _texts(inputs: FeatureInputs | None, first: int) -> Iterator[tuple[str, int, int]]:
    """Yield the model, the position and the first column in the tower's input of each feature with a sentence model."""
    if inputs is None:
        return
    features = inputs.table.features
    at = first
    for place, (declared, encoder, width) in enumerate(
        zip(features.declared, features.encoders, features.widths or [], strict=True)
    ):
        if isinstance(declared, TextFeature) and isinstance(encoder, TextEncoder):
            yield declared.model, place, at
        at += width


def _projection(texts: list[Tensor], dimension: int) -> Tensor:
    """Return P, [D, width]: orthonormal rows, or the identity above rows of zeros if D is at least the width."""
    width = texts[0].shape[1]
    if dimension >= width:
        return torch.eye(dimension, width)
    rows = torch.cat(texts)
    if len(rows) > SAMPLE:
        rows = rows[torch.from_numpy(np.random.default_rng(0).choice(len(rows), SAMPLE, replace=False))]
    _, vectors = torch.linalg.eigh(rows.double().T @ rows.double())  # eigenvalues ascend
    found: Tensor = vectors[:, -dimension:].T.flip(0).float()
    return found
