"""Known data sets: download and reading."""

from twotower.data.datasets.registry import REGISTRY, DataSet, available, folder, load

__all__ = ["REGISTRY", "DataSet", "available", "folder", "load"]
