"""The HTTP API where something is wrong: each answer is a problem document that says what, and nothing is lost."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from eci_pay.gateways import GatewayCharge, GatewayRefund, GatewayUnavailable, Outcome
from eci_pay.service import PaymentService, payment_service
from eci_pay.settings import Settings
from tests.http_server import client_of
from tests.support import Books, RecordingGateway, charge_fields

CHARGE = "/v1/payments/charge"
ID_MAX = 2**63 - 1
JSON = {"Content-Type": "application/json"}
REASON = "Damaged in transit"
MEMBERS = {"type", "title", "status", "detail", "code", "request_id"}


class SwitchedGateway(RecordingGateway):
    """A gateway that can be held back while it answers, and cut off."""

    def __init__(self) -> None:
        super().__init__(slow_seconds=0.01)
        self.released = asyncio.Event()
        self.released.set()
        self.reachable = True

    async def charge(self, charge: GatewayCharge) -> Outcome:
        if not self.reachable:
            raise GatewayUnavailable("connection refused")
        outcome = await super().charge(charge)
        await self.released.wait()
        return outcome

    async def refund(self, refund: GatewayRefund) -> Outcome:
        if not self.reachable:
            raise GatewayUnavailable("connection refused")
        outcome = await super().refund(refund)
        await self.released.wait()
        return outcome


@pytest.fixture
def gateway() -> SwitchedGateway:
    """Answers at once unless a test holds it back."""
    return SwitchedGateway()


def problem(answer: httpx.Response, status: int, code: str, **members: object) -> dict[str, Any]:
    """The problem document of an answer, after a look at all that every one of them has."""
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == "application/problem+json"
    document: dict[str, Any] = answer.json()
    assert set(document) >= MEMBERS
    assert (document["status"], document["code"], document["type"]) == (status, code, f"urn:eci-pay:problem:{code}")
    assert document["request_id"] == answer.headers["X-Request-ID"]
    assert document["title"]
    assert document["detail"]
    assert "Traceback" not in answer.text
    assert {name: document.get(name) for name in members} == members
    return document


def faults(answer: httpx.Response) -> dict[str, str]:
    """The field entries of a validation error, of which each field has one."""
    entries = problem(answer, 422, "validation-error")["errors"]
    found = {entry["field"]: entry["message"] for entry in entries}
    assert len(found) == len(entries)
    assert all(set(entry) == {"field", "message"} and entry["message"] for entry in entries)
    return found


async def charge(api: httpx.AsyncClient, order_id: int = 1, *, key: str = "k", **fields: object) -> httpx.Response:
    """Charges an order."""
    return await api.post(CHARGE, json=charge_fields(order_id, **fields), headers={"Idempotency-Key": key})


async def refund(api: httpx.AsyncClient, payment_id: object, *, key: str = "", **fields: object) -> httpx.Response:
    """Refunds a payment."""
    headers = {"Idempotency-Key": key} if key else {}
    return await api.post(f"/v1/payments/{payment_id}/refund", json={"reason": REASON, **fields}, headers=headers)


async def send(api: httpx.AsyncClient, body: bytes, path: str = CHARGE) -> httpx.Response:
    """Sends a body as it is, as JSON and with a key."""
    return await api.post(path, content=body, headers={**JSON, "Idempotency-Key": "k"})


async def test_a_charge_without_a_usable_key_is_refused_before_anything_else(
    api: httpx.AsyncClient, books: Books, gateway: SwitchedGateway
) -> None:
    def key(*values: bytes) -> list[tuple[bytes, bytes]]:
        return [(b"Idempotency-Key", value) for value in values]

    missing: list[list[tuple[bytes, bytes]]] = [[], key(b""), key(b'""')]
    invalid = [
        *(
            key(b"x" * 256),
            key(b'"' + b"x" * 256 + b'"'),
            key("schlüssel".encode()),
            key("schlüssel".encode("latin-1")),
        ),
        *(key(b"a", b"b"), key(b"a", b"a"), key(b'"open'), key(b'"a"b"'), key(b'"a\\n"'), key(b"a\tb")),
    ]
    for code, cases in (("idempotency-key-missing", missing), ("idempotency-key-invalid", invalid)):
        for headers in cases:
            problem(await api.post(CHARGE, json=charge_fields(), headers=headers), 400, code)
            if headers:
                problem(await api.post("/v1/payments", json=charge_fields(), headers=headers), 400, code)
                problem(await api.post("/v1/payments/1/refund", json={"reason": REASON}, headers=headers), 400, code)
    assert await books.value("SELECT count(*) FROM payments") == 0
    assert gateway.charges == []
    assert (await charge(api, key="x" * 255)).status_code == 201


@pytest.mark.parametrize(("first", "second"), [('"a key"', "a key"), ("a key", '"a key"'), (r'"a\"b\\c"', r'a"b\c')])
async def test_a_quoted_key_is_the_bare_one(
    api: httpx.AsyncClient, gateway: SwitchedGateway, first: str, second: str
) -> None:
    answer = await charge(api, key=first)
    again = await charge(api, key=second)
    assert (answer.status_code, again.status_code, again.content) == (201, 201, answer.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert again.headers["Location"] == answer.headers["Location"]
    assert len(gateway.charges) == 1


async def test_the_same_request_in_other_words_is_replayed_and_another_one_is_refused(
    api: httpx.AsyncClient, gateway: SwitchedGateway
) -> None:
    first = await charge(api, amount="100.00", currency="INR")
    for same in ({"amount": 100}, {"amount": "100.001"}, {"amount": 100.0, "currency": "inr"}):
        again = await charge(api, **same)
        assert (again.status_code, again.content) == (201, first.content)
    for other in ({"amount": "100.01"}, {"user_id": 8}, {"reference": "R"}, {"payment_token": "t"}, {"order_id": 2}):
        problem(await charge(api, **other), 422, "idempotency-key-reused")
    answer = await api.post("/v1/payments", json=charge_fields(), headers={"Idempotency-Key": "k"})
    problem(answer, 422, "idempotency-key-reused")
    payment_id = first.json()["payment_id"]
    problem(await refund(api, payment_id, key="k"), 422, "idempotency-key-reused")
    assert (await refund(api, payment_id, key="r", amount=1)).status_code == 200
    other_id = (await charge(api, 2, key="k2")).json()["payment_id"]
    problem(await refund(api, other_id, key="r", amount=1), 422, "idempotency-key-reused")
    assert len(gateway.charges) == 2


async def test_a_key_whose_request_is_running_is_told_to_come_back_and_the_order_is_in_progress(
    api: httpx.AsyncClient, gateway: SwitchedGateway, books: Books
) -> None:
    gateway.released.clear()
    running = asyncio.create_task(charge(api, amount="4000.10"))
    async with asyncio.timeout(10):
        while not gateway.charges:  # noqa: ASYNC110 - the gateway's list has no event
            await asyncio.sleep(0.01)
    payment_id = await books.value("SELECT payment_id FROM payments")
    again = await charge(api, amount="4000.10")
    problem(again, 409, "idempotency-key-in-flight", payment_id=payment_id)
    assert again.headers["Retry-After"] == "1"
    problem(await charge(api, key="other", amount="4000.10"), 409, "order-in-progress", payment_id=payment_id)
    problem(await charge(api, amount="4000.11"), 422, "idempotency-key-reused")
    gateway.released.set()
    first = await running
    replay = await charge(api, amount="4000.10")
    assert (replay.status_code, replay.content) == (first.status_code, first.content)
    assert (first.status_code, len(gateway.charges)) == (201, 1)


async def test_a_refund_whose_request_is_running_is_told_to_come_back(
    api: httpx.AsyncClient, gateway: SwitchedGateway
) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    gateway.released.clear()
    running = asyncio.create_task(refund(api, payment_id, key="r", amount="60"))
    async with asyncio.timeout(10):
        while not gateway.refunds:  # noqa: ASYNC110 - the gateway's list has no event
            await asyncio.sleep(0.01)
    again = await refund(api, payment_id, key="r", amount="60")
    problem(again, 409, "idempotency-key-in-flight", payment_id=payment_id)
    assert again.headers["Retry-After"] == "1"
    problem(await refund(api, payment_id, amount="60"), 409, "refund-exceeds-balance", payment_id=payment_id)
    gateway.released.set()
    assert (await running).json()["refunded_amount"] == 60


async def test_an_unknown_outcome_is_202_with_its_place_and_a_replay_is_202_again(
    api: httpx.AsyncClient, gateway: SwitchedGateway, books: Books
) -> None:
    for order_id, amount in ((1, "4000.08"), (2, "4000.09"), (3, "4000.11")):
        first = await charge(api, order_id, key=amount, amount=amount)
        again = await charge(api, order_id, key=amount, amount=amount)
        for answer in (first, again):
            payment = answer.json()
            assert (answer.status_code, payment["status"]) == (202, "PROCESSING")
            assert answer.headers["Content-Type"] == "application/json"
            assert answer.headers["Location"] == f"/v1/payments/{payment['payment_id']}"
            assert int(answer.headers["Retry-After"]) > 0
            assert [row["status"] for row in payment["transactions"]] == ["PROCESSING"]
    assert len(gateway.charges) == 3
    held = await books.rows("SELECT DISTINCT status_code, response_body FROM idempotency_keys")
    assert held == [{"status_code": 202, "response_body": None}]


async def test_a_refund_with_an_unknown_outcome_is_202_and_keeps_its_amount_reserved(
    api: httpx.AsyncClient, gateway: SwitchedGateway
) -> None:
    payment_id = (await charge(api, amount="5000")).json()["payment_id"]
    for _ in range(2):
        answer = await refund(api, payment_id, key="r", amount="4000.08")
        payment = answer.json()
        assert (answer.status_code, payment["status"]) == (202, "COMPLETED")
        assert answer.headers["Location"] == f"/v1/payments/{payment_id}"
        assert int(answer.headers["Retry-After"]) > 0
        assert (payment["refunded_amount"], payment["refund_pending"]) == (4000.08, 4000.08)
    problem(await refund(api, payment_id, amount="1000"), 409, "refund-exceeds-balance", payment_id=payment_id)
    assert len(gateway.refunds) == 1


@pytest.mark.parametrize(("amount", "decline_code"), [("4000.02", "card_declined"), ("4000.03", "insufficient_funds")])
async def test_a_declined_charge_is_402_and_is_replayed_byte_for_byte(
    api: httpx.AsyncClient, gateway: SwitchedGateway, amount: str, decline_code: str
) -> None:
    first = await charge(api, amount=amount)
    payment = (await api.get("/v1/payments/order/1")).json()
    problem(first, 402, "payment-declined", payment_id=payment["payment_id"], decline_code=decline_code)
    assert "Idempotent-Replayed" not in first.headers
    assert payment["status"] == "FAILED"
    again = await charge(api, amount=amount)
    assert (again.status_code, again.content) == (402, first.content)
    assert again.headers["Content-Type"] == "application/problem+json"
    assert again.headers["Idempotent-Replayed"] == "true"
    assert len(gateway.charges) == 1


async def test_a_declined_refund_is_402_releases_its_amount_and_is_replayed(api: httpx.AsyncClient) -> None:
    payment_id = (await charge(api, amount="4000.02", payment_method="UPI")).json()["payment_id"]
    first = await refund(api, payment_id, key="r")
    problem(first, 402, "refund-declined", payment_id=payment_id, decline_code="card_declined")
    again = await refund(api, payment_id, key="r")
    assert (again.status_code, again.content) == (402, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    payment = (await api.get(f"/v1/payments/{payment_id}")).json()
    assert (payment["status"], payment["refunded_amount"], payment["refund_pending"]) == ("COMPLETED", 0, 0)
    assert payment["refunds"][0]["status"] == "FAILED"
    assert [row["status"] for row in payment["transactions"]][-2:] == ["PROCESSING", "FAILED"]


MALFORMED = {
    "empty": b"",
    "truncated": b'{"order_id": 1, "amount": ',
    "not a number": b'{"amount": NaN}',
    "infinite": b'{"amount": -Infinity}',
    "the same name twice": b'{"order_id": 1, "order_id": 2}',
    "twice further down": b'{"order_id": {"a": 1, "a": 1}}',
    "not UTF-8": b'{"reference": "\xff"}',
    "UTF-16": '{"order_id": 1}'.encode("utf-16"),
    "deeply nested": b"[" * 30_000,
    "deeply nested objects": b'{"a":' * 10_000,
    "a number of thousands of digits": b'{"order_id": ' + b"1" * 5_000 + b"}",
    "an exponent beyond reason": b'{"amount": 1e99999999999999999999}',
    "trailing comma": b'{"order_id": 1,}',
    "two documents": b"{} {}",
    "form": b"order_id=1&amount=2",
}


async def test_malformed_json_is_400(api: httpx.AsyncClient, books: Books) -> None:
    for body in MALFORMED.values():
        for path in (CHARGE, "/v1/payments", "/v1/payments/1/refund"):
            problem(await send(api, body, path), 400, "malformed-json")
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 0


async def test_malformed_json_is_explained_without_the_words_of_our_programming_language(
    api: httpx.AsyncClient,
) -> None:
    details = {name: (await send(api, body)).json()["detail"] for name, body in MALFORMED.items()}
    words = ("sys.", "decimal.", "<class", "recursion", "codec", "Decimal", "unicode string")
    assert {name: detail for name, detail in details.items() if any(word in detail for word in words)} == {}


async def test_another_media_type_is_415(api: httpx.AsyncClient) -> None:
    body = json.dumps(charge_fields()).encode()
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/jsonp", "", "json"):
        headers = {"Content-Type": media_type, "Idempotency-Key": "k"}
        problem(await api.post(CHARGE, content=body, headers=headers), 415, "unsupported-media-type")
    problem(await api.post(CHARGE, content=body, headers={"Idempotency-Key": "k"}), 415, "unsupported-media-type")
    for media_type in ("application/json; charset=utf-8", "Application/JSON"):
        headers = {"Content-Type": media_type, "Idempotency-Key": "k"}
        assert (await api.post(CHARGE, content=body, headers=headers)).status_code == 201


async def test_each_invalid_field_has_one_entry(api: httpx.AsyncClient) -> None:
    assert set(faults(await send(api, b"{}"))) == {"order_id", "user_id", "amount", "payment_method"}
    wrong: dict[str, list[object]] = {
        "order_id": [0, -1, ID_MAX + 1, 10**4000, True, "1", 1.5, 1.0, None, [], {}],
        "user_id": [0, ID_MAX + 1, False, "7"],
        "amount": [0, -1, "-1", True, None, "1e2", [], 100_001],
        "currency": ["", "XX", "XXX", "inr ", 1, None, "\ud800", "IN\0"],
        "payment_method": ["CASH", "", 1, None, [], "\ud800", "UPI\0"],
        "reference": ["x" * 101, "", 1, [], "a\0b", "\ud800", "\udfff"],
        "payment_token": ["", "x" * 501, 1, []],
        "admin": [True],
        "status": ["COMPLETED"],
    }
    for field, values in wrong.items():
        for value in values:
            answer = await send(api, json.dumps({**charge_fields(), field: value}).encode())
            assert list(faults(answer)) == [field], (field, value)
    several = charge_fields(order_id=0, amount=True, reference="x" * 101, x=1, y=2)
    assert set(faults(await send(api, json.dumps(several).encode()))) == {"order_id", "amount", "reference", "x", "y"}
    for body in (b"[]", b"1", b'"text"', b"null"):
        assert list(faults(await send(api, body))) == [""]
    strange = json.dumps({**charge_fields(), "\ud800": 1, "a\0": 2}).encode()
    assert len(faults(await send(api, strange))) >= 1
    limits = charge_fields(ID_MAX, user_id=ID_MAX, reference="ü" * 100, payment_token="t" * 500)
    assert (await send(api, json.dumps(limits).encode())).status_code == 201


async def test_a_payment_token_refuses_what_no_text_may_hold(api: httpx.AsyncClient, gateway: SwitchedGateway) -> None:
    for token in ("a\0b", "\ud800"):
        answer = await send(api, json.dumps(charge_fields(payment_token=token)).encode())
        assert list(faults(answer)) == ["payment_token"]
    assert gateway.charges == []


async def test_the_fields_of_refunds_and_status_updates_are_validated_alike(api: httpx.AsyncClient) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    wrong: dict[str, list[object]] = {
        "reason": ["1234", "    1234    ", "x" * 401, "", None, 12345, "abc\0def", "abc\ud800d"],
        "amount": [0, -1, True, "1e1", "100000.01"],
        "currency": ["INR"],
    }
    for field, values in wrong.items():
        for value in values:
            body = json.dumps({"reason": REASON, field: value}).encode()
            assert list(faults(await send(api, body, f"/v1/payments/{payment_id}/refund"))) == [field], value
    assert list(faults(await send(api, b"{}", f"/v1/payments/{payment_id}/refund"))) == ["reason"]
    path = f"/v1/payments/{payment_id}/status"
    updates: list[tuple[dict[str, object], str]] = [
        ({}, "status"),
        ({"status": "PAID"}, "status"),
        ({"status": None}, "status"),
        ({"status": "FAILED", "gateway_response": "x" * 501}, "gateway_response"),
        ({"status": "FAILED", "gateway_response": "a\0b"}, "gateway_response"),
        ({"status": "FAILED", "amount": 1}, "amount"),
    ]
    for update, field in updates:
        assert list(faults(await api.patch(path, json=update))) == [field], update


async def test_a_conflict_names_the_payment_that_it_is_about(api: httpx.AsyncClient) -> None:
    paid = (await charge(api, 1)).json()["payment_id"]
    problem(await charge(api, 1, key="again"), 409, "order-already-paid", payment_id=paid)
    problem(await api.post("/v1/payments", json=charge_fields(1)), 409, "order-exists", payment_id=paid)
    problem(await api.delete(f"/v1/payments/{paid}"), 409, "invalid-state", payment_id=paid)
    body = {"status": "REFUNDED"}
    problem(await api.patch(f"/v1/payments/{paid}/status", json=body), 409, "invalid-state", payment_id=paid)
    exceeding = problem(await refund(api, paid, amount="100.01"), 409, "refund-exceeds-balance", payment_id=paid)
    assert "100.00 INR" in exceeding["detail"]
    await refund(api, paid)
    problem(await charge(api, 1, key="again"), 409, "order-already-paid", payment_id=paid)
    problem(await refund(api, paid), 409, "invalid-state", payment_id=paid)
    unknown = (await charge(api, 2, key="u", amount="4000.08")).json()["payment_id"]
    problem(await charge(api, 2, key="again"), 409, "order-in-progress", payment_id=unknown)
    problem(await refund(api, unknown), 409, "invalid-state", payment_id=unknown)
    cash = (await charge(api, 3, key="c", payment_method="COD")).json()["payment_id"]
    again = await charge(api, 3, key="again", payment_method="COD")
    problem(again, 409, "order-in-progress", payment_id=cash)
    await api.delete(f"/v1/payments/{cash}")
    problem(await charge(api, 3, key="again"), 409, "invalid-state", payment_id=cash)


async def test_a_refused_request_leaves_its_key_unused(api: httpx.AsyncClient, books: Books) -> None:
    problem(await charge(api, amount="0"), 422, "validation-error")
    problem(await send(api, b"{"), 400, "malformed-json")
    cash = (await api.post("/v1/payments", json=charge_fields(1))).json()["payment_id"]
    await api.delete(f"/v1/payments/{cash}")
    problem(await charge(api, 1), 409, "invalid-state")
    problem(await refund(api, cash, key="k"), 409, "invalid-state")
    problem(await refund(api, 999, key="k"), 404, "payment-not-found")
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 0
    paid = await charge(api, 2)
    assert paid.status_code == 201
    problem(await refund(api, paid.json()["payment_id"], key="r", amount="101"), 409, "refund-exceeds-balance")
    yen = (await charge(api, 3, key="yen", currency="JPY")).json()["payment_id"]
    assert list(faults(await refund(api, yen, key="r", amount="0.5"))) == ["amount"]
    assert await books.value("SELECT count(*) FROM idempotency_keys WHERE idempotency_key = 'r'") == 0
    assert (await refund(api, yen, key="r", amount="1")).status_code == 200


async def test_an_unknown_payment_is_404_and_an_id_that_is_no_number_422(api: httpx.AsyncClient) -> None:
    patch = {"status": "CANCELLED"}
    for unknown in (1, 0, ID_MAX, ID_MAX + 1, "9" * 400):
        path = f"/v1/payments/{unknown}"
        problem(await api.get(path), 404, "payment-not-found")
        problem(await api.delete(path), 404, "payment-not-found")
        problem(await api.patch(f"{path}/status", json=patch), 404, "payment-not-found")
        problem(await refund(api, unknown, key="k"), 404, "payment-not-found")
        problem(await api.get(f"/v1/payments/order/{unknown}"), 404, "payment-not-found")
        problem(await api.get(f"/v1/payments/transaction/{unknown}"), 404, "payment-not-found")
    for transaction in ("TXN1", "x" * 51, "%00", "%ff", "T%C3%9C", "%ED%A0%80"):
        problem(await api.get(f"/v1/payments/transaction/{transaction}"), 404, "payment-not-found")
    for no_number in ("abc", "-1", "+1", "1.0", "1e3", "0x1", "%D9%A1", "1%00", "%20", "1%20"):
        path = f"/v1/payments/{no_number}"
        assert list(faults(await api.get(path))) == ["payment_id"]
        assert list(faults(await api.delete(path))) == ["payment_id"]
        assert list(faults(await api.patch(f"{path}/status", json=patch))) == ["payment_id"]
        assert list(faults(await refund(api, no_number))) == ["payment_id"]
        assert list(faults(await api.get(f"/v1/payments/order/{no_number}"))) == ["order_id"]


async def test_an_unknown_path_is_404_and_an_unknown_method_405_that_names_the_others(api: httpx.AsyncClient) -> None:
    for path in ("/", "/v1", "/v2/payments", "/v1/payments/", "/v1/payments/1/", "/v1/payments/charge/", "/health/"):
        problem(await api.get(path), 404, "not-found")
    problem(await api.post("/v1/payments/1/refund/", json={}), 404, "not-found")
    for method, path, allowed in (
        ("GET", CHARGE, {"POST"}),
        ("DELETE", CHARGE, {"POST"}),
        ("PUT", "/v1/payments/1", {"GET", "DELETE"}),
        ("DELETE", "/v1/payments", {"GET", "POST"}),
        ("GET", "/v1/payments/1/refund", {"POST"}),
        ("POST", "/v1/payments/1/status", {"PATCH"}),
        ("POST", "/health", {"GET"}),
        ("OPTIONS", "/v1/payments/order/1", {"GET"}),
    ):
        answer = await api.request(method, path)
        problem(answer, 405, "method-not-allowed")
        named = {name.strip() for name in answer.headers["Allow"].split(",")}
        assert named - {"HEAD"} == allowed


async def test_a_body_over_the_limit_is_413_announced_or_not(api: httpx.AsyncClient, settings: Settings) -> None:
    async def chunks(size: int) -> AsyncIterator[bytes]:
        for _ in range(size // 1024):
            yield b" " * 1024

    limit = settings.eci_pay_body_max_bytes
    headers = {**JSON, "Idempotency-Key": "k"}
    problem(await send(api, b" " * (limit + 1)), 413, "body-too-large")
    problem(await api.post(CHARGE, content=chunks(limit + 1024), headers=headers), 413, "body-too-large")
    problem(await send(api, b" " * limit), 400, "malformed-json")
    problem(await api.post(CHARGE, content=chunks(limit), headers=headers), 400, "malformed-json")
    body = json.dumps(charge_fields()).encode()
    assert (await send(api, body + b" " * (limit - len(body)))).status_code == 201


async def test_the_parameters_of_a_list_are_validated(api: httpx.AsyncClient) -> None:
    wrong = {
        "page": ["0", "-1", "x", "1.5", "", "9" * 5_000],
        "page_size": ["0", "101", "x", "-10"],
        "user_id": ["0", str(ID_MAX + 1), "x", "true"],
        "status": ["PAID", ""],
        "payment_method": ["CASH"],
        "created_from": ["yesterday", "2026-13-01", "2026-11-01T00:00:00", "1", "a%00b"],
        "created_to": ["2026-11-31", "0001-01-01T00:00:00%2B14:00"],
        "cursor": ["0", "x", str(ID_MAX + 1), "%00"],
        "sort": ["amount"],
        "%00": ["1"],
        "%ff": ["1"],
    }
    for name, values in wrong.items():
        for value in values:
            answer = await api.get(f"/v1/payments?{name}={value}")
            assert len(faults(answer)) == 1, (name, value)
            assert "%" in name or list(faults(answer)) == [name], value
    for query, field in (
        ("page=1&page=2", "page"),
        ("status=FAILED&status=FAILED", "status"),
        ("page=1&cursor=5", "page"),
        ("page=1001&page_size=100", "page"),
        ("page=10001", "page"),
    ):
        assert list(faults(await api.get(f"/v1/payments?{query}"))) == [field]
    assert set(faults(await api.get("/v1/payments?page=0&page_size=0&sort=x"))) == {"page", "page_size", "sort"}
    assert (await api.get("/v1/payments?page=1000&page_size=100")).status_code == 200


async def test_a_gateway_that_cannot_be_reached_is_503_and_the_same_key_may_try_again(
    api: httpx.AsyncClient, gateway: SwitchedGateway, books: Books
) -> None:
    gateway.reachable = False
    answer = await charge(api)
    problem(answer, 503, "unavailable")
    assert int(answer.headers["Retry-After"]) > 0
    assert await books.value("SELECT status FROM payments") == "FAILED"
    gateway.reachable = True
    paid = await charge(api)
    assert (paid.status_code, paid.json()["attempt"]) == (201, 2)
    payment_id = paid.json()["payment_id"]
    gateway.reachable = False
    problem(await refund(api, payment_id, key="r"), 503, "unavailable")
    payment = (await api.get(f"/v1/payments/{payment_id}")).json()
    assert (payment["status"], payment["refunded_amount"], payment["refund_pending"]) == ("COMPLETED", 0, 0)
    gateway.reachable = True
    assert (await refund(api, payment_id, key="r")).json()["status"] == "REFUNDED"


@asynccontextmanager
async def api_over(database_url: str, gateway: RecordingGateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server of its own, whose database need not be there."""
    settings = Settings.model_validate(
        {"database_url": database_url, "eci_pay_database_pool_timeout_seconds": 0.3, "eci_pay_body_max_bytes": 2048}
    )

    @asynccontextmanager
    async def open_service() -> AsyncIterator[PaymentService]:
        async with payment_service(settings, database_url, gateway=gateway) as service:
            yield service

    async with client_of(settings, open_service) as client:
        yield client


async def test_without_a_database_everything_but_health_is_503_and_nothing_is_sent(gateway: SwitchedGateway) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        url = f"postgresql://nobody:s3cret@127.0.0.1:{closed.getsockname()[1]}/none"
        async with api_over(url, gateway) as api:
            answers = await asyncio.gather(
                charge(api),
                api.post("/v1/payments", json=charge_fields()),
                refund(api, 1),
                api.patch("/v1/payments/1/status", json={"status": "FAILED"}),
                api.delete("/v1/payments/1"),
                api.get("/v1/payments/1"),
                api.get("/v1/payments/order/1"),
                api.get("/v1/payments/transaction/TXN1"),
                api.get("/v1/payments"),
                api.get("/health/ready"),
            )
            for answer in answers:
                problem(answer, 503, "unavailable")
                assert int(answer.headers["Retry-After"]) > 0
                assert "s3cret" not in answer.text
            for path in ("/health", "/health/live", "/health/startup"):
                assert (await api.get(path)).status_code == 200
    assert gateway.charges == []


async def test_a_database_without_its_tables_is_503_and_says_how_to_make_them(
    empty_database_url: str, gateway: SwitchedGateway
) -> None:
    async with api_over(empty_database_url, gateway) as api:
        for answer in (await charge(api), await api.get("/v1/payments/1"), await api.get("/v1/payments")):
            assert "eci-pay migrate" in problem(answer, 503, "unavailable")["detail"]
    assert gateway.charges == []


async def test_what_nobody_foresaw_is_500_with_the_request_id_and_the_rest_only_in_the_log(
    api: httpx.AsyncClient, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    payment_id = (await charge(api)).json()["payment_id"]
    await books.rows("ALTER TABLE payments DROP CONSTRAINT payments_method_known")
    await books.rows("UPDATE payments SET payment_method = 'BARTER'")  # as a newer release may know it
    answer = await api.get(f"/v1/payments/{payment_id}", headers={"X-Request-ID": "find-me"})
    document = problem(answer, 500, "internal-error", request_id="find-me")
    assert "find-me" in answer.headers["X-Request-ID"]
    assert set(document) == MEMBERS
    for word in ("BARTER", "pydantic", "File", "line", "Error\n"):
        assert word not in answer.text
    assert "BARTER" in caplog.text
    assert (await api.get("/health/ready")).status_code == 200


async def test_a_database_that_refuses_by_a_rule_of_its_own_is_500_and_nothing_is_sent_or_stored(
    api: httpx.AsyncClient, books: Books, gateway: SwitchedGateway
) -> None:
    await books.rows("ALTER TABLE payments ADD CONSTRAINT no_user_7 CHECK (user_id <> 7)")
    document = problem(await charge(api), 500, "internal-error")
    assert "no_user_7" not in json.dumps(document)
    assert gateway.charges == []
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 0
    assert (await charge(api, user_id=8)).status_code == 201


async def test_a_client_that_hangs_up_in_the_middle_of_its_body_is_no_error_of_ours(
    api: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port)
    head = f"POST {CHARGE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nIdempotency-Key: k\r\n"
    writer.write(f'{head}Content-Length: 500\r\n\r\n{{"order_id"'.encode())
    await writer.drain()
    writer.close()
    async with asyncio.timeout(10):
        while not (lines := [line for line in caplog.records if line.name == "server.requests"]):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert len(lines) == 1
    assert [line.message for line in caplog.records if line.levelname == "ERROR"] == []
