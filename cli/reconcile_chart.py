"""A picture of a reconciliation's days: stacked bars of what is matched, pending and different, as inline SVG."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import count

from eci_pay.differences import DaySum

BARS_MAX = 40
"""The most bars side by side; longer times are drawn by week, month or year."""

LABELS_MAX = 14
WIDTH, HEIGHT = 960, 330
LEFT, RIGHT, BASE = 78, 950, 272
LEGEND_HEIGHT = 34
SEGMENT_HEIGHT_MIN = 4
BAR_WIDTH_MAX, PITCH_MAX = 48, 120
DIGIT_WIDTH = 7

CHART_CSS = """
svg { display: block; width: 100%; min-width: 42rem; height: auto; font-size: 12px; }
svg text { fill: var(--ink); font-variant-numeric: tabular-nums; }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--ink); }
svg .matched { fill: var(--matched); stroke: var(--ink); stroke-width: .5; }
svg .pending { fill: url(#hatched); stroke: var(--ink); stroke-width: .5; }
svg .different { fill: var(--bad); stroke: var(--bad); stroke-width: .5; }
svg .number { font-weight: bold; }
#hatched rect { fill: var(--paper); }
#hatched path { stroke: var(--ink); stroke-width: 1.5; }
"""

_HATCHED = (
    '<defs><pattern id="hatched" width="5" height="5" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="5" height="5"/><path d="M0 0V5"/></pattern></defs>'
)


@dataclass(frozen=True, slots=True)
class _Unit:
    """What one bar stands for; units are numbered without gaps."""

    name: str
    number: Callable[[date], int]
    first_day: Callable[[int], date]
    label: str


_UNITS = (
    _Unit("day", date.toordinal, date.fromordinal, "%d %b"),
    # The first day of the calendar is a Monday.
    _Unit("week", lambda day: (day.toordinal() - 1) // 7, lambda number: date.fromordinal(number * 7 + 1), "%d %b"),
    _Unit(
        "month",
        lambda day: day.year * 12 + day.month - 1,
        lambda number: date(number // 12, number % 12 + 1, 1),
        "%b %Y",
    ),
    _Unit("year", lambda day: day.year, lambda number: date(number, 1, 1), "%Y"),
)


def chart_svg(days: Sequence[DaySum]) -> Iterator[str]:
    """The picture of at least one day, in pieces."""
    first, last = min(each.day for each in days), max(each.day for each in days)
    unit = next((u for u in _UNITS if u.number(last) - u.number(first) < BARS_MAX), _UNITS[-1])
    bars = _grouped(days, unit)
    units = range(unit.number(first), unit.number(last) + 1)
    pitch = min(PITCH_MAX, (RIGHT - LEFT) / len(units))
    digits = max(len(f"{bar.different:,}") for bar in bars)
    upright = digits * DIGIT_WIDTH > max(pitch, DIGIT_WIDTH * 2)
    ceiling = LEGEND_HEIGHT + 2 * SEGMENT_HEIGHT_MIN + (digits * DIGIT_WIDTH + 10 if upright else 20)
    highest = max(1, *(bar.matched + bar.pending + bar.different for bar in bars))
    scale = (BASE - ceiling) / highest

    yield f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="chart-title chart-desc">'
    yield f'<title id="chart-title">Lines and operations per {unit.name} (UTC)</title>'
    yield f'<desc id="chart-desc">{_described(bars, unit, first, last)}</desc>{_HATCHED}'
    yield from _legend(days)
    yield from _value_axis(highest, scale)
    for bar in bars:
        centre = LEFT + (unit.number(bar.day) - units.start + 0.5) * pitch
        yield from _bar(bar, centre, min(BAR_WIDTH_MAX, pitch * 0.76), scale, upright=upright)
    for number in units[:: -(-len(units) // LABELS_MAX)]:
        yield _text(LEFT + (number - units.start + 0.5) * pitch, BASE + 17, f"{unit.first_day(number):{unit.label}}")
    yield f'<path class="axis" d="M{LEFT} {BASE}H{RIGHT}"/>'
    starting = {"week": "Week that begins on Monday, "}.get(unit.name, unit.name.capitalize() + ", ")
    yield _text((LEFT + RIGHT) / 2, BASE + 42, f"{starting}{first} to {last} (UTC)")
    yield "</svg>\n"


def _grouped(days: Sequence[DaySum], unit: _Unit) -> list[DaySum]:
    """A sum per unit that has any, under its first day."""
    sums: dict[int, tuple[int, int, int]] = {}
    for each in days:
        matched, pending, different = sums.get(unit.number(each.day), (0, 0, 0))
        sums[unit.number(each.day)] = matched + each.matched, pending + each.pending, different + each.different
    return [
        DaySum(day=unit.first_day(number), matched=matched, pending=pending, different=different)
        for number, (matched, pending, different) in sorted(sums.items())
    ]


def _described(bars: Sequence[DaySum], unit: _Unit, first: date, last: date) -> str:
    worst = max(bars, key=lambda bar: bar.different)
    different = sum(bar.different for bar in bars)
    most = f" Most of them, {worst.different:,}, in the {unit.name} from {worst.day}." if different else ""
    return (
        f"From {first} to {last}: {sum(bar.matched for bar in bars):,} matched, "
        f"{sum(bar.pending for bar in bars):,} pending, {different:,} different.{most}"
    )


def _legend(days: Sequence[DaySum]) -> Iterator[str]:
    for place, name in enumerate(("matched", "pending", "different")):
        left = LEFT + place * 200
        total = sum(getattr(each, name) for each in days)
        yield f'<rect class="{name}" x="{left}" y="4" width="14" height="14"/>'
        yield _text(left + 21, 15.5, f"{name.capitalize()}: {total:,}", anchor="start")


def _value_axis(highest: int, scale: float) -> Iterator[str]:
    """Lines across at round numbers, five at most above zero."""
    step = next(m * 10**power for power in count() for m in (1, 2, 5) if highest <= 5 * m * 10**power)
    for value in range(0, highest + 1, step):
        height = BASE - value * scale
        yield f'<path class="grid" d="M{LEFT} {height:.1f}H{RIGHT}"/>'
        yield _text(LEFT - 8, height + 4, f"{value:,}", anchor="end")


def _bar(bar: DaySum, centre: float, width: float, scale: float, *, upright: bool) -> Iterator[str]:
    """A bar with the number of differences above it. One difference among a hundred thousand is less than a pixel:
    so that it is seen, nothing is drawn lower than `SEGMENT_HEIGHT_MIN`."""
    yield f"<g><title>{bar.day}: {bar.matched:,} matched, {bar.pending:,} pending, {bar.different:,} different</title>"
    top = float(BASE)
    for name, lines in (("matched", bar.matched), ("pending", bar.pending), ("different", bar.different)):
        if lines:
            height = max(SEGMENT_HEIGHT_MIN, lines * scale)
            top -= height
            yield (
                f'<rect class="{name}" x="{centre - width / 2:.1f}" y="{top:.1f}" '
                f'width="{width:.1f}" height="{height:.1f}"/>'
            )
    if bar.different and upright:
        turned = f' class="number" transform="rotate(-90 {centre + 4:.1f} {top - 5:.1f})"'
        yield _text(centre + 4, top - 5, f"{bar.different:,}", anchor="start", more=turned)
    elif bar.different:
        yield _text(centre, top - 5, f"{bar.different:,}", more=' class="number"')
    yield "</g>"


def _text(x: float, y: float, text: str, *, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{text}</text>'
