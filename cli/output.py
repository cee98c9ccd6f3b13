"""What the terminal shows: data on standard output, as tables or as JSON; messages on standard error."""

import json
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from eci_pay.errors import PayError
    from eci_pay.views import PaymentPage

_STYLE_OF_STATUS = {
    "COMPLETED": "green",
    "REFUNDED": "cyan",
    "FAILED": "red",
    "PROCESSING": "yellow",
    "PENDING": "yellow",
    "CANCELLED": "dim",
}


class Mode:
    """Whether this command speaks JSON: set by its `--json`, read where output is made."""

    json = False


def _use_json(value: bool) -> bool:
    Mode.json = value
    return value


JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.", callback=_use_json, is_eager=True)]


def note(message: str) -> None:
    """A message for the person at the terminal."""
    with suppress(OSError):  # a message that nobody can read must not end what is under way
        print(printable(message), file=sys.stderr)


def printable(text: str) -> str:
    """Text from outside, without the control characters that would give the terminal orders."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)


def shown(text: str | None) -> str:
    """Text from outside, as it is: neither orders to the terminal nor rich's markup."""
    from rich.markup import escape

    return escape(printable(text or ""))


def print_json(data: object) -> None:
    """One JSON document on standard output, escaped where that is not UTF-8."""
    ascii_only = sys.stdout.encoding.lower() not in ("utf-8", "utf8")
    print(json.dumps(data, ensure_ascii=ascii_only, indent=2))


def print_error(error: "PayError") -> None:
    """An error on standard error: a line per fault, or the problem's members as JSON."""
    if Mode.json:
        document = {"code": error.code, "title": error.title(), "detail": error.detail, **error.members()}
        note(json.dumps(document))
    else:
        first, *others = _lines(error)
        note(f"error: {first} [{error.code}]")
        for line in others:
            note(f"       {line}")
    for hint in getattr(error, "__notes__", ()):
        note(hint)


def _lines(error: "PayError") -> list[str]:
    """A line per fault."""
    from eci_pay.errors import ValidationFailed

    if isinstance(error, ValidationFailed):
        return [f"{fault.field}: {fault.message}" if fault.field else fault.message for fault in error.errors]
    return error.detail.split("\n")


def console() -> "Console":
    """Rich output; it honours NO_COLOR and leaves styles out where there is no terminal."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def print_page(page: "PaymentPage") -> None:
    """A page of payments."""
    if Mode.json:
        print_json(page.model_dump(mode="json"))
        return
    rows = [
        (
            str(p.payment_id),
            str(p.order_id),
            str(p.user_id),
            f"{p.amount:,.2f} {p.currency}",
            p.payment_method.value,
            styled(p.status),
            f"{p.refunded_amount:,.2f}" if p.refunded_amount else "",
            f"{p.created_at:%Y-%m-%d %H:%M:%S}",
        )
        for p in page.payments
    ]
    headings = ("Payment", "Order", "User", "Amount", "Method", "Status", "Refunded", "Created (UTC)")
    console().print(table(headings, rows, right=("Amount", "Refunded")))
    total = f"{page.total:,}" if page.total_is_exact else f"more than {page.total:,}"
    note(f"{len(page.payments)} of {total} payments")
    if page.next_cursor:
        note(f"next page: --cursor {page.next_cursor}")


def duration(seconds: float | None) -> str:
    """A time in its two largest units; nothing for None."""
    if seconds is None:
        return ""
    left = max(0, int(seconds))
    parts: list[str] = []
    for unit, unit_seconds in (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1)):
        count, left = divmod(left, unit_seconds)
        if count or parts:
            parts.append(f"{count}{unit}")
    return " ".join(parts[:2]) or "0s"


def counted(count: int, what: str) -> str:
    """So many of something: 1 line, 2,000 lines."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def styled(status: str) -> str:
    """A status in its colour, as rich markup."""
    style = _STYLE_OF_STATUS.get(status)
    return f"[{style}]{status}[/]" if style else status


def table(headings: Iterable[str], rows: Iterable[tuple[str, ...]], *, right: tuple[str, ...] = ()) -> "Table":
    """A plain table."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        made.add_column(heading, justify="right" if heading in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def facts(rows: Iterable[tuple[str, Any]], *, title: str) -> "Table":
    """Names and values, those without a value left out."""
    from rich.table import Table

    made = Table(box=None, title=title, title_justify="left", title_style="bold", show_header=False, pad_edge=False)
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, ""):
            made.add_row(name, str(value))
    return made
