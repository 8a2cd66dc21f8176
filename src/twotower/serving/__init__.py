"""Trained models saved as folders, and retrieval from them. Imports no training code."""

from twotower.serving.embedder import Embedder
from twotower.serving.explain import Explanation
from twotower.serving.live_catalog import LiveCatalog
from twotower.serving.model_folder import SavedModel, find_model, read_metadata
from twotower.serving.retriever import Retriever
from twotower.serving.search import QueryEmbedder
from twotower.serving.stored_index import build_stored_index, read_index_report, save_changes

__all__ = [
    "Embedder",
    "Explanation",
    "LiveCatalog",
    "QueryEmbedder",
    "Retriever",
    "SavedModel",
    "build_stored_index",
    "find_model",
    "read_index_report",
    "read_metadata",
    "save_changes",
]
