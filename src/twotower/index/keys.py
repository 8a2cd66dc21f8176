"""Sort keys: a score and its column as one sortable integer.

    key(score, column) = order(score) * 2^32 + (2^32 - 1 - column)

where `order` maps float32 to int32 preserving the order. Keys are distinct, so the largest K are well defined: scores
descending, then columns ascending. Nothing depends on tile sizes or on the stability of a sort.
"""

import torch
from torch import Tensor

_LOW = (1 << 32) - 1

#: Maximum number of columns that fit into a key.
MAX_COLUMNS = _LOW - 1

#: Key of an empty slot, smaller than the key of any score.
EMPTY = torch.iinfo(torch.int64).min


def pack_keys(score: Tensor, column: Tensor) -> Tensor:
    """Pack score and column into one int64: larger is better, and lower columns win among equal scores.

    Args:
        score: float32, no NaN.
        column: int64 in 0 .. 2^32 - 2, of the same shape.
    """
    # Adding 0.0 turns -0.0 into 0.0: equal scores must have equal bits.
    bits = (score + 0.0).view(torch.int32).to(torch.int64)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << 32) | (_LOW - column)


def unpack_scores(key: Tensor) -> Tensor:
    """Return the float32 scores of keys."""
    ordered = key >> 32
    return torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)


def unpack_columns(key: Tensor) -> Tensor:
    """Return the int64 columns of keys, 0 for an empty key."""
    # An empty key must not index out of range; the caller masks it.
    return torch.where(key == EMPTY, 0, _LOW - (key & _LOW))
