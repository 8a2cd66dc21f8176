"""Known data sets, which are downloaded and read by name."""

from twotower.data.datasets.registry import REGISTRY, DataSet, available, folder, load

__all__ = ["REGISTRY", "DataSet", "available", "folder", "load"]
