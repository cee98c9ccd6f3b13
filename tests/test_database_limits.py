"""The database's own limits: how long a lock is waited for, what is prepared, and on which connections."""

import asyncio

import pytest

from eci_pay.errors import Unavailable
from eci_pay.service import PaymentService
from tests.rows import paid
from tests.support import (
    Books,
    Opener,
    RecordingGateway,
    Sessions,
    charge_request,
    create_request,
    refund_request,
    until,
)


async def test_a_lock_is_waited_for_only_so_long(
    opened: Opener, sessions: Sessions, service: PaymentService, gateway: RecordingGateway
) -> None:
    created = await service.charges.create(request=create_request(1))
    session = await sessions()
    await session.execute("SELECT FROM payments FOR UPDATE")
    async with asyncio.timeout(5), opened(eci_pay_lock_timeout_seconds=0.2) as impatient:
        with pytest.raises(Unavailable):
            await impatient.charges.charge(request=charge_request(1), idempotency_key="k")
        with pytest.raises(Unavailable):
            await impatient.status_changes.cancel(payment_id=created.payment_id)
    assert gateway.charges == []


async def test_a_statement_is_prepared_once_whatever_the_size_of_its_integers(opened: Opener, books: Books) -> None:
    async with opened(eci_pay_database_pool_size=1) as service:
        for restart in (1, 40_000, 2**40):
            await books.rows(f"ALTER TABLE payments ALTER payment_id RESTART WITH {restart}")
            await books.rows(f"ALTER TABLE refunds ALTER refund_id RESTART WITH {restart}")
            await books.rows(f"ALTER TABLE idempotency_keys ALTER id RESTART WITH {restart}")
            for number in range(6):  # psycopg prepares what it has run five times
                order_id = restart + number
                [payment_id] = await paid(service, order_id)
                declined = charge_request(order_id + 200, amount="4000.02")
                await service.charges.charge(request=declined, idempotency_key=f"declined {order_id}")
                await service.refunds.refund(
                    payment_id=payment_id, request=refund_request("1"), idempotency_key=f"refund {order_id}"
                )
                await service.payments.by_order(order_id)
                created = await service.charges.create(request=create_request(order_id + 100))
                await service.status_changes.cancel(payment_id=created.payment_id)
        prepared = await service.database.read_text(
            "SELECT DISTINCT statement, parameter_types::text FROM pg_prepared_statements", {}
        )
    texts = [row["statement"] for row in prepared]
    assert any("INSERT INTO refunds" in text for text in texts)
    assert [text[:60] for text in set(texts) if texts.count(text) > 1] == []


async def test_one_request_after_another_uses_one_connection(opened: Opener) -> None:
    """Its server process is warm, and what a peak has left is idle until it is closed."""
    async with opened(eci_pay_database_pool_size=3) as service:
        read = service.database.read_text

        async def pids(count: int) -> set[int]:
            rows = [await read("SELECT pg_backend_pid() AS pid", {}) for _ in range(count)]
            return {row["pid"] for (row,) in rows}

        async def has_grown() -> bool:
            (row,) = await read(
                "SELECT count(*) AS n FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name = %(name)s",
                {"name": "payment-service"},
            )
            return bool(row["n"] == 3)

        await asyncio.gather(*(read("SELECT 1 FROM pg_sleep(0.1)", {}) for _ in range(20)))
        await until(has_grown)
        await pids(20)  # the last one to be made may come only now
        assert len(await pids(20)) == 1
