"""Errors that are the user's to mend: shown as one line, with an exit code and without a traceback."""


class UserError(Exception):
    """Something failed that the user can mend. The message says what is wrong, where, and what to do."""

    exit_code = 1


class UsageError(UserError):
    """The command or its config was wrong before any work began."""

    exit_code = 2


def first_reason(error: BaseException) -> str:
    """One line: what began it (TensorStore's words, say) rather than what was wrapped around that."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or type(error).__name__).splitlines()[0]
