"""Headers of a request as they came. Starlette's Headers walk all of them in Python for each one that is asked for."""

from starlette.types import Scope


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Every value of a header, whose name is in lower case."""
    return [value.decode("latin-1") for found, value in scope["headers"] if found == name]


def header_value(scope: Scope, name: bytes) -> str | None:
    """The first value of a header; None where it is not there."""
    values = header_values(scope, name)
    return values[0] if values else None
