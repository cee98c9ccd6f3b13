"""Reads of payments: by id, by order, by transaction, and filtered pages."""

from collections.abc import Mapping, Sequence
from typing import Any

from eci_pay.context import know
from eci_pay.database import Connection, Database, Row, fetch
from eci_pay.errors import PaymentNotFound
from eci_pay.group_commit import GroupCommit
from eci_pay.requests import TRANSACTION_ID_LENGTH_MAX, ListRequest
from eci_pay.views import PaymentPage, PaymentView

TOTAL_MAX = 10_000
"""How far a list counts: beyond, its total is this and not exact."""


class Payments:
    """Every method raises PaymentNotFound where one payment is asked for, and Unavailable."""

    def __init__(self, database: Database, read_payment: GroupCommit[int, Row | None]) -> None:
        self._database = database
        self._read_payment = read_payment

    async def by_id(self, payment_id: int | None) -> PaymentView:
        """The payment with this id; None is the id of no payment."""
        row = None if payment_id is None else await self._read_payment(payment_id)
        if row is None:
            raise PaymentNotFound(
                "there is no payment with this id" if payment_id is None else f"there is no payment {payment_id}"
            )
        know(payment_id=row["payment_id"], order_id=row["order_id"])
        return PaymentView.of_row(row)

    async def with_begin_id(self, payment_id: int) -> tuple[PaymentView, str | None]:
        """The payment and the `begin_id` of its latest attempt, in one snapshot."""
        row = await self._read_payment(payment_id)
        assert row is not None, "payments are never deleted"
        return PaymentView.of_row(row), row["begin_id"]

    async def by_order(self, order_id: int | None) -> PaymentView:
        """The one payment of an order."""
        found = await self._located("payment_id_of_order", {"order_id": order_id})
        if found is None:
            raise PaymentNotFound("no order has this id" if order_id is None else f"order {order_id} has no payment")
        return await self.by_id(found)

    async def by_transaction(self, transaction_id: str) -> PaymentView:
        """The payment with this `transaction_id`."""
        possible = transaction_id.isascii() and len(transaction_id) <= TRANSACTION_ID_LENGTH_MAX
        found = None
        if possible and "\0" not in transaction_id:
            found = await self._located("payment_id_of_transaction", {"transaction_id": transaction_id})
        if found is None:
            raise PaymentNotFound("there is no payment with this transaction_id")
        return await self.by_id(found)

    async def actors(self, payment_id: int) -> dict[int, str]:
        """Who made the changes of a payment, by `transaction_log_id`, as far as that is known. For operators: callers
        are not told of each other."""
        rows = await self._database.read("audit_actors", {"payment_id": payment_id})
        return {row["transaction_log_id"]: row["actor"] for row in rows}

    async def page(self, request: ListRequest) -> PaymentPage:
        """One page of payments, newest first, without their histories."""
        from eci_pay.listing import count_statement, page_statement

        counted = await self._database.read_text(*count_statement(request, TOTAL_MAX + 1))
        found = await self._database.read_text(*page_statement(request))
        views = tuple(PaymentView.of_row(row) for row in found[: request.page_size])
        total = int(counted[0]["total"])
        return PaymentPage(
            total=min(total, TOTAL_MAX),
            total_is_exact=total <= TOTAL_MAX,
            page=None if request.cursor is not None else request.page or 1,
            page_size=request.page_size,
            payments=views,
            next_cursor=str(views[-1].payment_id) if len(found) > request.page_size else None,
        )

    async def _located(self, name: str, params: Mapping[str, Any]) -> int | None:
        rows = await self._database.read(name, params)
        return int(rows[0]["payment_id"]) if rows else None


async def read_payments(database: Database, payment_ids: Sequence[int], _patient: bool = True) -> list[Row | None]:
    """The rows of `payments_by_id.sql`, in the order of their ids; None where there is no such payment. Locks do not
    keep it waiting, whatever its patience."""
    rows = await database.read("payments_by_id", _ids(*payment_ids))
    by_id = {row["payment_id"]: row for row in rows}
    return [by_id.get(payment_id) for payment_id in payment_ids]


async def views_of(connection: Connection, payment_ids: list[int]) -> dict[int, PaymentView]:
    """Payments as they stand inside the transaction of the connection."""
    rows = await fetch(connection, "payments_by_id", _ids(*payment_ids))
    return {row["payment_id"]: PaymentView.of_row(row) for row in rows}


def _ids(*payment_ids: int) -> dict[str, list[int]]:
    return {"payment_id": list(payment_ids)}
