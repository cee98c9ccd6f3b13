"""A reconciliation as one HTML page for whoever keeps the books: to read, to print, to keep.

The page needs nothing but itself and runs nothing. What it shows comes from files of outsiders, their names included:
every value goes through `_text`.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from html import escape

from cli.output import duration, printable
from cli.reconcile_chart import CHART_CSS, chart_svg
from eci_pay.differences import (
    ADVICE,
    CHECK_ADVICE,
    BookFault,
    Check,
    ClassSum,
    Difference,
    LineClass,
    Report,
)
from eci_pay.money import whole_amount_currencies

_CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --line: #d0d7de; --paper: #fff; --shade: #f4f6f8;
  --matched: #b7c9dc; --bad: #a40e26; --good: #14602f; }
@media screen and (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --soft: #a3acb7; --line: #3d444d;
  --paper: #14181d; --shade: #1e242b; --matched: #48617c; --bad: #ff7b84; --good: #6fd08c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .2rem; }
p { margin: .3rem 0 .7rem; max-width: 60rem; }
a { color: inherit; }
.verdict { border: 1px solid; border-left-width: .8rem; padding: .7rem 1rem; max-width: none; font-size: 1.15rem; }
.verdict.clean { border-color: var(--good); }
.verdict.not-clean { border-color: var(--bad); border-width: 4px 4px 4px .8rem; }
.verdict strong { display: block; font-size: 1.35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; margin: 1.2rem 0; }
dt, .soft, .more { color: var(--soft); }
dd { margin: 0; }
figure { margin: 1rem 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--ink); vertical-align: bottom; white-space: nowrap; }
.number { text-align: right; white-space: nowrap; overflow-wrap: normal; }
.currency th { background: var(--shade); padding-top: .6rem; }
.total th, .total td { font-weight: bold; border-top: 1px solid var(--ink); border-bottom: 3px double var(--ink); }
.label { overflow-wrap: normal; white-space: nowrap; }
.instant { overflow-wrap: normal; }
.id { min-width: 8.5rem; }
.detail { min-width: 12rem; }
.advice { min-width: 16rem; }
.differences { font-size: .87rem; }
.differences tbody th { font-weight: normal; color: var(--soft); overflow-wrap: normal; }
.status { min-width: 8.7em; }
.differences .one tr:first-child > :not([rowspan]) { border-bottom-style: dotted; }
@media (max-width: 40rem) { body { padding: 1rem; } .label { white-space: normal; } }
@page { margin: 14mm 12mm; }
@page wide { size: landscape; }
@media print {
  body { padding: 0; max-width: none; font-size: 9.5pt; }
  .scroll { overflow: visible; }
  .wide { page: wide; }
  .wide th, .wide td { padding: .15rem .35rem; font-size: 7.5pt; }
  .sums { font-size: 7.5pt; }
  .sums th, .sums td { padding: .15rem .3rem; }
  .id, .detail { min-width: 0; } .advice { min-width: 6.4cm; }
  .id { width: 12%; } .differences .detail { width: 20%; }
  svg { min-width: 0; }
  thead { display: table-header-group; }
  tr, .sums tbody, .one, figure, .verdict { break-inside: avoid; }
  h2, h3, h3 + p { break-after: avoid; }
  a { text-decoration: none; }
  svg, .currency th { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""

_DIFFERENCE_HEADINGS = (
    *("Line", "Operation", "Payment", "Order", "Transaction", "When (UTC)"),
    *("Side", "Reference", "Amount", "Status", "Detail"),
)
_NOTHING = '<span class="soft">–</span>'


def report_html(report: Report) -> Iterator[str]:
    """The page, in pieces: a large one is never held whole."""
    title = f"Reconciliation {report.run_id}, {report.started_at.astimezone(UTC):%Y-%m-%d}"
    yield f"{_HEAD}<title>{title}</title>\n<style>{_CSS}{CHART_CSS}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
    yield _verdict(report)
    yield from _facts(report)
    if report.file is not None:
        yield from _lines(report)
    yield from _books(report)
    yield "</body>\n</html>\n"


def _verdict(report: Report) -> str:
    """What came of it, in words: the band's border says it again."""
    found = _counted(report.fault_count, "fault")
    nothing = "No faults: our books are in order."
    if report.file is not None:
        found = f"{_counted(report.difference_count, 'difference')} and {found}"
        nothing = "No differences and no faults: the file and our books agree."
    if not report.is_clean:
        mended = f", {report.repaired:,} of them repaired" if report.repaired else ""
        kind, head, words = "not-clean", "Not clean", f"{found}{mended}. Somebody has to look into them."
    elif report.repaired:
        kind, head, words = "clean", "Clean", f"{found}, all of them repaired."
    else:
        kind, head, words = "clean", "Clean", nothing
    return f'<p class="verdict {kind}"><strong>{head}</strong> {words}</p>\n'


def _facts(report: Report) -> Iterator[str]:
    """What was compared, by whom and when; what does not apply is left out."""
    with_file = report.file is not None
    took = duration(report.seconds) if report.seconds >= 60 else f"{report.seconds:.1f} s"  # noqa: PLR2004
    period = None
    if report.period_from and report.period_to:
        period = f"{_instant(report.period_from)} to {_instant(report.period_to)} (UTC, the end not included)"
    rows = (
        ("Run", f"{report.run_id}"),
        ("Run by", report.operator),
        ("Started", f"{_instant(report.started_at)} (UTC)"),
        ("Took", took),
        ("File", report.file if with_file else "none: our books were checked by themselves"),
        ("SHA-256", report.file_hash),
        ("Seen before", report.seen_in_run_id and f"in run {report.seen_in_run_id}"),
        ("Period", period),
        ("Payments compared", f"{report.payments:,}"),
        ("Lines compared", f"{report.lines:,}" if with_file else None),
        ("Repaired", f"{report.repaired:,}" if report.repaired else None),
        ("Unknown outcomes", f"{report.open_in_time:,} within their time limit" if report.open_in_time else None),
        *(("Warning", warning) for warning in report.warnings),
    )
    yield "<dl>\n"
    yield from (f"<dt>{name}</dt><dd>{_text(value)}</dd>\n" for name, value in rows if value)
    yield "</dl>\n"


def _lines(report: Report) -> Iterator[str]:
    """Sums, picture and differences of the file's lines."""
    shown: dict[LineClass, list[Difference]] = defaultdict(list)
    for difference in report.differences:
        shown[difference.line_class].append(difference)
    counts: dict[LineClass, int] = defaultdict(int)
    for each in report.sums:
        counts[each.line_class] += each.count
    told = [each for each in LineClass if shown[each] or (each.is_difference and counts[each])]
    told.sort(key=lambda each: not each.is_difference)  # what only waits comes last

    yield from _summary(report.sums, told)
    if report.days:
        yield '<h2>Lines and operations over time</h2>\n<figure><div class="scroll" tabindex="0">'
        yield from chart_svg(report.days)
        yield '</div><figcaption class="soft">The number above a bar is of the different ones. Few among many are '
        yield "drawn higher than their share, to be seen.</figcaption></figure>\n"
    if told:
        yield '<section class="wide">\n<h2>Lines and operations one by one</h2>\n'
        for line_class in told:
            yield from _differences(line_class, shown[line_class], counts[line_class])
        yield "</section>\n"


def _summary(sums: tuple[ClassSum, ...], linked: Sequence[LineClass]) -> Iterator[str]:
    """A line per class in each currency, and a total per currency: money of two currencies is never added up."""
    yield '<h2>Summary</h2>\n<p class="soft">Sums are net, what was charged less what was refunded, each by its own '
    yield "side's word. The difference is what the gateway has more than we do.</p>\n"
    yield _table_head(
        ("Class", "Count", "Gateway", "Our books", "Difference", "What to do"),
        right=("Count", "Gateway", "Our books", "Difference"),
        kind="sums",
    )
    order = list(LineClass)
    for currency in sorted({each.currency for each in sums}):
        own = sorted((s for s in sums if s.currency == currency), key=lambda each: order.index(each.line_class))
        yield f'<tbody>\n<tr class="currency"><th colspan="6" scope="rowgroup">{_text(currency)}</th></tr>\n'
        for each in own:
            label = each.line_class.label
            name = f'<a href="#{each.line_class}">{label}</a>' if each.line_class in linked else label
            yield f'<tr><th scope="row" class="label">{name}</th>{_sum_cells([each], currency)}'
            yield f'<td class="advice">{_text(ADVICE[each.line_class])}</td></tr>\n'
        yield f'<tr class="total"><th scope="row" class="label">Total {_text(currency)}</th>'
        yield f"{_sum_cells(own, currency)}<td></td></tr>\n</tbody>\n"
    yield "</table></div>\n"


def _sum_cells(sums: Sequence[ClassSum], currency: str) -> str:
    """Count, both sides and their difference, of sums in one currency."""
    gateway = sum((each.gateway_net for each in sums), Decimal(0))
    ours = sum((each.our_net for each in sums), Decimal(0))
    return "".join(
        f'<td class="number">{cell}</td>'
        for cell in (
            f"{sum(each.count for each in sums):,}",
            _amount(gateway, currency),
            _amount(ours, currency),
            _amount(gateway - ours, currency, sign="+"),
        )
    )


def _differences(line_class: LineClass, shown: Sequence[Difference], count: int) -> Iterator[str]:
    """The differences of one class, the gateway's word above ours."""
    yield f'<h3 id="{line_class}">{line_class.label}: {count:,}</h3>\n<p class="soft">{_text(ADVICE[line_class])}</p>\n'
    if shown:
        yield _table_head(_DIFFERENCE_HEADINGS, right=("Line", "Payment", "Order", "Amount"), kind="differences")
        yield from map(_difference, shown)
        yield "</table></div>\n"
    yield _more(count - len(shown), ": see the CSV (--csv)")


def _difference(each: Difference) -> str:
    """Two rows that stay together."""
    refund = "" if each.refund_id is None else f" {each.refund_id}"
    shared = (
        ("number", each.line and f"{each.line:,}"),
        ("label", f"{each.operation.value.capitalize()}{refund}"),
        ("number", each.payment_id),
        ("number", each.order_id),
        ("id", each.transaction_id),
        ("instant", _instant(each.at)),
    )
    gateway = _side(each.gateway_reference, each.gateway_amount, each.gateway_currency, each.gateway_status)
    ours = _side(each.our_reference, each.our_amount, each.our_currency, each.our_status)
    return (
        f'<tbody class="one"><tr>{"".join(_cell(kind, value, rows=2) for kind, value in shared)}'
        f'<th scope="row">Gateway</th>{gateway}{_cell("detail", each.detail, rows=2)}</tr>'
        f'<tr><th scope="row">Ours</th>{ours}</tr></tbody>\n'
    )


def _side(reference: str | None, amount: Decimal | None, currency: str | None, status: str | None) -> str:
    """What one side says."""
    money = None if amount is None else f"{_amount(amount, currency or '')} {currency or ''}"
    return _cell("id", reference) + _cell("number", money) + _cell("status", status)


def _books(report: Report) -> Iterator[str]:
    """Faults of our own books."""
    shown: dict[Check, list[BookFault]] = defaultdict(list)
    for fault in report.faults:
        shown[fault.check].append(fault)
    yield "<section>\n<h2>Our own books</h2>\n"
    if not report.fault_count:
        yield "<p>No faults.</p>\n"
    if report.open_in_time:
        yield f"<p>Unknown outcomes within their time limit: {report.open_in_time:,}. They are no faults; wait.</p>\n"
    for check in Check:
        if count := report.fault_counts.get(check, 0):
            yield f'<h3 id="{check}">{check.label}: {count:,}</h3>\n<p class="soft">{_text(CHECK_ADVICE[check])}</p>\n'
            yield from _faults(shown[check])
            yield _more(count - len(shown[check]))
    yield "</section>\n"


def _faults(faults: Sequence[BookFault]) -> Iterator[str]:
    if faults:
        numbers = ("Payment", "Refund", "Message")
        yield _table_head((*numbers, "Detail"), right=numbers, kind="faults")
        yield "<tbody>\n"
        for each in faults:
            ids = "".join(_cell("number", number) for number in (each.payment_id, each.refund_id, each.message_id))
            yield f"<tr>{ids}{_cell('detail', each.detail)}</tr>\n"
        yield "</tbody>\n</table></div>\n"


def _table_head(headings: Iterable[str], *, right: tuple[str, ...], kind: str) -> str:
    """The start of a table that scrolls sideways where it is too wide; with a tab stop, so that keys scroll it too."""
    cells = "".join(
        f'<th scope="col"{" class=number" if heading in right else ""}>{heading}</th>' for heading in headings
    )
    return f'<div class="scroll" tabindex="0"><table class="{kind}">\n<thead><tr>{cells}</tr></thead>\n'


def _cell(kind: str, value: object, *, rows: int = 1) -> str:
    """A cell; a dash where there is nothing."""
    span = f' rowspan="{rows}"' if rows > 1 else ""
    return f'<td class="{kind}"{span}>{_NOTHING if value in (None, "") else _text(value)}</td>'


def _more(left: int, where: str = "") -> str:
    return f'<p class="more">and {left:,} more{where}</p>\n' if left > 0 else ""


def _text(value: object) -> str:
    """Any text, with what would be markup or would hide or turn other text made visible."""
    return escape(printable(str(value)))


def _amount(amount: Decimal, currency: str, *, sign: str = "") -> str:
    """With thousands separated, and the decimals of its currency; more where an outsider wrote more."""
    text = f"{amount:.{0 if currency in whole_amount_currencies() else 2}f}"
    exact = Decimal(text) if Decimal(text) == amount else amount
    return f"{exact:{sign},f}" if exact else f"{abs(exact):,f}"


def _instant(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
