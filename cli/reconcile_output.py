"""What the terminal shows of a reconciliation: tables or JSON, and every difference as CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from cli import output

if TYPE_CHECKING:
    from eci_pay.differences import Difference, Report
    from eci_pay.reconciliation import Run
    from eci_pay.repairs import Repair, Repaired

PLAN_SHOWN_MAX = 50
SHOWN_MAX = 20
"""How many differences, and faults, the terminal shows one by one."""
_STARTS_A_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def print_outcome(report: "Report", repairs: "Sequence[Repair]", made: "Sequence[Repaired]") -> None:
    """What was found and what was repaired."""
    if output.Mode.json:
        output.print_json(_document(report, repairs, made))
        return
    out = output.console()
    out.print(output.facts(_facts(report), title=f"Reconciliation {report.run_id}"))
    if report.file is not None:
        _print_sums(report)
        _print_differences(report)
    _print_faults(report)
    for each in made:
        if each.left:
            output.note(f"not repaired: {each.repair}: {each.left}")
    if repairs and not made:
        output.note(f"{output.counted(len(repairs), 'repair')} possible: --fix")
    print(verdict(report))


def verdict(report: "Report") -> str:
    """In a sentence."""
    differences, faults = (
        output.counted(report.difference_count, "difference"),
        output.counted(report.fault_count, "fault"),
    )
    found = f"{differences}, {faults} of our books"
    if not report.difference_count + report.fault_count:
        return "clean: no differences"
    return f"{found}, {report.repaired:,} of them repaired" if report.repaired else found


def print_plan(report: "Report", repairs: "Sequence[Repair]") -> None:
    """What would be repaired, for the person who is asked."""
    output.note(f"{verdict(report)}; repairs:")
    for repair in repairs[:PLAN_SHOWN_MAX]:
        output.note(f"  {repair}")
    if len(repairs) > PLAN_SHOWN_MAX:
        output.note(f"  and {len(repairs) - PLAN_SHOWN_MAX:,} more")


def print_history(runs: "Sequence[Run]") -> None:
    """Runs, one a line."""
    if output.Mode.json:
        output.print_json([{name: _plain(value) for name, value in asdict(run).items()} for run in runs])
        return
    rows = [
        (
            str(run.run_id),
            f"{run.started_at:%Y-%m-%d %H:%M:%S}",
            output.shown(run.operator),
            output.shown(run.file_name) or "our books",
            (run.file_hash or "")[:12],
            _period(run.period_from, run.period_to),
            f"{run.lines:,}",
            f"{run.differences:,}",
            f"{run.faults:,}",
            f"{run.repaired:,}",
        )
        for run in runs
    ]
    headings = (
        "Run",
        "Started (UTC)",
        "By",
        "File",
        "SHA-256",
        "Period (UTC)",
        "Lines",
        "Differences",
        "Faults",
        "Repaired",
    )
    output.console().print(output.table(headings, rows, right=headings[6:]))
    output.note(output.counted(len(runs), "run"))


def difference_writer(write: Callable[[str], object]) -> "Callable[[Difference], None]":
    """Writes differences as CSV, the header at once."""
    from eci_pay.differences import ADVICE, Difference

    names = [each.name for each in fields(Difference)]
    line = io.StringIO()
    writer = csv.writer(line, lineterminator="\n")

    def write_row(values: Iterable[object]) -> None:
        writer.writerow(values)
        write(line.getvalue())
        line.seek(0)
        line.truncate()

    def write_difference(difference: Difference) -> None:
        values = (_cell(getattr(difference, name)) for name in names)
        write_row([*values, ADVICE[difference.line_class]])

    write_row([*("class" if name == "line_class" else name for name in names), "advice"])
    return write_difference


def _cell(value: object) -> object:
    """A value as a spreadsheet may be given it: a text from outside that it would take for a formula is quoted."""
    if isinstance(value, datetime):
        return value.isoformat()
    return f"'{value}" if isinstance(value, str) and value.startswith(_STARTS_A_FORMULA) else value


def _facts(report: "Report") -> Iterable[tuple[str, Any]]:
    seen = report.seen_in_run_id
    return (
        ("File", output.shown(report.file)),
        ("SHA-256", report.file_hash),
        ("Seen before", f"in run {seen}" if seen else None),
        (
            "Period",
            _period(report.period_from, report.period_to) and f"{_period(report.period_from, report.period_to)} UTC",
        ),
        ("Lines", f"{report.lines:,}" if report.file is not None else None),
        ("Payments checked", f"{report.payments:,}"),
        ("Outcomes unknown, within their time", f"{report.open_in_time:,}" if report.open_in_time else None),
        ("By", output.shown(report.operator)),
        ("Took", f"{report.seconds:.1f} s"),
    )


def _print_sums(report: "Report") -> None:
    from eci_pay.differences import ADVICE

    rows = [
        (
            each.line_class.label,
            each.currency,
            f"{each.count:,}",
            _amount(each.gateway_net, each.currency),
            _amount(each.our_net, each.currency),
            _amount(each.difference, each.currency, sign="+"),
        )
        for each in report.sums
    ]
    rows += [
        (
            "All",
            currency,
            f"{count:,}",
            _amount(gateway, currency),
            _amount(ours, currency),
            _amount(gateway - ours, currency, sign="+"),
        )
        for currency, count, gateway, ours in _totals(report)
    ]
    headings = ("Class", "Currency", "Count", "Gateway", "Our books", "Difference")
    output.console().print(output.table(headings, rows, right=headings[2:]))
    for line_class in dict.fromkeys(each.line_class for each in report.sums if each.line_class.is_difference):
        print(f"{line_class.label}: {ADVICE[line_class]}")


def _print_differences(report: "Report") -> None:
    shown = [each for each in report.differences if each.line_class.is_difference][:SHOWN_MAX]
    if not shown:
        return
    rows = [
        (
            str(each.line or ""),
            each.line_class.label,
            each.operation.value,
            str(each.payment_id or ""),
            output.shown(each.gateway_reference or each.our_reference),
            _money(each.gateway_amount, each.gateway_currency),
            _money(each.our_amount, each.our_currency),
            output.shown(each.detail),
        )
        for each in shown
    ]
    headings = ("Line", "Class", "Type", "Payment", "Reference", "Gateway", "Our books", "Detail")
    output.console().print(output.table(headings, rows, right=("Line", "Gateway", "Our books")))
    if report.difference_count > len(shown):
        output.note(
            f"{output.counted(report.difference_count - len(shown), 'more difference')}: --csv FILE has them all"
        )


def _print_faults(report: "Report") -> None:
    from eci_pay.differences import CHECK_ADVICE

    if not report.fault_count:
        return
    shown = report.faults[:SHOWN_MAX]
    rows = [
        (
            each.check.label,
            str(each.payment_id or ""),
            str(each.refund_id or each.message_id or ""),
            output.shown(each.detail),
        )
        for each in shown
    ]
    headings = ("Fault of our books", "Payment", "Refund, message", "Detail")
    output.console().print(output.table(headings, rows))
    if report.fault_count > len(shown):
        output.note(f"{output.counted(report.fault_count - len(shown), 'more fault')}: --json shows more of them")
    for check in report.fault_counts:
        print(f"{check.label}: {CHECK_ADVICE[check]}")


def _totals(report: "Report") -> Iterable[tuple[str, int, Decimal, Decimal]]:
    """Each currency's count and both sides' money; currencies are never added up."""
    for currency in sorted({each.currency for each in report.sums}):
        sums = [each for each in report.sums if each.currency == currency]
        gateway, ours = sum(each.gateway_net for each in sums), sum(each.our_net for each in sums)
        yield currency, sum(each.count for each in sums), Decimal(gateway), Decimal(ours)


def _money(amount: Decimal | None, currency: str | None) -> str:
    return "" if amount is None else f"{_amount(amount, currency)} {currency}"


def _amount(amount: Decimal, currency: str | None, *, sign: str = "") -> str:
    """With as many decimals as the currency has, or more where somebody has written more."""
    from eci_pay.money import whole_amount_currencies

    whole = currency in whole_amount_currencies() and amount == amount.to_integral_value()
    return f"{amount:{sign if amount else ''},.{0 if whole else 2}f}"


def _period(start: datetime | None, end: datetime | None) -> str:
    """As short as it can be: whole days without their midnights."""

    def text(instant: datetime | None) -> str:
        if instant is None:
            return ""
        return f"{instant:%Y-%m-%d}" if f"{instant:%H%M%S%f}" == "000000000000" else f"{instant:%Y-%m-%d %H:%M:%S}"

    return f"{text(start)} to {text(end)}" if start or end else ""


def _document(report: "Report", repairs: "Sequence[Repair]", made: "Sequence[Repaired]") -> dict[str, Any]:
    """The whole report as JSON has it."""
    from eci_pay.differences import ADVICE, CHECK_ADVICE

    lists = ("sums", "days", "differences", "faults", "fault_counts")
    facts = {each.name: _plain(getattr(report, each.name)) for each in fields(report) if each.name not in lists}
    left = {id(each.repair): each for each in made}
    return {
        **facts,
        "clean": report.is_clean,
        "difference_count": report.difference_count,
        "fault_count": report.fault_count,
        "sums": [
            {
                "class": each.line_class.value,
                "currency": each.currency,
                "count": each.count,
                "gateway_net": _plain(each.gateway_net),
                "our_net": _plain(each.our_net),
                "difference": _plain(each.difference),
                "advice": ADVICE[each.line_class],
            }
            for each in report.sums
        ],
        "days": [_members(each) for each in report.days],
        "differences": [_members(each) for each in report.differences],
        "fault_counts": {check.value: count for check, count in report.fault_counts.items()},
        "faults": [{**_members(each), "advice": CHECK_ADVICE[each.check]} for each in report.faults],
        "repairs": [
            {
                "repair": str(repair),
                "findings": repair.findings,
                "repaired": left[id(repair)].findings if id(repair) in left else 0,
                "left": left[id(repair)].left if id(repair) in left else None,
            }
            for repair in repairs
        ],
    }


def _members(row: Any) -> dict[str, Any]:
    return {"class" if name == "line_class" else name: _plain(value) for name, value in asdict(row).items()}


def _plain(value: Any) -> Any:
    """As JSON has it: amounts as numbers, instants as text."""
    if isinstance(value, Decimal):
        return float(value)
    return value.isoformat() if hasattr(value, "isoformat") else value
