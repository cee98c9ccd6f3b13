"""Masking: no form of logging shows a secret, and none hides a number of ours."""

import json
import logging
import re
import string
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ulid import ULID

from eci_pay import identifiers
from eci_pay.context import begin_subject
from eci_pay.logs import LogFormat
from eci_pay.masking import MASK, TEXT_LENGTH_MAX, is_plain, masked, masked_text
from tests.log_lines import logged
from tests.support import charge_fields

FORMATS: tuple[LogFormat, ...] = ("json", "console")
WORD = string.ascii_letters + string.digits


@dataclass(frozen=True)
class Secret:
    """A text, and the part of it that must not be read."""

    text: str
    hidden: str


@dataclass
class Holder:
    """What somebody else's class may look like."""

    note: str


def _checked(digits: str) -> str:
    """With the check digit that makes it a card number."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[::-2])
    return digits + str(-(doubled + sum(map(int, digits[-2::-2]))) % 10)


def _word(least: int = 8) -> st.SearchStrategy[str]:
    # Nothing that stands in a line by itself begins like this.
    return st.text(WORD, min_size=least, max_size=30).map(lambda text: f"Zq9{text}")


@st.composite
def cards(draw: st.DrawFn) -> Secret:
    """A card number in groups, perhaps beside another number."""
    digits = _checked(draw(st.text(string.digits, min_size=12, max_size=18).filter(lambda text: text.strip("0"))))
    separator, size = draw(st.sampled_from(["", " ", "-"])), draw(st.integers(3, 6))
    shown = separator.join(digits[at : at + size] for at in range(0, len(digits), size))
    return Secret(
        draw(st.sampled_from(["{}", "card {}", "12 {}", "pan={}", "PAN{}.", "{} 07/29", "\n{}"])).format(shown), digits
    )


def _within(template: str, word: st.SearchStrategy[str]) -> st.SearchStrategy[Secret]:
    return word.map(lambda hidden: Secret(template.replace("{}", hidden), hidden))


TOKENS = [
    *(
        "sk_live_{}",
        "rk_live_{}",
        "sk_test_{}",
        "whsec_{}",
        "pm_{}",
        "tok_{}",
        "pi_1_secret_{}",
        "ecipay_0123456789ab_{}",
        "Bearer {}",
        "basic {}",
    ),
    *("Authorization: Bearer {}", "{'Authorization': 'Basic {}'}", "[(b'authorization', b'Bearer {}')]"),
    *("password={}", "host=db password='{} {}' user=a", '{"payment_token": "{}"}', '"{\\"password\\": \\"{}\\"}"'),
    *("api_key: {}", "X-Api-Key={}", "apiKey => {}", "secret='{}", "https://ada:{}@example.org/a", "eyJ{}.eyJ{}.{}"),
    *("postgresql://ada:{}@db.example:5432/books", "postgresql://ada:{}/@{}@db/books", "client_secret={}&a=1"),
    *("user[password]={}", "password%3D{}", "a%20Authorization%253A%2520Bearer%2520{}", "%7B%22pwd%22%3A%22{}%22%7D"),
    *("password:            {}", "pin=1,token: {}", "('cvv=123'),KeyError(pwd: {}"),
]
EMAILS = ["{}@example.com", "write to <{}@pay.example.co.in>", "user={}@localhost", "to={}%40example.com"]
CVVS = ["cvv {}", "CVV: {}", "cvc={}", "security code is {}", "'cvv2': '{}'", "card[cvc]={}", "cvv%3D{}"]
PHONES = [
    "+91 98765 {}",
    "+1 (415) 555-{}",
    "+44{}123456",
    "phone: 98765{}",
    "mobile=98765{}",
    "(415) 555-{}",
    "98765 0{}",
    "415.555.{}",
    "phone%3D98765{}",
]

secrets = st.one_of(
    cards(),
    *(_within(template, _word()) for template in TOKENS),
    *(_within(template, _word()) for template in EMAILS),
)
few_digits = st.one_of(
    *(_within(template, st.integers(100, 999).map(str)) for template in CVVS),
    *(_within(template, st.integers(6000, 9999).map(str)) for template in PHONES),
)


def _raise(text: str, *, chained: bool) -> None:
    log = logging.getLogger("some")
    try:
        try:
            raise ValueError(text)  # noqa: TRY301
        except ValueError as error:
            if not chained:
                raise
            raise RuntimeError("went wrong") from error
    except (ValueError, RuntimeError):
        log.exception("failed")


FORMS: dict[str, Callable[[str], object]] = {
    "message": lambda text: logging.getLogger("some").info(text),
    "argument": lambda text: logging.getLogger("some").info("told: %s, twice: %r", text, text),
    "arguments that do not fit": lambda text: logging.getLogger("some").info("%d", text),
    "named argument": lambda text: logging.getLogger("some").info("%(a)s", {"a": text}),
    "extra": lambda text: logging.getLogger("some").info("event", extra={"told": text}),
    "nested": lambda text: logging.getLogger("some").info("event", extra={"told": {"a": [{"b": (text, {text: 1})}]}}),
    "object": lambda text: logging.getLogger("some").info("event", extra={"told": [Holder(text), ValueError(text)]}),
    "bytes": lambda text: logging.getLogger("some").info("event %s", text.encode(), extra={"told": text.encode()}),
    "exception": lambda text: _raise(text, chained=False),
    "chained exception": lambda text: _raise(text, chained=True),
    "exception of its own": lambda text: logging.getLogger("some").error("failed", exc_info=ValueError(text)),
    "uvicorn": lambda text: logging.getLogger("uvicorn.error").info("Started: %s", text, extra={"color_message": text}),
    "uvicorn's access": lambda text: logging.getLogger("uvicorn.access").info('%s - "%s %s"', "127.0.0.1", "GET", text),
    "warning": lambda text: warnings.warn(text, stacklevel=1),
}


@pytest.mark.parametrize("log_format", FORMATS)
@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=25, deadline=None)
@given(secret=secrets)
def test_no_form_of_logging_shows_a_secret(form: str, log_format: LogFormat, secret: Secret) -> None:
    with logged(log_format) as lines:
        FORMS[form](secret.text)
    shown = "".join(lines())
    assert MASK in shown
    assert secret.hidden not in re.sub("[ -]", "", shown)


@settings(max_examples=200, deadline=None)
@given(secret=st.one_of(secrets, few_digits), before=st.sampled_from(["", "so: ", "x\n"]))
def test_what_is_masked_is_never_taken_for_plain(secret: Secret, before: str) -> None:
    text = before + secret.text
    assert secret.hidden not in re.sub("[ -]", "", masked_text(text))
    assert not is_plain({"event": text})


NAMES = [
    *("password", "DB_PASSWORD", "payment_token", "paymentToken", "api_key", "apiKey", "X-API-Key", "authorization"),
    *("cvv", "CVC", "card_number", "cardNumber", "card", "pan", "pin", "email", "customer_email", "phone", "mobile_no"),
    *("client_secret", "set-cookie", "stripe-signature", "security_code"),
]


@pytest.mark.parametrize("log_format", FORMATS)
@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(NAMES), secret=st.one_of(st.integers(10**6, 10**18), _word()), within=st.integers(0, 3))
def test_what_a_sensitive_name_holds_is_masked(
    log_format: LogFormat, name: str, secret: int | str, within: int
) -> None:
    places: list[dict[str, object]] = [
        {name: secret},
        {"a": {name: secret}},
        {"a": [[name, secret]]},
        {"a": [{name: [{"b": secret}]}]},
    ]
    with logged(log_format) as lines:
        logging.getLogger("some").info("event", extra=places[within])
    assert str(secret) not in "".join(lines())


numbers = st.integers(1, 2**63 - 1)
cards_as_numbers = cards().map(lambda secret: int(secret.hidden))
instants = st.datetimes(datetime(2020, 1, 1), datetime(2035, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@settings(max_examples=200, deadline=None)
@given(
    payment_id=st.one_of(numbers, cards_as_numbers.filter(lambda number: number < 2**63)),
    order_id=st.one_of(numbers, cards_as_numbers.filter(lambda number: number < 2**63)),
    at=instants,
    amount=st.decimals(0, 100_000, places=2),
    request_id=st.uuids(),
    address=st.ip_addresses(),
    authorization=st.text(string.ascii_uppercase + string.digits, min_size=12, max_size=12),
)
def test_what_is_ours_is_never_masked(
    *,
    payment_id: int,
    order_id: int,
    at: datetime,
    amount: Decimal,
    request_id: uuid.UUID,
    address: object,
    authorization: str,
) -> None:
    told = {
        "transaction_id": identifiers.transaction_id(at),
        "gateway_key": f"{identifiers.transaction_id(at)}-R12",
        "reference": identifiers.reference(),
        "authorization_code": f"AUTH{authorization}",
        "amount": str(amount),
        "at": at.isoformat(),
        "day": f"{at:%Y-%m-%d} to {at:%Y-%m-%d %H:%M:%S.%f}",
        "trace": f"00-{request_id.hex}-{request_id.hex[:16]}-01",
        "request": str(request_id),
        "address": f"{address}",
        "refund_id": order_id,
        "path": f"/v1/payments/order/{order_id}",
        "error": f'duplicate key value violates unique constraint: Key (user_id)=({payment_id}) already exists "a b"',
        "ids": f"payment {payment_id} of order {order_id} was recovered after 12 s: card_declined",
    }
    with logged("json") as lines:
        begin_subject(payment_id=payment_id, order_id=order_id)
        logging.getLogger("some").info("TXN%s", ULID(), extra=told)
    (line,) = lines()
    event = json.loads(line)
    assert {name: event[name] for name in told} == told
    assert (event["payment_id"], event["order_id"]) == (payment_id, order_id)
    assert MASK not in line


def test_a_number_that_is_a_card_is_masked_unless_it_is_named_as_an_id() -> None:
    card = 4111111111111111
    found = {"number": card, "float": float(card), "amount": 1e12, "order_id": card, "payment_ids": [card]}
    assert not is_plain({"told": float(card)})
    assert masked({**found, "other": card + 1}) == {
        "number": MASK,
        "float": MASK,
        "amount": 1e12,
        "order_id": card,
        "payment_ids": [card],
        "other": card + 1,
    }


def test_a_card_between_other_numbers_is_the_only_one_masked() -> None:
    assert masked_text("paid 2026-11-23 4111-1111-1111-1111, then 100 4000056655665556 200") == (
        f"paid 2026-11-23 {MASK}, then 100 {MASK} 200"
    )


@pytest.mark.parametrize(
    "separator",
    [".", "_", "/", "+", "\t", "  ", " - ", "\u00a0", "\u2011", "\n", "\r\n    ", "\\n", "\\xa0", "%20", "%2D"],
)
@pytest.mark.parametrize("groups", ["4111 1111 1111 1111", "3782 822463 10005", "6205 5000 0000 0000 004"])
def test_a_card_in_groups_is_masked_whatever_stands_between_them(separator: str, groups: str) -> None:
    text = groups.replace(" ", separator)
    assert masked_text(f"told {text}.") == f"told {MASK}."
    assert not is_plain({"event": text})


@pytest.mark.parametrize("text", ["REF4111111111111111", "4111111111111111a", "41111111\n11111111", "4 1" + " 1" * 14])
def test_a_card_is_masked_in_what_only_begins_like_something_of_ours(text: str) -> None:
    assert "1111" not in masked_text(text).replace(" ", "")


@pytest.mark.parametrize(
    "text",
    [
        "messages to order are dead (1001, 1002, 1003, 1004, 1005, 1006, 1007, 1008, 1009, 1010)",
        *(f"payments {n} 12 13 14 15 16 17 18" for n in range(10, 30)),
        *(f"550E8400-E29B-41D4-A716-4466554400{n}" for n in range(10, 30)),
        "2026-11-23 10:00:00.123456+00:00 192.168.100.200:65432",
    ],
)
def test_lists_of_ids_and_request_ids_are_not_taken_for_cards(text: str) -> None:
    assert masked_text(text) == text


HOSTILE = [
    *("4111111111111111 ", "1 ", "4111.", "1\n", "eyJ-", "a-", "://:", "pwd ", '\\"', "%2541", "+1 ", "a@"),
    *("password" + " " * 20_000, "password" + "\\" * 20_000, "1" + "\\" * 20_000),
]


@pytest.mark.parametrize("caller", ["client:mobile-app/3f9a0c2b7d1e", "client:auth-service/k", "client:a/3f9pan2b7key"])
def test_a_name_that_tells_no_secret_does_not_make_its_lines_be_searched(caller: str) -> None:
    assert is_plain({"caller": caller})
    assert masked(caller) == caller


async def test_the_lines_of_payments_are_not_searched(api: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would take a fifth of the server's time."""
    searched: list[str] = []

    def search(line: str, _: object) -> str:
        searched.append(line)
        return line

    monkeypatch.setattr("eci_pay.logs.masked_line", search)
    with logged("json") as lines:
        charged = await api.post("/v1/payments/charge", json=charge_fields(1), headers={"Idempotency-Key": "k"})
        path = charged.headers["Location"]
        await api.get(path)
        await api.get("/v1/payments/order/1")
        await api.post(f"{path}/refund", json={"amount": "1.00", "reason": "Too late for a gift"})
        await api.get("/v1/payments?status=COMPLETED")
        told = [json.loads(line) for line in lines() if "server.requests" in line]
    assert [event["status"] for event in told] == [201, 200, 200, 200, 200]
    assert searched == []


@settings(max_examples=200, deadline=None)
@given(number=st.integers(0, 10**12 - 1), form=st.sampled_from(["%d", "order/%d", "%d/refund", "%d/status"]))
def test_what_is_not_searched_in_a_path_is_no_secret(number: int, form: str) -> None:
    path = f"/v1/payments/{form % number}"
    assert is_plain({"path": path})
    assert masked_text(path) == path


@pytest.mark.parametrize("part", HOSTILE)
def test_a_long_text_is_masked_in_time(part: str) -> None:
    text = part * (100_000 // len(part))
    began = time.process_time()
    masked_text(text)
    is_plain({"event": text})
    assert time.process_time() - began < 1.5


def test_of_a_long_text_both_ends_are_told() -> None:
    told = masked_text(f"first {'so it goes ' * 10_000}last")
    assert (told[:8], told[-8:]) == ("first so", "oes last")
    assert re.search(r" \[\d+ characters left out\] ", told)
    assert len(told) < TEXT_LENGTH_MAX + 50
