"""Continuing a model on new data: what is taken over from the model, and how the data is joined.

`warm_start` imports the trainer, which is slow to load: import it where it is needed.
"""

from twotower.incremental.lineage import contexts_of, lineage, rows_of, split_again
from twotower.incremental.parent import Parent, new_days, parent_of
from twotower.incremental.settings import checked, rows_to_learn, settled

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
