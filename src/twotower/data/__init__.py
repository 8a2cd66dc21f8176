"""The data room: reading, features, histories, splits, batches and known data sets."""

from twotower.data.account import Account
from twotower.data.interactions import Interactions

__all__ = ["Account", "Interactions"]
