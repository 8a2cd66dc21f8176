"""Incremental training: a model trained further on new data, with the state it inherits and the joined data.

`growth` imports the trainer, which is slow to load, so import it only where needed.
"""

from twotower.continuing.keeping import contexts_of, lineage, rows_of, split_again
from twotower.continuing.parent import Parent, new_days, parent_of
from twotower.continuing.settings import checked, rows_to_learn, settled

__all__ = [
    "Parent",
    "checked",
    "contexts_of",
    "lineage",
    "new_days",
    "parent_of",
    "rows_of",
    "rows_to_learn",
    "settled",
    "split_again",
]
