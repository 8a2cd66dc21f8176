"""The one exception that means: what came in is wrong, and here is what to do about it."""


class InputError(ValueError):
    """Bad input or bad usage: a file, a column, a row, a setting.

    The message is one or two lines: where the fault is (file, column, row or field), what was found, what was
    expected, and what to do. The command line prints it without a traceback and exits with code 2.
    """


class RankLost(Exception):  # noqa: N818  # what happened, not what is wrong here
    """Another process of the run is gone, or has not answered in time; the message says what goes on from where."""


class Interrupted(Exception):  # noqa: N818  # it is no error
    """The user stopped a long task; the message says where its state was left."""
