"""`/metrics`: what an operator's Prometheus sees."""

import httpx

from eci_pay.service import PaymentService
from tests.support import Books, ManualClock, charge_request

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
