"""Saved models and retrieval from them. Imports nothing from the training code."""

from twotower.serving.artifact import Artifact, find_model, read_metadata
from twotower.serving.embedding import QueryEmbedder
from twotower.serving.explain import Explanation
from twotower.serving.live import LiveCatalog
from twotower.serving.retriever import Retriever
from twotower.serving.stored import build_stored_index, read_index_report, save_changes

__all__ = [
    "Artifact",
    "Explanation",
    "LiveCatalog",
    "QueryEmbedder",
    "Retriever",
    "build_stored_index",
    "find_model",
    "read_index_report",
    "read_metadata",
    "save_changes",
]
