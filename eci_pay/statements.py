"""The named statements of `sql/`, read once each."""

import re
from functools import cache
from importlib.resources import files

_PLACEHOLDER = re.compile(rb"%(?:%|\((\w+)\)s)")


@cache
def statement(name: str) -> bytes:
    """The text of `sql/<name>.sql`, its comments left out: they are for readers, not for the server."""
    text = (files("eci_pay.sql") / f"{name}.sql").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--")).encode()


@cache
def numbered(name: str) -> tuple[bytes, tuple[str, ...]]:
    """A statement as the server wants it, `$1` where its text has the name of a parameter, and the names in that order.
    psycopg would look for them at each execution, for it remembers short texts only."""
    names: dict[str, int] = {}

    def number(found: re.Match[bytes]) -> bytes:
        return b"%" if found[1] is None else b"$%d" % names.setdefault(found[1].decode(), len(names) + 1)

    return _PLACEHOLDER.sub(number, statement(name)), tuple(names)
