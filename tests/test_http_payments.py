"""The HTTP API where all goes well: statuses, headers, bodies, defaults, filters and pages."""

import asyncio
import json
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest

from eci_pay import listing
from eci_pay.lifecycle import PaymentMethod, PaymentStatus
from tests.support import Books, ManualClock, RecordingGateway, charge_fields

COLUMNS = {
    *("payment_id", "order_id", "user_id", "amount", "currency", "payment_method", "status", "transaction_id"),
    *("reference", "authorization_code", "gateway_response", "created_at", "updated_at", "completed_at"),
    *("captured_at", "attempt", "refunded_amount", "refund_pending"),
}
HISTORY = {"transaction_log_id", "transaction_type", "amount", "status", "description", "created_at"}
TOKEN = "tok_4242424242424242"
ALLOWED_UPDATES = {
    ("PENDING", "COMPLETED"),
    ("PENDING", "FAILED"),
    ("PENDING", "CANCELLED"),
    ("FAILED", "CANCELLED"),
}
STATUSES = [status.value for status in PaymentStatus]


async def charge(api: httpx.AsyncClient, order_id: int = 1, *, key: str = "", **fields: object) -> httpx.Response:
    """Charges an order, under a key of the order's own unless one is given."""
    headers = {"Idempotency-Key": key or f"order-{order_id}"}
    return await api.post("/v1/payments/charge", json=charge_fields(order_id, **fields), headers=headers)


async def create(api: httpx.AsyncClient, order_id: int = 1, **fields: object) -> httpx.Response:
    """Records a payment without a gateway."""
    return await api.post("/v1/payments", json=charge_fields(order_id, **fields))


async def refund(api: httpx.AsyncClient, payment_id: int, amount: object = None, **headers: str) -> httpx.Response:
    """Refunds a payment; without an amount, all of it."""
    body = {"reason": "Damaged in transit"} if amount is None else {"reason": "Damaged in transit", "amount": amount}
    return await api.post(f"/v1/payments/{payment_id}/refund", json=body, headers=headers)


async def set_status(api: httpx.AsyncClient, payment_id: int, status: str, **fields: object) -> httpx.Response:
    """Changes a status by hand."""
    return await api.patch(f"/v1/payments/{payment_id}/status", json={"status": status, **fields})


async def listed(api: httpx.AsyncClient, **params: str | int) -> Any:
    """A page of the list."""
    answer = await api.get("/v1/payments", params=params)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def payment_in(api: httpx.AsyncClient, status: str) -> int:
    """The id of a new payment that has got into this status the way payments do."""
    match status:
        case "PENDING":
            made = await create(api)
        case "CANCELLED":
            made = await create(api)
            await api.delete(f"/v1/payments/{made.json()['payment_id']}")
        case "PROCESSING":
            made = await charge(api, amount="4000.08")
        case "FAILED":
            made = await charge(api, amount="4000.02")
        case _:
            made = await charge(api)
    payment_id: int = made.json()["payment_id"]
    if status == "REFUNDED":
        await refund(api, payment_id)
    assert (await api.get(f"/v1/payments/{payment_id}")).json()["status"] == status
    return payment_id


def history(payment: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The types and statuses of a payment's audit rows, in the order of the answer."""
    return [(row["transaction_type"], row["status"]) for row in payment["transactions"]]


async def test_a_charge_answers_201_with_every_column_its_history_and_its_place(
    api: httpx.AsyncClient, clock: ManualClock
) -> None:
    answer = await charge(api, 42, amount=1499.5, reference="Order 42/2026", currency="inr")
    assert answer.status_code == 201
    assert answer.headers["Content-Type"] == "application/json"
    payment = answer.json()
    assert answer.headers["Location"] == f"/v1/payments/{payment['payment_id']}"
    assert "Idempotent-Replayed" not in answer.headers
    assert "Retry-After" not in answer.headers
    assert set(payment) == COLUMNS | {"transactions", "refunds"}
    expected = {
        "order_id": 42,
        "user_id": 7,
        "amount": 1499.5,
        "currency": "INR",
        "payment_method": "CREDIT_CARD",
        "status": "COMPLETED",
        "reference": "Order 42/2026",
        "attempt": 1,
        "refunded_amount": 0,
        "refund_pending": 0,
        "refunds": [],
    }
    assert {name: payment[name] for name in expected} == expected
    assert re.fullmatch(r"TXN[0-9A-HJKMNP-TV-Z]{26}", payment["transaction_id"])
    assert payment["authorization_code"].startswith("AUTH")
    for name in ("created_at", "updated_at", "completed_at", "captured_at"):
        assert datetime.fromisoformat(payment[name]) == clock.now
        assert payment[name].endswith("Z")
    assert history(payment) == [("PAYMENT", "PROCESSING"), ("PAYMENT", "COMPLETED")]
    assert all(set(row) == HISTORY and row["amount"] == 1499.5 for row in payment["transactions"])
    assert payment == (await api.get(answer.headers["Location"])).json()


async def test_what_a_charge_leaves_out_is_filled_in(api: httpx.AsyncClient) -> None:
    first, second = (await charge(api, 1)).json(), (await create(api, 2)).json()
    for payment in (first, second):
        assert payment["currency"] == "INR"
        assert re.fullmatch(r"REF[A-Z0-9]{12}", payment["reference"])
    assert first["reference"] != second["reference"]
    assert first["transaction_id"] < second["transaction_id"]


async def test_every_method_but_cash_asks_the_gateway(api: httpx.AsyncClient, gateway: RecordingGateway) -> None:
    methods = [method.value for method in PaymentMethod if method is not PaymentMethod.COD]
    for order_id, method in enumerate(methods, start=1):
        answer = await charge(api, order_id, payment_method=method)
        assert (answer.status_code, answer.json()["status"]) == (201, "COMPLETED")
        assert answer.json()["payment_method"] == method
    assert [asked.payment_method for asked in gateway.charges] == methods


async def test_cash_on_delivery_is_pending_until_it_is_set_to_completed_and_refunded_without_a_gateway(
    api: httpx.AsyncClient, gateway: RecordingGateway, clock: ManualClock
) -> None:
    answer = await charge(api, payment_method="COD")
    payment_id = answer.json()["payment_id"]
    assert (answer.status_code, answer.json()["status"]) == (201, "PENDING")
    assert answer.headers["Location"] == f"/v1/payments/{payment_id}"
    clock.advance(days=3)
    completed = await set_status(api, payment_id, "COMPLETED", gateway_response="Paid to the courier")
    assert (completed.status_code, completed.json()["status"]) == (200, "COMPLETED")
    assert completed.json()["gateway_response"] == "Paid to the courier"
    assert datetime.fromisoformat(completed.json()["completed_at"]) == clock.now
    assert completed.json()["captured_at"] is None
    refunded = await refund(api, payment_id)
    assert (refunded.status_code, refunded.json()["status"]) == (200, "REFUNDED")
    assert refunded.json()["refunds"][0]["gateway_reference"] is None
    assert (gateway.charges, gateway.refunds) == ([], [])
    assert history(refunded.json()) == [
        ("PAYMENT", "PENDING"),
        ("PAYMENT", "COMPLETED"),
        ("REFUND", "PROCESSING"),
        ("REFUND", "REFUNDED"),
        ("PAYMENT", "REFUNDED"),
    ]


async def test_the_legacy_creation_records_a_pending_payment_and_asks_no_gateway(
    api: httpx.AsyncClient, gateway: RecordingGateway
) -> None:
    answer = await create(api, 5, amount=12)
    payment = answer.json()
    assert (answer.status_code, payment["status"], payment["amount"]) == (201, "PENDING", 12)
    assert answer.headers["Location"] == f"/v1/payments/{payment['payment_id']}"
    assert history(payment) == [("PAYMENT", "PENDING")]
    assert gateway.charges == []
    charged = await charge(api, 5)
    assert (charged.status_code, charged.json()["payment_id"]) == (201, payment["payment_id"])
    kept = ("transaction_id", "created_at")
    assert {name: charged.json()[name] for name in kept} == {name: payment[name] for name in kept}


async def test_the_legacy_creation_honours_a_key_without_requiring_one(api: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "legacy"}
    first = await api.post("/v1/payments", json=charge_fields(1), headers=headers)
    again = await api.post("/v1/payments", json=charge_fields(1), headers=headers)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == first.headers["Location"]
    assert (await create(api, 1)).status_code == 409


async def test_refunds_leave_a_payment_completed_until_the_last_of_it_is_given_back(
    api: httpx.AsyncClient, gateway: RecordingGateway
) -> None:
    paid = (await charge(api, amount="100.00")).json()
    partly = await refund(api, paid["payment_id"], 30.25)
    assert partly.status_code == 200
    assert "Location" not in partly.headers
    payment = partly.json()
    assert (payment["status"], payment["refunded_amount"], payment["refund_pending"]) == ("COMPLETED", 30.25, 0)
    (given_back,) = payment["refunds"]
    assert (given_back["amount"], given_back["status"]) == (30.25, "COMPLETED")
    assert given_back["reason"] == "Damaged in transit"
    assert given_back["gateway_reference"].startswith("RFND")
    rest = (await refund(api, paid["payment_id"])).json()
    assert (rest["status"], rest["refunded_amount"]) == ("REFUNDED", 100)
    assert [row["amount"] for row in rest["refunds"]] == [30.25, 69.75]
    assert history(rest)[2:] == [
        ("REFUND", "PROCESSING"),
        ("REFUND", "REFUNDED"),
        ("REFUND", "PROCESSING"),
        ("REFUND", "REFUNDED"),
        ("PAYMENT", "REFUNDED"),
    ]
    numbers = [row["transaction_log_id"] for row in rest["transactions"]]
    assert numbers == sorted(numbers)
    assert rest == (await api.get(f"/v1/payments/{paid['payment_id']}")).json()
    keys = [asked.key for asked in gateway.refunds]
    assert keys == [f"{paid['transaction_id']}-R{row['refund_id']}" for row in rest["refunds"]]


async def test_a_refund_with_a_key_is_replayed_and_two_without_one_both_happen(
    api: httpx.AsyncClient, gateway: RecordingGateway
) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    first = await refund(api, payment_id, "10", **{"Idempotency-Key": "r"})
    again = await refund(api, payment_id, "10.00", **{"Idempotency-Key": "r"})
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    both = [await refund(api, payment_id, "10") for _ in range(2)]
    assert [answer.json()["refunded_amount"] for answer in both] == [20, 30]
    assert len(gateway.refunds) == 3


async def test_the_spaces_around_a_reason_are_cut_off(api: httpx.AsyncClient) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    for reason, kept in (("  Wrong size\n", "Wrong size"), ("x" * 400, "x" * 400)):
        body = {"reason": reason, "amount": 1}
        answer = await api.post(f"/v1/payments/{payment_id}/refund", json=body)
        assert answer.json()["refunds"][-1]["reason"] == kept


@pytest.mark.parametrize("before", STATUSES)
@pytest.mark.parametrize("after", STATUSES)
async def test_a_status_update_follows_the_state_machine(
    api: httpx.AsyncClient, books: Books, before: str, after: str
) -> None:
    payment_id = await payment_in(api, before)
    rows = await books.audit_trail(payment_id)
    answer = await set_status(api, payment_id, after)
    if (before, after) in ALLOWED_UPDATES:
        assert (answer.status_code, answer.json()["status"]) == (200, after)
        assert (answer.json()["completed_at"] is not None) == (after == "COMPLETED")
        assert await books.audit_trail(payment_id) == [*rows, ("PAYMENT", after)]
    else:
        problem = answer.json()
        assert (answer.status_code, problem["code"]) == (409, "invalid-state")
        assert problem["payment_id"] == payment_id
        assert await books.audit_trail(payment_id) == rows
        assert await books.value("SELECT status FROM payments") == before


@pytest.mark.parametrize("before", STATUSES)
async def test_a_delete_cancels_what_is_pending_or_failed_and_nothing_else(
    api: httpx.AsyncClient, books: Books, before: str
) -> None:
    payment_id = await payment_in(api, before)
    rows = await books.audit_trail(payment_id)
    answer = await api.delete(f"/v1/payments/{payment_id}")
    if before in ("PENDING", "FAILED"):
        assert (answer.status_code, answer.json()["status"]) == (200, "CANCELLED")
        assert await books.audit_trail(payment_id) == [*rows, ("PAYMENT", "CANCELLED")]
    else:
        assert (answer.status_code, answer.json()["code"]) == (409, "invalid-state")
        assert await books.audit_trail(payment_id) == rows


async def test_a_payment_is_found_by_its_id_its_order_and_its_transaction(api: httpx.AsyncClient) -> None:
    payment = (await charge(api, 2**63 - 1, user_id=2**63 - 1)).json()
    for path in (
        f"{payment['payment_id']}",
        f"000{payment['payment_id']}",
        f"order/{2**63 - 1}",
        f"transaction/{payment['transaction_id']}",
    ):
        answer = await api.get(f"/v1/payments/{path}")
        assert (answer.status_code, answer.json()) == (200, payment)


async def test_head_has_the_headers_of_get_and_no_body(api: httpx.AsyncClient) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    for path in ("/v1/payments", f"/v1/payments/{payment_id}", "/v1/payments/99", "/health", "/health/ready"):
        got, head = await api.get(path), await api.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        for name in ("Content-Type", "Content-Length"):
            assert head.headers[name] == got.headers[name]


@pytest.fixture
def composed_anew() -> Iterator[None]:
    """The texts of lists are made for this test alone."""
    for text in (listing._page_text, listing._count_text):
        text.cache_clear()
    yield
    for text in (listing._page_text, listing._count_text):
        text.cache_clear()


@pytest.mark.usefixtures("composed_anew")
@pytest.mark.parametrize("dated_max", [listing.DATED_MAX, 1], ids=["few of a time", "many of a time"])
async def test_a_list_is_filtered_by_each_field_and_by_several_at_once(
    api: httpx.AsyncClient, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, dated_max: int
) -> None:
    monkeypatch.setattr(listing, "DATED_MAX", dated_max)
    start = clock.now
    await charge(api, 1, user_id=1)
    clock.advance(hours=1)
    await charge(api, 2, user_id=2, payment_method="COD")
    clock.advance(hours=1)
    await charge(api, 3, user_id=2, amount="4000.02")
    first, second, third = ((start + timedelta(hours=hours)).isoformat() for hours in range(3))

    async def orders(**params: str | int) -> list[int]:
        page = await listed(api, **params)
        assert page["total"] == len(page["payments"])
        return [payment["order_id"] for payment in page["payments"]]

    assert await orders() == [3, 2, 1]
    assert await orders(status="FAILED") == [3]
    assert await orders(status="REFUNDED") == []
    assert await orders(payment_method="COD") == [2]
    assert await orders(user_id=2) == [3, 2]
    assert await orders(user_id=2, status="PENDING", payment_method="COD") == [2]
    assert await orders(created_from=second) == [3, 2]
    assert await orders(created_to=second) == [1]
    assert await orders(created_from=first, created_to=third) == [2, 1]
    assert await orders(created_from="2026-11-01", created_to="2026-11-02") == [3, 2, 1]
    assert await orders(created_from="2026-11-01T18:30:00+05:30") == [3, 2]
    assert await orders(created_to="2026-11-01T13:00:00Z") == [1]


async def test_a_list_is_read_page_by_page_and_by_cursor_with_an_exact_total(api: httpx.AsyncClient) -> None:
    await asyncio.gather(*(create(api, order_id) for order_id in range(1, 26)))
    default = await listed(api)
    assert set(default) == {"total", "total_is_exact", "page", "page_size", "payments", "next_cursor"}
    assert (default["total"], default["total_is_exact"]) == (25, True)
    assert (default["page"], default["page_size"], len(default["payments"])) == (1, 10, 10)
    ids = [payment["payment_id"] for payment in (await listed(api, page_size=100))["payments"]]
    assert len(ids) == 25
    assert ids == sorted(ids, reverse=True)
    assert all(set(p) >= COLUMNS and p["transactions"] == [] for p in default["payments"])

    pages = [await listed(api, page=number, page_size=10) for number in (1, 2, 3, 4)]
    assert [len(page["payments"]) for page in pages] == [10, 10, 5, 0]
    assert [payment["payment_id"] for page in pages for payment in page["payments"]] == ids
    assert [page["next_cursor"] is None for page in pages] == [False, False, True, True]

    walked, page = [], default
    while True:
        walked += [payment["payment_id"] for payment in page["payments"]]
        if page["next_cursor"] is None:
            break
        page = await listed(api, cursor=page["next_cursor"])
        assert page["total"] == 25
    assert walked == ids
    await create(api, 26)
    assert (await listed(api, page=1))["payments"][0]["order_id"] == 26


async def test_a_page_that_ends_with_the_last_payment_has_no_next_cursor(api: httpx.AsyncClient) -> None:
    for order_id in (1, 2):
        await create(api, order_id)
    assert (await listed(api, page_size=2))["next_cursor"] is None
    assert (await listed(api, page_size=1))["next_cursor"] is not None
    assert (await listed(api, page=1000, page_size=100))["payments"] == []


async def test_a_total_is_exact_to_ten_thousand_and_capped_there(api: httpx.AsyncClient, books: Books) -> None:
    await books.rows(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, transaction_id)"
        " SELECT n, 7, 1, 'UPI', 'TXN' || n FROM generate_series(1, 10000) n"
    )
    page = await listed(api)
    assert (page["total"], page["total_is_exact"]) == (10_000, True)
    await create(api, 10_001)
    page = await listed(api, page=1_000, page_size=10)
    assert (page["total"], page["total_is_exact"]) == (10_000, False)
    assert len(page["payments"]) == 10


async def test_the_service_tells_that_it_is_healthy(api: httpx.AsyncClient, clock: ManualClock) -> None:
    for path in ("/health", "/health/live", "/health/startup", "/health/ready"):
        answer = await api.get(path)
        assert answer.status_code == 200
        assert answer.json() == {
            "status": "healthy",
            "service": "payment-service",
            "timestamp": clock.now.isoformat(),
        }


async def test_a_request_id_is_taken_over_and_one_is_made_up_where_there_is_none_to_use(
    api: httpx.AsyncClient,
) -> None:
    for given in ("checkout-7f3a", "x" * 128, "a b/c?d=e"):
        answer = await api.get("/v1/payments/99", headers={"X-Request-ID": given})
        assert answer.headers["X-Request-ID"] == answer.json()["request_id"] == given
    made_up = set()
    for unusable in (None, b"", b"x" * 129, "Kasse-ä".encode(), b"a\tb"):
        headers = {} if unusable is None else {b"X-Request-ID": unusable}
        answer = await api.get("/v1/payments/99", headers=headers)
        assert re.fullmatch(r"[0-9a-f]{32}", answer.headers["X-Request-ID"])
        assert answer.json()["request_id"] == answer.headers["X-Request-ID"]
        made_up.add(answer.headers["X-Request-ID"])
    assert len(made_up) == 5


async def test_every_response_has_a_request_id_and_every_request_a_line_in_the_log(
    api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answers = [
        await charge(api),
        await charge(api),
        await api.post("/v1/payments/charge"),
        await api.get("/v1/payments/charge"),
        await api.get("/nowhere"),
        await api.get("/health"),
        await api.post("/v1/payments", content=b"x" * 70_000),
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 400, 405, 404, 200, 413]
    assert len({answer.headers["X-Request-ID"] for answer in answers}) == len(answers)
    lines = [record for record in caplog.records if record.name == "server.requests"]
    assert [(line.__dict__["method"], line.__dict__["status"]) for line in lines] == [
        (answer.request.method, answer.status_code) for answer in answers
    ]


async def test_the_payment_token_reaches_the_gateway_and_is_neither_stored_nor_logged_nor_answered(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    answers = [
        await charge(api, 1, payment_token=TOKEN),
        await charge(api, 1, payment_token=TOKEN),
        await charge(api, 1, payment_token=TOKEN + "0"),
        await charge(api, 2, payment_token=TOKEN, amount="4000.02"),
        await charge(api, 3, payment_token=TOKEN, amount="4000.08"),
        await charge(api, 4, payment_token=TOKEN * 100),
        await create(api, 5, payment_token=TOKEN),
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 422, 402, 202, 422, 422]
    assert [asked.payment_token for asked in gateway.charges] == [TOKEN] * 3
    tables = await books.rows("SELECT tablename AS name FROM pg_tables WHERE schemaname = 'public'")
    stored = [await books.rows(f"SELECT t::text FROM {table['name']} t") for table in tables]
    logged = [str(record.__dict__) + caplog.handler.format(record) for record in caplog.records]
    for text in (json.dumps(stored), *logged, *(answer.text for answer in answers), repr(gateway.charges)):
        assert TOKEN not in text
