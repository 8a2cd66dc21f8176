"""Exceptions of the package."""


class InputError(ValueError):
    """Bad input or bad usage: a file, a column, a row, a setting.

    The message is one or two lines: where the error is (file, column, row or field), what was found, what was expected,
    and what to do. The command line prints it without a traceback and exits with code 2.
    """


class RankLost(Exception):  # noqa: N818  # names the event; this process is not at fault
    """Another process of the run ended, or did not respond in time; the message says how to resume."""


class Interrupted(Exception):  # noqa: N818  # not an error
    """The user stopped a long task; the message says where its state was saved."""
