"""The command that sums up what became of the payments of late."""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.outbox import parse_age, stats_table
from cli.output import JsonOption
from cli.runtime import run_use_case

if TYPE_CHECKING:
    from rich.table import Table

    from eci_pay.stats import Backlog, StatsView

CHART_HEIGHT = 6
CHART_WIDTH = 60
BAR_WIDTH_MAX = 4
BLOCKS, ASCII_BLOCKS = " ▁▂▃▄▅▆▇█", " #"
"""A bar's end in one character, from nothing to all of it."""

_UNITS = (("day", 86_400), ("hour", 3600), ("minute", 60))


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: eci-pay stats --since 7d")(stats)


def stats(
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="Such as 24h or 7d ago, or a UTC date or instant.")
    ] = "24h",
    as_json: JsonOption = False,
) -> None:
    """Sum up the payments created lately, and what is left to do."""
    from eci_pay.requests import parse_instant

    instant = parse_instant(since, "--since") if "-" in since else datetime.now(UTC) - parse_age(since)
    view = run_use_case(lambda service: service.stats.since(instant))
    if output.Mode.json:
        output.print_json(view.model_dump(mode="json"))
    else:
        _print(view)


def _print(view: "StatsView") -> None:
    print(f"{output.counted(view.payments, 'payment')} created since {_instant(view.since)} UTC")
    out = output.console()
    if view.payments:
        out.print(_payments(view))
        out.print(_money(view))
        print(f"succeeded: {_success(view)}\n")
        counts = [bar.count for bar in view.bars]
        blocks = ASCII_BLOCKS if out.options.ascii_only else BLOCKS
        print(f"payments per {_name_of_step(view.step_seconds)}, from {_instant(view.bars[0].begins_at)} UTC")
        print("\n".join(chart(counts, blocks)))
    _print_backlog(view.backlog)


def _payments(view: "StatsView") -> "Table":
    statuses = [status for status, count in view.by_status.items() if count]
    rows = [
        (method.value, *(f"{counts[status]:,}" for status in statuses), f"{sum(counts.values()):,}")
        for method, counts in view.by_method.items()
        if any(counts.values())
    ]
    rows.append(("all", *(f"{view.by_status[status]:,}" for status in statuses), f"{view.payments:,}"))
    headings = ("Method", *(output.styled(status) for status in statuses), "All")
    return output.table(headings, rows, right=headings[1:])


def _money(view: "StatsView") -> "Table":
    rows = [
        (flow.currency, f"{flow.charges:,}", f"{flow.charged:,.2f}", f"{flow.refunds:,}", f"{flow.refunded:,.2f}")
        for flow in view.money
    ]
    headings = ("Currency", "Charges", "Money in", "Refunds", "Money out")
    return output.table(headings, rows, right=headings[1:])


def _success(view: "StatsView") -> str:
    attempts = view.attempts
    if attempts.success_rate is None:
        return "no attempt has ended"
    ended = attempts.completed + attempts.failed
    return f"{attempts.success_rate:.1%} ({attempts.completed:,} of {output.counted(ended, 'attempt')} that ended)"


def chart(counts: list[int], blocks: str) -> Iterable[str]:
    """The lines of a picture of bars, with its scale."""
    most, levels = max(counts), len(blocks) - 1
    width = max(1, min(BAR_WIDTH_MAX, CHART_WIDTH // len(counts)))
    # Rounded up: what is not nothing is seen.
    heights = [-(-count * CHART_HEIGHT * levels // most) for count in counts]
    margin = len(f"{most:,}")
    for row in reversed(range(CHART_HEIGHT)):
        scale = f"{most:,}" if row == CHART_HEIGHT - 1 else "0" if row == 0 else ""
        bars = "".join(blocks[min(max(height - row * levels, 0), levels)] * width for height in heights)
        yield f"{scale:>{margin}} |{bars}|"


def _print_backlog(backlog: "Backlog") -> None:
    output.console().print(stats_table(backlog.messages))
    outcomes = backlog.outcomes
    oldest = f", the oldest for {output.duration(outcomes.oldest_seconds)}" if outcomes.open + outcomes.late else ""
    print(
        f"without an outcome: {outcomes.open:,}, to be put right by hand: {outcomes.late:,}, "
        f"of both overdue: {outcomes.overdue:,}{oldest}"
    )


def _name_of_step(seconds: int) -> str:
    unit, unit_seconds = next(each for each in _UNITS if seconds % each[1] == 0)
    count = seconds // unit_seconds
    return unit if count == 1 else f"{count:,} {unit}s"


def _instant(instant: datetime) -> str:
    return f"{instant:%Y-%m-%d %H:%M:%S}"
