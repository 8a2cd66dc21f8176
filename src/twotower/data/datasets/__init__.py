"""Known data sets: where to fetch them and how to read them."""

from twotower.data.datasets.registry import REGISTRY, DataSet, available, folder, load

__all__ = ["REGISTRY", "DataSet", "available", "folder", "load"]
