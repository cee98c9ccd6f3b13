"""Settlement files for tests: what a gateway would tell of our books, and lines to differ."""

import io
from collections.abc import Iterable
from datetime import datetime
from typing import Any

from eci_pay.differences import Report
from eci_pay.reconciliation import Job, Watch
from eci_pay.repairs import Repair
from eci_pay.service import PaymentService
from eci_pay.settlement_file import COLUMNS
from eci_pay.table_files import TableFile
from tests.support import Books, ManualClock

Line = dict[str, Any]

TRUE_LINES = """
SELECT authorization_code AS gateway_reference, transaction_id, 'charge' AS type, amount, currency, 0 AS fee,
       'settled' AS status, captured_at AS settled_at
FROM payments WHERE captured_at IS NOT NULL
UNION ALL
SELECT f.gateway_reference, transaction_id, 'refund', f.amount, currency, 0, 'settled', f.completed_at
FROM refunds f JOIN payments USING (payment_id) WHERE f.status = 'COMPLETED' AND captured_at IS NOT NULL
ORDER BY settled_at, transaction_id
"""


async def true_lines(books: Books) -> list[Line]:
    """What a gateway tells that has done exactly what our books say."""
    return await books.rows(TRUE_LINES)


def line(transaction_id: str, reference: str, **fields: object) -> Line:
    """A line about something."""
    return {
        "gateway_reference": reference,
        "transaction_id": transaction_id,
        "type": "charge",
        "amount": "100.00",
        "currency": "INR",
        "fee": "2.00",
        "status": "settled",
        "settled_at": ManualClock().now,
        **fields,
    }


def csv_text(lines: Iterable[Line]) -> str:
    """Lines as the file has them."""

    def text(value: object) -> str:
        return value.isoformat() if isinstance(value, datetime) else str(value)

    rows = [",".join(text(each[name]) for name in COLUMNS) for each in lines]
    return "\n".join([",".join(COLUMNS), *rows, ""])


def settlement(lines: Iterable[Line], name: str = "settlement.csv") -> TableFile:
    """A file of lines."""
    return TableFile(io.BytesIO(csv_text(lines).encode()), name)


async def reconciled(
    service: PaymentService, lines: Iterable[Line] | None = None, **period: datetime
) -> tuple[Report, list[Repair]]:
    """One run, with a file of lines or without one."""
    file = None if lines is None else settlement(lines)
    return await service.reconciliation.run(Job(operator="olga", file=file, **period), Watch())


def classes(report: Report) -> list[tuple[int | None, str]]:
    """The line and the class of whatever is not matched."""
    return [(each.line, each.line_class.value) for each in report.differences]


def counts(report: Report) -> dict[str, int]:
    """How many lines and operations are in each class."""
    found: dict[str, int] = {}
    for each in report.sums:
        found[each.line_class.value] = found.get(each.line_class.value, 0) + each.count
    return found
