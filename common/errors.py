"""Errors that are meant for the user, and the shortening of values that stand in their messages."""

import reprlib


class UserError(Exception):
    """Something the user can mend; its text is the whole message. `common.cli.run` turns it into exit code 2."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived and the work stopped in good order; exit code 128 + signum.

    As KeyboardInterrupt no `Exception`: raised by a signal handler anywhere, no ``except Exception`` may eat it.
    """

    def __init__(self, message: str, signum: int):
        super().__init__(message)
        self.signum = signum


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 80


def brief(value) -> str:
    """Return ``repr(value)`` cut to about a line; the work is bounded, whatever an untrusted file made of it."""
    return " ".join(_repr.repr(value).split())[:200]


def reason(error: BaseException, length: int = 300) -> str:
    """Return a foreign library's whole message on one line, cut to ``length`` characters; its type if it is empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= length else text[:length] + " …"


def refuse(where, problems: list[str], shown: int = 20) -> None:
    """Raise `UserError` naming every problem of a file, the first ``shown`` of many; with none do nothing."""
    if problems:
        listed = problems[:shown] + ([f"… and {len(problems) - shown} more"] if len(problems) > shown else [])
        raise UserError(f"{where}: " + "\n  ".join(listed))
