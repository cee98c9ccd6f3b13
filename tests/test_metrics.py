"""`/metrics`: what an operator's Prometheus sees."""

import asyncio
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psycopg
import pytest

from eci_pay import metrics, outbox
from eci_pay.payments import Payments
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from server.run import MULTIPROCESS_DIRECTORY
from tests.http_server import client_of, opening
from tests.support import Books, CommandLine, ManualClock, charge_request, refund_request, until
from tests.test_serving import charge, serving

UNKNOWN_AMOUNT = "4000.09"


async def scraped(api: httpx.AsyncClient) -> dict[str, float]:
    """The samples by name and labels."""
    response = await api.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


async def test_what_is_unknown_for_too_long_shows(
    api: httpx.AsyncClient, service: PaymentService, books: Books, clock: ManualClock
) -> None:
    assert (await scraped(api))["eci_pay_recovery_overdue"] == 0
    clock.now = await books.value("SELECT now()")
    await service.charges.charge(request=charge_request(amount=UNKNOWN_AMOUNT), idempotency_key="k")
    clock.advance(seconds=60)
    await service.recovery.run_once()
    found = await scraped(api)
    assert (found['eci_pay_recovery_unsettled{state="open"}'], found["eci_pay_recovery_overdue"]) == (1, 0)
    await books.rows("UPDATE recoveries SET found_at = now() - interval '901 seconds'")
    found = await scraped(api)
    assert (found["eci_pay_recovery_overdue"], found["eci_pay_recovery_oldest_seconds"] > 900) == (1, True)


async def test_refused_events_are_counted(api: httpx.AsyncClient) -> None:
    before = (await scraped(api))["eci_pay_gateway_events_refused_total"]
    for _ in range(2):
        refused = await api.post("/v1/gateway/events", content=b"{}", headers={"Stripe-Signature": "t=1,v1=00"})
        assert (refused.status_code, refused.json()["code"]) == (400, "event-refused")
    assert (await scraped(api))["eci_pay_gateway_events_refused_total"] == before + 2


async def changed(api: httpx.AsyncClient, before: dict[str, float]) -> dict[str, float]:
    """What is more, or less, than it was."""
    return {
        name: value - before.get(name, 0) for name, value in (await scraped(api)).items() if value != before.get(name)
    }


async def test_the_platforms_names_are_there_and_true(api: httpx.AsyncClient, service: PaymentService) -> None:
    first = await service.charges.charge(request=charge_request(1, amount="100.00"), idempotency_key="1")
    await service.refunds.refund(payment_id=first.payment_id, request=refund_request("30.50"))
    dollars = charge_request(2, amount="9.99", currency="USD", payment_method="UPI")
    await service.charges.charge(request=dollars, idempotency_key="2")
    await service.charges.charge(request=charge_request(3, amount="4000.02"), idempotency_key="3")
    found = await scraped(api)
    assert {name: value for name, value in found.items() if not name.startswith(("eci_pay_", "payments_by_"))} == {
        "payments_created_total": 3,
        "payments_failed_total": 1,
        "total_amount_processed": pytest.approx(109.99),
        "total_refunds": 30.5,
        "refunds_processed_total": 1,
        "payment_processing_errors": 0,
    }
    by = {name: value for name, value in found.items() if name.startswith("payments_by_") and value}
    assert by == {
        'payments_by_status{status="COMPLETED"}': 2,
        'payments_by_status{status="FAILED"}': 1,
        'payments_by_method{method="CREDIT_CARD"}': 2,
        'payments_by_method{method="UPI"}': 1,
    }
    amounts = {name: value for name, value in found.items() if "_amount_total" in name}
    assert amounts == {
        'eci_pay_completed_amount_total{currency="INR"}': 100,
        'eci_pay_completed_amount_total{currency="USD"}': 9.99,
        'eci_pay_refunded_amount_total{currency="INR"}': 30.5,
    }


async def test_requests_the_gateway_batches_and_replays_are_measured(api: httpx.AsyncClient) -> None:
    before = await scraped(api)
    assert [(await charge(api)).status_code for _ in range(2)] == [201, 201]
    assert (await api.get("/v1/payments/99")).status_code == 404
    assert (await api.get("/v1/payments/7/anything/made/up")).status_code == 404
    assert (await api.request("PURGE", "/health")).status_code == 405
    more = await changed(api, before)
    route = 'eci_pay_http_request_duration_seconds_count{method="%s",route="%s",status="%d"}'
    assert more[route % ("POST", "/v1/payments/charge", 201)] == 2
    assert more[route % ("GET", "/v1/payments/{payment_id}", 404)] == 1
    assert (more[route % ("other", "other", 404)], more[route % ("other", "other", 405)]) == (1, 1)
    assert more['eci_pay_gateway_request_duration_seconds_count{operation="charge",outcome="approved"}'] == 1
    assert more["eci_pay_idempotent_replays_total"] == 1
    assert more['eci_pay_group_commit_batch_rows_sum{kind="charge_settle"}'] == 1
    found = await scraped(api)
    assert found['eci_pay_database_connections{state="idle"}'] >= 1
    assert found['eci_pay_group_commit_waiting_rows{kind="charge_begin"}'] == 0
    assert [name for name in found if name.startswith("eci_pay_build_info{version=")]


async def test_what_the_gateway_has_not_yet_answered_is_told_as_nothing(api: httpx.AsyncClient) -> None:
    name = 'eci_pay_gateway_request_duration_seconds_count{operation="%s",outcome="%s"}'
    found = await scraped(api)
    for operation in ("charge", "refund"):
        for outcome in ("approved", "declined", "unknown", "unavailable"):
            assert name % (operation, outcome) in found


async def test_an_unexpected_error_is_counted(
    api: httpx.AsyncClient, service: PaymentService, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(Payments, "by_id", broken)
    assert (await api.get("/v1/payments/1")).status_code == 500
    await service.totals.add_up()
    assert (await scraped(api))["payment_processing_errors"] == 1


async def test_messages_that_wait_and_dead_ones_are_measured(
    api: httpx.AsyncClient, telling: PaymentService, books: Books
) -> None:
    await telling.charges.charge(request=charge_request(1), idempotency_key="1")
    await books.rows("UPDATE outbox SET created_at = now() - interval '60 seconds'")
    await books.rows("UPDATE outbox SET dead_at = now() WHERE destination = 'notification'")
    found = await scraped(api)
    assert found['eci_pay_outbox_pending_messages{peer="order"}'] == 1
    assert found['eci_pay_outbox_oldest_pending_seconds{peer="order"}'] >= 60
    assert found['eci_pay_outbox_dead_messages{peer="notification"}'] == 1
    assert found['eci_pay_outbox_oldest_pending_seconds{peer="inventory"}'] == 0


async def test_a_scrape_does_not_wait_until_a_large_backlog_is_counted(
    telling: PaymentService, books: Books, monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(outbox, "COUNTED_AT_ONCE_MAX", 0)
    pending = 'eci_pay_outbox_pending_messages{peer="order"}'
    async with client_of(settings, opening(telling)) as api:
        await telling.charges.charge(request=charge_request(1), idempotency_key="1")
        assert (await scraped(api))[pending] == 1
        await telling.charges.charge(request=charge_request(2), idempotency_key="2")
        async with books.connection.transaction():
            await books.rows("LOCK TABLE outbox IN ACCESS EXCLUSIVE MODE")
            assert (await scraped(api))[pending] == 1

        async def both_are_counted() -> bool:
            return (await scraped(api))[pending] == 2

        await until(both_are_counted)


async def test_the_keys_are_estimated_not_counted(api: httpx.AsyncClient, books: Books) -> None:
    assert (await scraped(api))["eci_pay_idempotency_keys_estimate"] == 0
    for order_id in (1, 2):
        assert (await charge(api, order_id, key=f"k{order_id}")).status_code == 201
    await books.rows("ANALYZE idempotency_keys")
    assert (await scraped(api))["eci_pay_idempotency_keys_estimate"] == 2


async def test_several_workers_tell_of_all_of_them(command_line: CommandLine) -> None:
    async with serving(command_line, workers=2) as server:
        name = 'eci_pay_http_request_duration_seconds_count{method="POST",route="/v1/payments/charge",status="201"}'

        async def charged_by_all() -> bool:
            async with httpx.AsyncClient(base_url=server.address) as client:
                return (await scraped(client)).get(name) == 40

        for order_id in range(1, 41):
            # Over a connection of its own: whichever worker takes it.
            async with httpx.AsyncClient(base_url=server.address) as client:
                assert (await charge(client, order_id, key=f"k{order_id}")).status_code == 201
        await until(charged_by_all)
        async with httpx.AsyncClient(base_url=server.address) as client:
            assert (await scraped(client))["payments_created_total"] == 40


WORKER = """
from eci_pay import instruments
instruments.start_measuring()
instruments.rows_waiting("create", 700)
instruments.replayed()
print(flush=True)
input()
"""


async def test_rows_of_a_worker_that_was_killed_wait_no_longer(
    api: httpx.AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(MULTIPROCESS_DIRECTORY, str(tmp_path))
    pipe = asyncio.subprocess.PIPE
    worker = await asyncio.create_subprocess_exec(sys.executable, "-c", WORKER, stdin=pipe, stdout=pipe)
    assert worker.stdout is not None
    await worker.stdout.readline()
    waiting, replays = 'eci_pay_group_commit_waiting_rows{kind="create"}', "eci_pay_idempotent_replays_total"
    found = await scraped(api)
    assert (found[waiting], found[replays]) == (700, 1)
    worker.kill()
    await worker.wait()
    found = await scraped(api)
    assert (found.get(waiting), found[replays]) == (None, 1)


async def test_a_database_that_keeps_a_scrape_waiting_hides_only_the_books(
    api: httpx.AsyncClient, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "BOOKS_SECONDS_MAX", 0.2)
    async with await psycopg.AsyncConnection.connect(database_url) as session:
        await session.execute("LOCK TABLE totals")
        began = time.monotonic()
        scrapes = [await scraped(api) for _ in range(metrics.READS_AT_ONCE_MAX + 1)]
        assert time.monotonic() - began < 0.2 * metrics.READS_AT_ONCE_MAX + 1
    for found in scrapes:
        assert "payments_created_total" not in found
        assert 'eci_pay_database_connections{state="busy"}' in found

    async def has_the_books() -> bool:
        return "payments_created_total" in await scraped(api)

    await until(has_the_books)


async def test_prometheus_has_nothing_to_say_of_them_but_of_the_platforms_names(api: httpx.AsyncClient) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool, of Debian's package prometheus, is not installed")
    await charge(api)
    text = (await api.get("/metrics")).text
    command = [promtool, "check", "metrics"]
    checked = subprocess.run(command, check=False, input=text, capture_output=True, text=True)  # noqa: ASYNC221
    said = [line for line in (checked.stdout + checked.stderr).splitlines() if line.strip()]
    assert [line for line in said if line.startswith("eci_pay_")] == []
    assert all(line.startswith(("payment", "total_", "refunds_")) for line in said), said
