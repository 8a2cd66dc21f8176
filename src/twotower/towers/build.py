"""Construction of towers from a configuration, placed here because serving builds models without the trainer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from twotower.config.run import Config, HistoryConfig
from twotower.errors import InputError
from twotower.features.feature_set import EncodedTable
from twotower.towers.context import ContextInputs, SideInputs
from twotower.towers.features import FeatureInputs
from twotower.towers.item_tower import ItemTower
from twotower.towers.layers.attention import Transformer
from twotower.towers.layers.gru import Recurrent
from twotower.towers.layers.recency import RecencyAverages
from twotower.towers.sequence_tower import SequenceTower
from twotower.towers.tables import EmbeddingTable, store_tables
from twotower.towers.text import TextTransformer
from twotower.towers.two_tower import PooledHistory, QueryTower, TwoTower


def build_towers(
    config: Config,
    *,
    num_queries: int,
    num_items: int,
    item_features: EncodedTable | None = None,
    query_features: EncodedTable | None = None,
    context: EncodedTable | None = None,
    trained_items: Tensor | None = None,
    trained_queries: Tensor | None = None,
) -> TwoTower:
    """Build both towers of a configuration, with newly initialised weights.

    Args:
        config: the configuration; its sections `query_tower` and `item_tower`, the similarity and temperature of
            `objective`, and the event types of `data` are used.
        num_queries: Q, rows of the query id table.
        num_items: number of items, N.
        item_features: item features, fitted and encoded; None if item_tower.features is not set.
        query_features: query features, fitted and encoded; None if query_tower.features is not set.
        context: request features, fitted, without rows; None if query_tower.context is not set.
        trained_items: items that occur in training, bool [N]; None for all. Loading a saved model overwrites it.
        trained_queries: queries that occur in training, bool [Q]; None for all.

    Raises:
        InputError: a tower has no inputs, or a setting needs features that are not declared.
    """
    types = () if context is None else _event_types(config)
    query, item, objective = config.query_tower, config.item_tower, config.objective
    if not query.id_embedding and query.history is None and query_features is None and context is None:
        raise InputError("query_tower: expected id_embedding: true, a history, features or context; found none")
    dimension = config.item_tower.dimension
    if item_features is None:
        for name, is_set in (("id_dropout", item.id_dropout > 0), ("id_embedding: false", not item.id_embedding)):
            if is_set:
                raise InputError(
                    f"item_tower.{name}: needs item_tower.features; without features an item is known only by its id"
                )
    texts: dict[Any, TextTransformer] = {}
    item_inputs = None if item_features is None else FeatureInputs(item_features, dimension, texts)

    def new_item_tower(table: str) -> ItemTower:
        return ItemTower(
            num_items,
            dimension,
            hidden=item.hidden,
            dropout=item.dropout,
            features=item_inputs,
            id_embedding=item.id_embedding,
            id_dropout=item.id_dropout,
            trained=trained_items,
            residual=item.residual,
            layer_norm=item.layer_norm,
            table=table,
            projection=item.projection,
        )

    item_tower = new_item_tower("item")
    sequence = None if query.history is None else query.history.sequence
    history = None
    history_items: nn.Embedding | ItemTower | None = None
    if query.history is not None:
        if sequence is None:
            history = PooledHistory(
                query.history.length,
                query.history.heads,
                dropout=query.history.dropout,
                power=query.history.power,
                event_types=len(types) if query.history.event_weights else 0,
            )
        if query.history.item_features:
            history_items = item_tower if query.history.share_table else new_item_tower("history")
        else:
            shares = query.history.share_table
            history_items = item_tower.ids if shares else EmbeddingTable(num_items, dimension, name="history")
        if history_items is None:
            raise InputError(
                "query_tower.history.share_table: item_tower.id_embedding: false leaves no table to share; "
                "set query_tower.history.item_features: true, or share_table: false"
            )
    query_inputs = None if query_features is None else FeatureInputs(query_features, dimension, texts)
    requests = None if context is None else _context_inputs(config, context, texts)
    ids = num_queries if query.id_embedding else 0
    query_tower: QueryTower | SequenceTower
    if query.history is not None and history_items is not None and sequence is not None:
        beside = None
        if ids or query_inputs is not None or requests is not None:
            beside = SideInputs(
                ids,
                dimension,
                features=query_inputs,
                context=requests,
                hidden=query.hidden or [],
                dropout=query.dropout,
                residual=query.residual,
                layer_norm=query.layer_norm,
                trained=trained_queries,
            )
        query_tower = build_sequence_tower(query.history, dimension, history_items, beside)
    else:
        query_tower = QueryTower(
            ids,
            dimension,
            history=history,
            history_items=history_items,
            hidden=query.hidden,
            dropout=query.dropout,
            features=query_inputs,
            residual=query.residual,
            layer_norm=query.layer_norm,
            context=requests,
            trained=trained_queries,
            projection=query.projection,
        )
    towers = TwoTower(
        query_tower,
        item_tower,
        cosine=objective.similarity == "cosine",
        temperature=objective.initial_temperature if objective.temperature == "learned" else objective.temperature,
        learned_temperature=objective.temperature == "learned",
        bias=EmbeddingTable(num_items, 1, scale=0.0) if item.bias else None,
        popularity=item.popularity,
        nested=item.nested,
        nested_weights=item.nested_weights,
        event_types=len(types),
        event_share=item.event_share or 0.0,
    )
    store_tables(towers, item.table_precision)
    return towers


def _event_types(config: Config) -> tuple[str, ...]:
    """Return the names of the event types; empty without types."""
    events = config.data.events
    return () if events is None else tuple(events.weights or ())


def _context_inputs(config: Config, context: EncodedTable, texts: dict[Any, TextTransformer] | None) -> ContextInputs:
    types, events = _event_types(config), config.data.events
    return ContextInputs(
        context,
        config.item_tower.dimension,
        dropout=config.query_tower.context_dropout,
        event=events.column if events is not None and types else None,
        event_types=types,
        texts=texts,
    )


def build_sequence_tower(
    settings: HistoryConfig, dimension: int, history_items: nn.Embedding | ItemTower, beside: SideInputs | None = None
) -> SequenceTower:
    """Build the query tower of `query_tower.history.sequence`, with newly initialised weights.

    Raises:
        InputError: the number of heads does not divide the width.
    """
    sequence = settings.sequence
    assert sequence is not None
    encoder: Transformer | Recurrent
    if sequence.kind == "gru":
        encoder = Recurrent(dimension, layers=sequence.blocks, dropout=sequence.dropout)
    else:
        if dimension % sequence.heads:
            raise InputError(
                f"query_tower.history.sequence.heads: {sequence.heads}; expected a divisor of item_tower.dimension, "
                f"{dimension}"
            )
        encoder = Transformer(
            dimension,
            settings.length + 1,
            blocks=sequence.blocks,
            heads=sequence.heads,
            hidden=max(round(sequence.expansion * dimension), 1),
            dropout=sequence.dropout,
            gated=sequence.gated,
        )
    return SequenceTower(
        encoder,
        history_items,
        dimension,
        length=settings.length,
        recency=RecencyAverages(settings.length + 1, sequence.recency) if sequence.recency else None,
        item_dropout=settings.dropout,
        beside=beside,
        gaps=sequence.gaps,
    )
