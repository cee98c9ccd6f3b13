"""The settlement file of the simulated gateway, which keeps no books: of each operation that it was asked for by ours,
its lookup tells what it has done. With it, a whole reconciliation can be tried."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import ROUND_HALF_EVEN, Decimal

from eci_pay.charge_settling import charge_key
from eci_pay.database import Connection, Database, Row
from eci_pay.differences import Operation
from eci_pay.errors import InvalidRequest
from eci_pay.gateway_calls import GatewayCalls
from eci_pay.gateways import Approved, GatewayCharge, GatewayRefund
from eci_pay.money import CENT, whole_amount_currencies
from eci_pay.refund_settling import refund_key
from eci_pay.settlement_file import (
    YEAR_MAX,
    YEAR_MIN,
    SettlementLine,
    SettlementStatus,
    settlement_header,
    settlement_text,
)
from eci_pay.statements import statement
from eci_pay.table_files import FileFormat

SIMULATED = "simulated"
FEE_RATE = Decimal("0.02")
"""What the simulated gateway takes of a charge; a refund is free."""
FETCHED_AT_ONCE = 2_000


@dataclass(kw_only=True, slots=True)
class SettlementSum:
    """What the lines of one currency come to, in major units."""

    charged: Decimal = Decimal(0)
    refunded: Decimal = Decimal(0)
    fees: Decimal = Decimal(0)


@dataclass(kw_only=True, slots=True)
class Exported:
    """What was written; sums by currency."""

    lines: int = 0
    sums: dict[str, SettlementSum] = field(default_factory=dict)

    def add(self, line: SettlementLine) -> None:
        """Counts a line."""
        self.lines += 1
        of_currency = self.sums.setdefault(line.currency, SettlementSum())
        if line.type is Operation.CHARGE:
            of_currency.charged += line.amount
        else:
            of_currency.refunded += line.amount
        of_currency.fees += line.fee or 0


@dataclass(frozen=True, kw_only=True, slots=True)
class SettlementExport:
    """`gateway_name` is the configured one's."""

    database: Database
    gateway: GatewayCalls
    gateway_name: str

    async def export(self, day: date, file_format: FileFormat, write: Callable[[str], object]) -> Exported:
        """Writes what is settled on a day, in UTC, in the order of its instants.

        Raises InvalidRequest where the gateway is a real one, and Unavailable.
        """
        if self.gateway_name != SIMULATED:
            raise InvalidRequest(
                f"only the simulated gateway's settlement file is made here; your gateway is {self.gateway_name}: "
                "ask it for its settlement file"
            )
        if not YEAR_MIN <= day.year <= YEAR_MAX:
            raise InvalidRequest(f"{day}: is not in the years {YEAR_MIN} to {YEAR_MAX}")
        exported = Exported()
        begin = datetime.combine(day, time.min, UTC)
        params = {"day_begin": begin, "day_end": begin + timedelta(days=1)}
        first_line = 1 if file_format is FileFormat.JSONL else 2

        async def work(connection: Connection) -> None:
            # A cursor shows all of them as they were at one moment, and holds few at a time.
            async with connection.cursor("operations") as cursor:
                cursor.itersize = FETCHED_AT_ONCE
                await cursor.execute(statement("settlement_operations"), params)
                async for row in cursor:
                    reference = row["reference"] or await self._approved(row)
                    if reference is not None:
                        line = _line(row, reference, first_line + exported.lines)
                        exported.add(line)
                        write(settlement_text(line, file_format))

        write(settlement_header(file_format))
        await self.database.long_transaction(work)
        return exported

    async def _approved(self, row: Row) -> str | None:
        """The gateway's name of what it has done; None where it has done nothing."""
        outcome = await self.gateway.look_up(_operation(row))
        return outcome.reference if isinstance(outcome, Approved) else None


def _operation(row: Row) -> GatewayCharge | GatewayRefund:
    of_charge = charge_key(row["transaction_id"], row["attempt"])
    if row["refund_id"] is None:
        return GatewayCharge(
            key=of_charge,
            amount=row["amount"],
            currency=row["currency"],
            payment_method=row["payment_method"],
            begun_at=row["at"],
        )
    return GatewayRefund(
        key=refund_key(row["transaction_id"], row["refund_id"]),
        charge_key=of_charge,
        charge_reference=row["authorization_code"] or "",
        amount=row["amount"],
        currency=row["currency"],
        payment_method=row["payment_method"],
    )


def _line(row: Row, reference: str, number: int) -> SettlementLine:
    operation = Operation(row["type"])
    return SettlementLine(
        line=number,
        gateway_reference=reference,
        transaction_id=row["transaction_id"],
        type=operation,
        amount=row["amount"],
        currency=row["currency"],
        fee=fee_of(row["amount"], row["currency"]) if operation is Operation.CHARGE else Decimal(0),
        status=SettlementStatus.SETTLED,
        settled_at=row["at"].astimezone(UTC),
    )


def fee_of(amount: Decimal, currency: str) -> Decimal:
    """What the simulated gateway takes of a charge, rounded half to even to what its amounts may be."""
    unit = Decimal(1) if currency in whole_amount_currencies() else CENT
    return (amount * FEE_RATE).quantize(unit, rounding=ROUND_HALF_EVEN)
