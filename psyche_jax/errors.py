"""Errors that are the user's to mend, shown as one line; and what is wrong with one row of data, which is skipped."""

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


class RowError(ValueError):
    """What is wrong with a row: `reason`, the same words for all such rows, and details of this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason


class NotTextError(RowError):
    """A row holds bytes that are not text in the encoding of its file."""


def first_reason(error: BaseException) -> str:
    """One short line: what began it (TensorStore's words, say) rather than what was wrapped around that."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = (str(error) or type(error).__name__).splitlines()[0]
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}…"
