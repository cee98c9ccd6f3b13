"""Questions to the person at the terminal."""

import sys

import typer

from eci_pay import errors


def confirm(question: str, *, to: str) -> None:
    """Asks before something is done that cannot be undone; raises InvalidRequest where the answer is no."""
    require_terminal(to=to)
    if not agrees(question):
        raise errors.InvalidRequest("nothing was done")


def require_terminal(*, to: str) -> None:
    """A prompt is never required: without a terminal there is none, and nothing is done without --yes. Raises
    InvalidRequest."""
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise errors.InvalidRequest(f"there is no terminal to ask at: add --yes to {to}")


def agrees(question: str) -> bool:
    """Whether the person at the terminal says yes."""
    return typer.confirm(question, err=True)
