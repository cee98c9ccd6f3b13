"""The named statements of `sql/`, read once each."""

from functools import cache
from importlib.resources import files


@cache
def statement(name: str) -> bytes:
    """The text of `sql/<name>.sql`, its comments left out: they are for readers, not for the server."""
    text = (files("eci_pay.sql") / f"{name}.sql").read_text(encoding="utf-8")
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("--")).encode()
