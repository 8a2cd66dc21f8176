"""A trained model as a folder, and as something that answers. Imports nothing of training."""

from twotower.serving.artifact import Artifact, find_model, read_metadata
from twotower.serving.retriever import Retriever

__all__ = ["Artifact", "Retriever", "find_model", "read_metadata"]
