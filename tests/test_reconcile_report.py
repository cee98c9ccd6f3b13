"""The page of a reconciliation: whole, inert, and right to the cent."""

import re
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser

import pytest

from cli.reconcile_chart import BARS_MAX, LABELS_MAX
from cli.reconcile_report import report_html
from eci_pay.differences import (
    ADVICE,
    CHECK_ADVICE,
    BookFault,
    Check,
    ClassSum,
    DaySum,
    Difference,
    LineClass,
    Operation,
    Report,
)

VOID = {"meta", "br", "link", "img", "hr", "input"}
FIRST = date(2026, 10, 1)
AT = datetime(2026, 10, 3, 4, 5, 6, tzinfo=UTC)
MATCHED = ClassSum(
    line_class=LineClass.MATCHED,
    currency="INR",
    count=100_000,
    gateway_net=Decimal("1234567.50"),
    our_net=Decimal("1234567.50"),
)
CLEAN = Report(
    run_id=42,
    operator="maria",
    started_at=datetime(2026, 11, 1, 6, 30, tzinfo=UTC),
    seconds=12.4,
    file="october.csv",
    file_hash="9f86d081" * 8,
    seen_in_run_id=None,
    period_from=datetime(2026, 10, 1, tzinfo=UTC),
    period_to=datetime(2026, 11, 1, tzinfo=UTC),
    payments=99_000,
    lines=100_000,
    sums=(MATCHED,),
    days=(DaySum(day=FIRST, matched=100_000, pending=0, different=0),),
    differences=(),
    fault_counts={},
    faults=(),
    open_in_time=0,
)
MISSING = Difference(
    line_class=LineClass.MISSING_IN_OUR_BOOKS,
    operation=Operation.CHARGE,
    detail="no such reference",
    at=AT,
    line=1234,
    transaction_id="T-1",
    gateway_reference="GW-1",
    gateway_amount=Decimal("1050.00"),
    gateway_currency="INR",
    gateway_status="settled",
)


class Page(HTMLParser):
    """The parsed page; it fails on tags that are not balanced."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.source = "".join(report_html(report))
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self.texts: list[str] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.texts.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())

    def attributes(self, name: str) -> list[str]:
        return [value for _, attributes in self.tags if (value := attributes.get(name))]

    def row(self, first: str, *, after: str = "") -> list[str]:
        """The first row that begins with this cell, once a row has begun with that one."""
        heads = [row[0] for row in self.rows]
        return self.rows[heads.index(first, heads.index(after) if after else 0)]

    def bars(self) -> list[str]:
        """What is told of each bar."""
        return re.findall(r"<g><title>(.*?)</title>", self.source)


def class_sum(line_class: LineClass, currency: str, count: int, gateway: str, ours: str) -> ClassSum:
    return ClassSum(
        line_class=line_class, currency=currency, count=count, gateway_net=Decimal(gateway), our_net=Decimal(ours)
    )


def daily(days: int) -> tuple[DaySum, ...]:
    return tuple(
        DaySum(day=FIRST + timedelta(days=n), matched=1000 + n, pending=n % 2, different=int(n % 7 == 0))
        for n in range(days)
    )


def everything() -> Report:
    """A report with something of each kind."""
    return replace(
        CLEAN,
        sums=(MATCHED, *(class_sum(each, "INR", 3, "10.00", "7.00") for each in LineClass if each.is_difference)),
        differences=tuple(replace(MISSING, line_class=each) for each in LineClass if each is not LineClass.MATCHED),
        days=daily(31),
        fault_counts=dict.fromkeys(Check, 1),
        faults=tuple(BookFault(check=each, detail=f"told of {each}", payment_id=7) for each in Check),
        seen_in_run_id=40,
        open_in_time=5,
    )


def no_file() -> Report:
    return replace(CLEAN, file=None, file_hash=None, period_from=None, period_to=None, lines=0, sums=(), days=())


@pytest.mark.parametrize("report", [CLEAN, everything(), no_file(), replace(CLEAN, days=daily(400))])
def test_page_needs_nothing_but_itself_and_runs_nothing(report: Report) -> None:
    page = Page(report)

    names = {name for _, attributes in page.tags for name in attributes}
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object", "base", "form"}
    assert not {name for name in names if name.startswith("on")} | (names & {"src", "style"})
    assert all(link.startswith("#") for link in page.attributes("href"))
    assert re.findall(r"url\((?!#)", page.source) == []
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in page.attributes("content")
    assert "en" in page.attributes("lang")


def test_every_link_leads_to_a_place_of_the_page_and_every_place_has_one_name() -> None:
    page = Page(everything())

    places = page.attributes("id")
    assert len(places) == len(set(places))
    assert {link.removeprefix("#") for link in page.attributes("href")} == {
        each for each in LineClass if each.is_difference
    }
    assert {link.removeprefix("#") for link in page.attributes("href")} <= set(places)


@pytest.mark.parametrize(
    ("hostile", "seen"),
    [
        ("<script>alert(1)</script>", "<script>alert(1)</script>"),
        ('"onload=alert(1) x="', '"onload=alert(1) x="'),
        ("'><b>&amp;", "'><b>&amp;"),
        ("a\x00\x1b[31m\x7fb", "a\ufffd\ufffd[31m\ufffdb"),
        ("abc\u202efdp.exe\u200f", "abc\ufffdfdp.exe\ufffd"),
        ("lone \udcff byte", "lone \ufffd byte"),
        ("x" * 5000, "x" * 5000),
    ],
)
def test_text_from_outside_is_shown_and_never_obeyed(hostile: str, seen: str) -> None:
    difference = replace(
        MISSING,
        detail=hostile,
        transaction_id=hostile,
        gateway_reference=hostile,
        our_reference=hostile,
        gateway_currency=hostile,
        gateway_status=hostile,
        our_status=hostile,
    )
    fault = BookFault(check=Check.PAID_TWICE, detail=hostile)
    page = Page(
        replace(
            CLEAN,
            file=hostile,
            operator=hostile,
            file_hash=hostile,
            sums=(class_sum(LineClass.MISSING_IN_OUR_BOOKS, hostile, 1, "1", "0"),),
            differences=(difference,),
            faults=(fault,),
            fault_counts={Check.PAID_TWICE: 1},
        )
    )

    assert "".join(page.texts).count(seen) >= 13
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert page.attributes("onload") == []
    page.source.encode()


def test_sums_add_up_per_currency_and_differences_bear_their_sign() -> None:
    page = Page(
        replace(
            CLEAN,
            sums=(
                class_sum(LineClass.MISSING_IN_OUR_BOOKS, "USD", 1, "20.25", "0"),
                MATCHED,
                class_sum(LineClass.AMOUNT_UNDER, "INR", 2, "900.00", "2100.10"),
                class_sum(LineClass.AMOUNT_OVER, "INR", 1, "1500.00", "1000.00"),
                class_sum(LineClass.AMOUNT_OVER, "JPY", 1, "150000", "150000.5"),
                class_sum(LineClass.REFUND_MISSING_IN_OUR_BOOKS, "USD", 1, "-0.00", "0"),
            ),
        )
    )

    assert page.row("Matched")[1:5] == ["100,000", "1,234,567.50", "1,234,567.50", "0.00"]
    assert page.row("Amount over")[1:5] == ["1", "1,500.00", "1,000.00", "+500.00"]
    assert page.row("Amount under")[1:] == ["2", "900.00", "2,100.10", "-1,200.10", ADVICE[LineClass.AMOUNT_UNDER]]
    assert page.row("Total INR")[1:5] == ["100,003", "1,236,967.50", "1,237,667.60", "-700.10"]
    assert page.row("Amount over", after="JPY")[1:5] == ["1", "150,000", "150,000.5", "-0.5"]
    assert page.row("Refund missing in our books")[1:5] == ["1", "0.00", "0.00", "0.00"]
    assert page.row("Total USD")[1:5] == ["2", "20.25", "0.00", "+20.25"]
    assert "5 differences and 0 faults" not in page.text
    assert "6 differences and 0 faults" in page.text


def test_difference_shows_the_word_of_both_sides() -> None:
    both = replace(
        MISSING,
        line_class=LineClass.AMOUNT_UNDER,
        operation=Operation.REFUND,
        payment_id=11,
        order_id=12,
        refund_id=13,
        our_reference="OUR-1",
        our_amount=Decimal(1250),
        our_currency="JPY",
        our_status="COMPLETED",
    )
    page = Page(replace(CLEAN, sums=(class_sum(LineClass.AMOUNT_UNDER, "INR", 1, "1", "2"),), differences=(both,)))

    shared = ["1,234", "Refund 13", "11", "12", "T-1", "2026-10-03 04:05:06"]
    assert page.row("1,234") == [*shared, "Gateway", "GW-1", "1,050.00 INR", "settled", "no such reference"]
    assert page.row("Ours") == ["Ours", "OUR-1", "1,250 JPY", "COMPLETED"]


def test_side_that_knows_nothing_has_dashes() -> None:
    page = Page(replace(CLEAN, differences=(MISSING,)))

    assert page.row("Ours") == ["Ours", "–", "–", "–"]


def test_what_is_not_shown_is_counted() -> None:
    page = Page(
        replace(
            CLEAN,
            sums=(
                class_sum(LineClass.MISSING_IN_OUR_BOOKS, "INR", 12_000, "1", "0"),
                class_sum(LineClass.MISSING_IN_OUR_BOOKS, "USD", 347, "1", "0"),
            ),
            differences=(MISSING, MISSING),
            fault_counts={Check.MESSAGE_DEAD: 1400},
            faults=(BookFault(check=Check.MESSAGE_DEAD, detail="dead", message_id=5),),
        )
    )

    assert "Missing in our books: 12,347" in page.text
    assert "and 12,345 more: see the CSV (--csv)" in page.text
    assert "Message dead: 1,400" in page.text
    assert "and 1,399 more" in page.text
    assert "12,347 differences and 1,400 faults. Somebody has to look into them." in page.text


def test_clean_run_says_so_and_lists_nothing() -> None:
    page = Page(CLEAN)

    assert "Clean No differences and no faults: the file and our books agree." in page.text
    assert "one by one" not in page.text
    assert "more" not in page.text.replace("more than we do", "")
    assert "No faults." in page.text


def test_repaired_run_is_clean_and_says_what_was_found() -> None:
    dead = {Check.MESSAGE_DEAD: 1}

    assert (
        "Clean 0 differences and 1 fault, all of them repaired."
        in Page(replace(CLEAN, fault_counts=dead, repaired=1)).text
    )


def test_what_only_waits_is_told_last() -> None:
    waiting = replace(MISSING, line_class=LineClass.PENDING)
    page = Page(replace(CLEAN, differences=(waiting, MISSING)))

    assert page.source.index('id="missing_in_our_books"') < page.source.index('id="pending"')


def test_facts_of_the_run_are_told() -> None:
    text = Page(replace(everything(), seconds=125.0, warnings=("the period is <not> over",))).text

    assert "Run42" in text
    assert "Warningthe period is <not> over" in text
    assert "maria" in text
    assert "in run 40" in text
    assert "2m 5s" in text
    assert "9f86d081" * 8 in text
    assert "2026-10-01 00:00:00 to 2026-11-01 00:00:00 (UTC, the end not included)" in text
    assert "99,000" in text
    assert "Unknown outcomes within their time limit: 5." in text


def test_faults_stand_under_their_check_with_what_to_do() -> None:
    page = Page(everything())

    for check in Check:
        assert ["7", "–", "–", f"told of {check}"] in page.rows
        assert CHECK_ADVICE[check] in page.text


def test_without_a_file_nothing_is_said_of_lines() -> None:
    page = Page(no_file())

    assert "Clean No faults: our books are in order." in page.text
    assert "none: our books were checked by themselves" in page.text
    for left_out in ("Lines compared", "SHA-256", "Period", "Summary", "over time"):
        assert left_out not in page.text
    assert "svg" not in {tag for tag, _ in page.tags}


def test_one_difference_among_a_hundred_thousand_is_seen() -> None:
    day = DaySum(day=FIRST, matched=100_000, pending=0, different=1)
    page = Page(replace(CLEAN, days=(day,)))

    drawn = [attributes for tag, attributes in page.tags if tag == "rect" and attributes.get("class") == "different"]
    assert float(drawn[-1]["height"] or 0) >= 4
    assert re.search(r'class="number">1</text>', page.source)
    assert page.bars() == ["2026-10-01: 100,000 matched, 0 pending, 1 different"]


@pytest.mark.parametrize(
    ("days", "unit", "bars"),
    [(1, "day", 1), (31, "day", 31), (200, "week", 29), (400, "month", 14), (4000, "year", 12)],
)
def test_longer_times_are_drawn_by_longer_units_and_lose_nothing(days: int, unit: str, bars: int) -> None:
    page = Page(replace(CLEAN, days=daily(days)))

    numbers = [[int(n.replace(",", "")) for n in re.findall(r" ([\d,]+) [mpd]", bar)] for bar in page.bars()]
    expected = [sum(getattr(day, name) for day in daily(days)) for name in ("matched", "pending", "different")]
    assert f"Lines and operations per {unit} (UTC)" in page.source
    assert len(numbers) == bars <= BARS_MAX
    assert [sum(column) for column in zip(*numbers, strict=True)] == expected


@pytest.mark.parametrize("days", [1, 2, 31, 40, 41, 280, 281, 400, 4000])
def test_picture_stays_within_its_frame_and_its_labels_apart(days: int) -> None:
    page = Page(replace(CLEAN, days=daily(days)))

    for tag, attributes in page.tags:
        if tag in ("rect", "text") and "x" in attributes:
            assert 0 <= float(attributes["x"] or -1) <= 960
            assert 0 <= float(attributes["y"] or -1) <= 330
    labels = [attributes for tag, attributes in page.tags if tag == "text" and attributes["y"] == "289.0"]
    assert 1 <= len(labels) <= LABELS_MAX


def test_days_of_all_ages_do_not_swell_the_picture() -> None:
    ends = (
        DaySum(day=date.min, matched=1, pending=0, different=0),
        DaySum(day=date.max, matched=0, pending=0, different=1),
    )
    page = Page(replace(CLEAN, days=ends))

    assert len(page.bars()) == 2
    assert len(page.source) < 20_000


def test_page_comes_in_small_pieces() -> None:
    one, many = (max(map(len, report_html(replace(CLEAN, differences=(MISSING,) * n)))) for n in (1, 1000))

    assert one == many < 8000
