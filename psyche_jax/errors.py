"""Errors that are the user's to mend: shown as one line, with an exit code and without a traceback."""

from collections.abc import Sequence

_LONGEST_REASON = 300


class UserError(Exception):
    """Something failed that the user can mend. The message says what is wrong, where, and what to do.

    `details` are further lines, where there are several things to name.
    """

    exit_code = 1

    def __init__(self, message: str, details: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.details = tuple(details)


class UsageError(UserError):
    """The command or its config was wrong before any work began."""

    exit_code = 2


def first_reason(error: BaseException) -> str:
    """One short line: what began it (TensorStore's words, say) rather than what was wrapped around that."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
