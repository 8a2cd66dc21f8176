"""Exceptions of the package, and helpers that word messages and check flags."""


class InputError(ValueError):
    """Invalid input or usage, such as an error in a file, a column, a row or a setting.

    The message is one or two lines: where the error is (file, column, row or field), what was found, what was expected,
    and what to do. The command line prints it without a traceback and exits with code 2.
    """


class RankLost(Exception):  # noqa: N818  # names the event; this process is not at fault
    """Another process of the run ended, or did not respond in time; the message says how to resume."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """The user stopped a long task; the message says where its state was saved."""


def counted(count: int, one: str, many: str | None = None) -> str:
    """Write a number with its noun for a message: `1 row`, `1,234 rows`.

    Args:
        count: the number.
        one: the singular noun, with its verb if the sentence has one, such as "row is".
        many: the plural; None to add an s.

    Example:
        >>> from twotower.errors import counted
        >>> counted(1, "row is", "rows are"), counted(1200, "row")
        ('1 row is', '1,200 rows')
    """
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def require_flags(**flags: object) -> None:
    """Check that arguments are True or False: a text such as "no" would count as True.

    Args:
        **flags: the arguments by name; the bool of NumPy is accepted too.

    Raises:
        InputError: an argument is not a bool.
    """
    for name, value in flags.items():
        if type(value).__name__ not in ("bool", "bool_"):
            raise InputError(f"{name}: expected True or False, found {value!r:.80}")
