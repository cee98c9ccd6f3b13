"""Log lines: each is one JSON object or a line for people, whatever it is given to tell, and says what it is about."""

import asyncio
import json
import logging
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from cli.runtime import settings_of_command, settings_of_server
from eci_pay.context import begin_subject, bind_origin
from eci_pay.logs import JsonLines, LogFormat
from eci_pay.outbox import LeasedMessage
from eci_pay.peers import Peer, Try
from eci_pay.requests import StatusUpdateRequest, parse_request
from eci_pay.service import PaymentService
from server.app import create_app
from tests.log_lines import logged
from tests.peers import Peers
from tests.support import (
    ManualClock,
    Opener,
    RecordingGateway,
    Relays,
    Scripted,
    charge_fields,
    charge_request,
    create_request,
    refund_request,
)

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
COLOUR = "\x1b["


class Unshowable:
    """Cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no")


@pytest.mark.parametrize(
    "value", ["\u00e9\ud800", b"\xff", float("nan"), [float("-inf")], {1, 2}, object(), Unshowable(), {("a", "b"): 1}]
)
def test_no_value_costs_a_line(value: object) -> None:
    record = logging.makeLogRecord(
        {"name": "some", "levelname": "INFO", "msg": "%d\nlines", "args": (2,), "told": value}
    )
    line = JsonLines().format(record)
    assert line.isascii()
    assert "\n" not in line
    event = json.loads(line, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (event["event"], event["level"], event["logger"]) == ("2\nlines", "info", "some")
    assert {"told", "timestamp"} <= set(event)


def test_arguments_that_do_not_fit_cost_no_line() -> None:
    with logged("json") as lines:
        logging.getLogger("some").info("%d of %d", "one")  # noqa: PLE1206
    (line,) = lines()
    assert json.loads(line)["event"] == "%d of %d ('one',)"


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_a_value_never_makes_a_second_line_or_gives_the_terminal_orders(log_format: LogFormat) -> None:
    told = "a\nb\r\x1b[2Jc\u2028d\x85e\x0bf"
    with logged(log_format) as lines:
        logging.getLogger("some").info("event %s", told, extra={"told": told, "nested": [{told: told}]})
    (line,) = lines()
    assert line.isprintable()


def test_on_a_console_nothing_from_outside_looks_like_a_line_of_ours() -> None:
    forged = "ValueError: x\n2026-11-23T09:54:41Z [info     ] paid\x1b[2J"
    with logged("console") as lines:
        logging.getLogger("some").error("failed", exc_info=ValueError(forged))
    line, *trace = lines()
    assert re.fullmatch(r"\S+Z \[error +\] failed +\[some\]", line.rstrip()), line
    assert trace
    assert all(line.startswith("    ") and line.isprintable() for line in trace)


@pytest.mark.parametrize(
    ("log_format", "is_terminal", "no_color", "readable", "coloured"),
    [
        ("auto", True, "", True, True),
        ("auto", True, "1", True, False),
        ("auto", False, "", False, False),
        ("json", True, "", False, False),
        ("console", False, "", True, False),
        ("console", True, "", True, True),
    ],
)
def test_a_terminal_gets_lines_for_people_and_everything_else_json(
    *,
    monkeypatch: pytest.MonkeyPatch,
    log_format: LogFormat,
    is_terminal: bool,
    no_color: str,
    readable: bool,
    coloured: bool,
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    with logged(log_format, is_terminal=is_terminal) as lines:
        logging.getLogger("some").warning("event", extra={"told": "a b", "number": 3})
    (line,) = lines()
    assert (COLOUR in line) == coloured
    plain = re.sub(r"\x1b\[\d*m", "", line)
    if readable:
        assert re.fullmatch(r"\S+Z \[warning *\] event +\[some\] told='a b' number=3", plain), plain
    else:
        assert json.loads(line)["event"] == "event"


@pytest.mark.parametrize("begin", [settings_of_command, settings_of_server, create_app])
def test_the_setting_decides_for_commands_and_servers(
    monkeypatch: pytest.MonkeyPatch, begin: Callable[[], object]
) -> None:
    monkeypatch.setenv("ECI_PAY_AUTH", "on")
    for log_format, starts in (("console", "20"), ("json", "{"), ("", "{")):
        monkeypatch.setenv("ECI_PAY_LOG_FORMAT", log_format)
        with logged("auto") as lines:
            begin()
            logging.getLogger("some").error("event")
        (line,) = lines()
        assert line.startswith(starts)


def test_every_line_tells_the_request_its_trace_and_its_payment() -> None:
    with logged("json") as lines:
        bind_origin("mine", TRACEPARENT)
        begin_subject(payment_id=3, order_id=4, refund_id=None)
        logging.getLogger("uvicorn.error").info("event")
    event = json.loads(lines()[0])
    assert {name: event.get(name) for name in ("request_id", "trace_id", "payment_id", "order_id")} == {
        "request_id": "mine",
        "trace_id": TRACE,
        "payment_id": 3,
        "order_id": 4,
    }
    assert "refund_id" not in event


def _told(lines: Callable[[], list[str]], *, of: str) -> list[dict[str, Any]]:
    """What the lines of a logger tell, without what is different each time."""
    events = [json.loads(line) for line in lines()]
    names = ("payment_id", "order_id", "refund_id", "payment_status", "refund_status")
    return [{name: event[name] for name in names if name in event} for event in events if event["logger"] == of]


async def test_a_request_tells_in_its_own_line_what_it_has_changed(api: httpx.AsyncClient) -> None:
    with logged("json") as lines:
        for order_id, amount in ((501, "100.00"), (502, "4000.02"), (503, "4000.08")):
            body = charge_fields(order_id, amount=amount)
            await api.post("/v1/payments/charge", json=body, headers={"Idempotency-Key": f"key-{order_id}"})
        ids = [event["payment_id"] for event in _told(lines, of="server.requests")]
        refund = {"reason": "Damaged in transit", "amount": 40}
        await api.post(f"/v1/payments/{ids[0]}/refund", json=refund)
        await api.post(f"/v1/payments/{ids[0]}/refund", json={"reason": "Damaged in transit"})
        await api.delete(f"/v1/payments/{ids[1]}")
        await api.get("/v1/payments/order/503")
    first = {"payment_id": ids[0], "order_id": 501}
    told = _told(lines, of="server.requests")
    refunds = [event.pop("refund_id") for event in told[3:5]]
    assert refunds == sorted(set(refunds))
    assert told == [
        {**first, "payment_status": "COMPLETED"},
        {"payment_id": ids[1], "order_id": 502, "payment_status": "FAILED"},
        {"payment_id": ids[2], "order_id": 503, "payment_status": "PROCESSING"},
        {**first, "refund_status": "COMPLETED"},
        {**first, "refund_status": "COMPLETED", "payment_status": "REFUNDED"},
        {"payment_id": ids[1], "order_id": 502, "payment_status": "CANCELLED"},
        {"payment_id": ids[2], "order_id": 503},
    ]
    assert _told(lines, of="eci_pay.changes") == []


async def test_what_changes_without_a_request_has_a_line_each_and_once(
    service: PaymentService, gateway: RecordingGateway
) -> None:
    with logged("json") as lines:
        charged = await service.charges.charge(request=charge_request(601), idempotency_key="a")
        await service.charges.charge(request=charge_request(601), idempotency_key="a")  # replayed
        await service.refunds.refund(payment_id=charged.payment_id, request=refund_request())
        created = await service.charges.create(request=create_request(602))
        update = parse_request(StatusUpdateRequest, {"status": "FAILED"})
        await service.status_changes.update(payment_id=created.payment_id, request=update)
    told = _told(lines, of="eci_pay.changes")
    first, second = (
        {"payment_id": one.payment_id, "order_id": order_id} for one, order_id in ((charged, 601), (created, 602))
    )
    refund_id = next(event["refund_id"] for event in told if "refund_id" in event)
    assert told == [
        {**first, "payment_status": "PROCESSING"},
        {**first, "payment_status": "COMPLETED"},
        {**first, "refund_id": refund_id, "refund_status": "PROCESSING"},
        {**first, "refund_id": refund_id, "refund_status": "COMPLETED"},
        {**first, "refund_id": refund_id, "payment_status": "REFUNDED"},
        {**second, "payment_status": "PENDING"},
        {**second, "payment_status": "FAILED"},
    ]


async def test_charges_that_share_a_batch_have_lines_of_their_own(service: PaymentService) -> None:
    with logged("json") as lines:
        answers = await asyncio.gather(
            *(
                service.charges.charge(request=charge_request(number), idempotency_key=str(number))
                for number in range(701, 731)
            )
        )
    told = sorted(
        (one["order_id"], one["payment_status"], one["payment_id"]) for one in _told(lines, of="eci_pay.changes")
    )
    assert told == sorted(
        (number, status, answer.payment_id)
        for number, answer in enumerate(answers, 701)
        for status in ("PROCESSING", "COMPLETED")
    )


async def test_recovery_tells_of_the_payment_that_it_settles(opened: Opener, clock: ManualClock) -> None:
    async with opened() as service:
        left = await service.charges.charge(request=charge_request(801, amount="4000.08"), idempotency_key="a")
        clock.advance(minutes=10)
        with logged("json") as lines:
            await service.recovery.run_once()
    ids = {"payment_id": left.payment_id, "order_id": 801}
    assert _told(lines, of="eci_pay.changes") == [{**ids, "payment_status": "COMPLETED"}]
    assert _told(lines, of="eci_pay.recovery") == [ids]


async def test_what_a_request_leaves_behind_is_told_when_it_is_booked(opened: Opener) -> None:
    told_by_request: list[dict[str, str]] = []
    with logged("json") as lines:
        subject = begin_subject(line_to_come=True)
        gateway = Scripted(lambda: told_by_request.append(subject.told()))
        async with opened(gateway=gateway) as service:
            await service.charges.charge(request=charge_request(901), idempotency_key="a")
    assert told_by_request == [{"payment_status": "PROCESSING"}]
    assert [event["payment_status"] for event in _told(lines, of="eci_pay.changes")] == ["COMPLETED"]


async def test_the_relay_tells_of_the_payment_whose_message_it_sends(
    telling: PaymentService, relays: Relays, peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def send(_: Peer, message: LeasedMessage) -> Try:
        raise RuntimeError(f"cannot send {message.message_id}")

    bind_origin("of the charge", TRACEPARENT)
    charged = await telling.charges.charge(request=charge_request(902), idempotency_key="a")
    monkeypatch.setattr(Peer, "send", send)
    with logged("json") as lines:
        bind_origin("of the relay")
        async with relays() as relay:
            await relay.drain()
    events = [json.loads(line) for line in lines()]
    told = [event for event in events if event["logger"] == "eci_pay.lanes"]
    assert told
    assert {(event["payment_id"], event["order_id"], event["request_id"], event["trace_id"]) for event in told} == {
        (charged.payment_id, 902, "of the charge", TRACE)
    }
