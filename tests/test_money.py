"""Amounts: banker's rounding on the digits that were sent, and what is no amount."""

import json
from decimal import ROUND_HALF_EVEN, Context, Decimal

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eci_pay.money import AMOUNT_MAX, check_minor_unit, currency_exponents, parse_amount, parse_currency

CENT = Decimal("0.01")

ROUNDED = {
    "0.125": "0.12",
    "0.135": "0.14",
    "2.675": "2.68",
    "2.665": "2.66",
    "12.345": "12.34",
    "12.3450000000000000000000000000000000001": "12.35",
    "0.00500000000000000000000000000000000000001": "0.01",
    "0.015": "0.02",
    "100000.004": "100000.00",
    "100000.005": "100000.00",
    "99999.995": "100000.00",
    "1": "1.00",
    "007.50": "7.50",
    "100000": "100000.00",
}
"""Digits, and the amount that they denote."""

OUT_OF_RANGE = (
    "0",
    "0.0",
    "0.005",
    "0.000000001",
    "100000.0050000001",
    "100000.01",
    "100001",
    "9" * 59,
    "0." + "0" * 58,
)

NO_PLAIN_DECIMALS = (
    *("", " ", " 1", "1 ", "1\n", "+1", "-1", "-0.0", "1e2", "1E400", "1,000", "1_000", ".5", ".", "1.2.3"),
    *("0x10", "NaN", "Infinity", "٣٫٥", "١٢", "²", "1\0", "\ud800", "1" * 61, "1." + "0" * 100_000),
)
"""Texts that Python would partly read as numbers, and that are none here."""

NO_AMOUNTS: tuple[object, ...] = (None, True, False, 1.5, float("nan"), [], {}, b"1", 1j)
"""Values of other types. A float is refused too: its digits are not those that were sent."""

JSON_NUMBERS = ("-0.0", "-1", "-0.01", "-1E400", "-" + "9" * 40, "1e-9", "1E400", "1E-400", "9" * 40)
"""JSON numbers that are no amount, some beyond what decimal arithmetic has room for."""


@pytest.mark.parametrize(("digits", "amount"), ROUNDED.items())
def test_an_amount_is_rounded_half_to_even_as_text_and_as_number(digits: str, amount: str) -> None:
    assert str(parse_amount(digits)) == amount
    assert str(parse_amount(Decimal(digits))) == amount


@pytest.mark.parametrize("value", [1, 100_000])
def test_an_integer_is_an_amount(value: int) -> None:
    assert parse_amount(value) == Decimal(value)


@pytest.mark.parametrize("text", OUT_OF_RANGE)
def test_an_amount_that_rounds_to_zero_or_above_the_limit_is_refused(text: str) -> None:
    for value in (text, Decimal(text)):
        with pytest.raises(ValueError, match=r"^must (be greater than 0|not exceed 100000.00)"):
            parse_amount(value)


@pytest.mark.parametrize("text", NO_PLAIN_DECIMALS, ids=lambda text: ascii(text)[:20])
def test_a_text_that_is_no_plain_decimal_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"plain decimal string|characters"):
        parse_amount(text)


@pytest.mark.parametrize("value", NO_AMOUNTS, ids=repr)
def test_a_value_of_another_type_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="must be a number or a plain decimal string"):
        parse_amount(value)


@pytest.mark.parametrize("number", JSON_NUMBERS)
def test_a_number_of_any_sign_and_size_is_refused_in_words(number: str) -> None:
    with pytest.raises(ValueError, match=r"^must (be greater than 0|not exceed 100000.00)"):
        parse_amount(Decimal(number))


def test_a_number_that_is_not_finite_is_refused() -> None:
    for number in ("NaN", "sNaN", "Infinity", "-Infinity"):
        with pytest.raises(ValueError, match="must"):
            parse_amount(Decimal(number))


@given(st.decimals(min_value=0, max_value=200_000, allow_nan=False, allow_infinity=False))
def test_any_decimal_is_rounded_as_exact_arithmetic_rounds_its_digits(value: Decimal) -> None:
    expected = value.quantize(CENT, rounding=ROUND_HALF_EVEN, context=Context(prec=2_000))
    if 0 < expected <= AMOUNT_MAX:
        assert parse_amount(value) == expected
    else:
        with pytest.raises(ValueError, match=r"^must"):
            parse_amount(value)


@given(st.from_regex(r"\A(0|[1-9][0-9]{0,4})\.[0-9]{1,50}\Z"))
def test_any_plain_text_is_rounded_as_exact_arithmetic_rounds_its_digits(text: str) -> None:
    expected = Decimal(text).quantize(CENT, rounding=ROUND_HALF_EVEN, context=Context(prec=200))
    if expected > 0:
        assert parse_amount(text) == parse_amount(Decimal(text)) == expected
    else:
        with pytest.raises(ValueError, match="greater than 0"):
            parse_amount(text)


@given(st.text(max_size=70))
def test_any_other_text_is_refused_with_words_and_nothing_worse(text: str) -> None:
    try:
        amount = parse_amount(text)
    except ValueError as error:
        assert str(error)  # noqa: PT017 - most texts are refused, few are amounts
    else:
        assert text.isascii()
        assert amount == Decimal(text).quantize(CENT, rounding=ROUND_HALF_EVEN)


def test_currencies_are_upper_cased_and_have_the_decimals_of_iso_4217() -> None:
    assert parse_currency("inr") == "INR"
    exponents = currency_exponents()
    assert {code: exponents[code] for code in ("JPY", "INR", "KWD")} == {"JPY": 0, "INR": 2, "KWD": 3}
    for text in ("", "IN", "INRR", "XXX", "XTS", "XAU", "ınr", "iNR ", "inr\0"):
        with pytest.raises(ValueError, match="ISO 4217"):
            parse_currency(text)


def test_only_a_currency_without_a_minor_unit_demands_whole_amounts() -> None:
    check_minor_unit(Decimal("100.00"), "JPY")
    check_minor_unit(Decimal("100.25"), "KWD")
    check_minor_unit(Decimal("100.25"), "INR")
    with pytest.raises(ValueError, match="JPY"):
        check_minor_unit(Decimal("100.50"), "JPY")


async def charge_amount(api: httpx.AsyncClient, order_id: int, amount: str, **fields: str) -> httpx.Response:
    """Charges with `amount` put into the body as it is: a JSON number, or a string with its quotes."""
    others = json.dumps({"order_id": order_id, "user_id": 7, "payment_method": "UPI", **fields})
    body = others[:-1] + f', "amount": {amount}}}'
    headers = {"Idempotency-Key": f"amount-{order_id}", "Content-Type": "application/json"}
    return await api.post("/v1/payments/charge", content=body, headers=headers)


async def test_amounts_sent_over_http_are_rounded_on_their_digits_and_answered_as_numbers(
    api: httpx.AsyncClient,
) -> None:
    numbers = {digits: amount for digits, amount in ROUNDED.items() if not digits.startswith("00")}
    texts = {f'"{digits}"': amount for digits, amount in ROUNDED.items()}
    sent = {**numbers, **texts, '"5."': "5.00", "125e-3": "0.12", "1E2": "100.00"}
    for order_id, (spelled, amount) in enumerate(sent.items(), start=1):
        answer = await charge_amount(api, order_id, spelled)
        assert answer.status_code == 201, (spelled, answer.text)
        payment = answer.json(parse_float=Decimal, parse_int=Decimal)
        assert payment["amount"] == payment["transactions"][0]["amount"] == Decimal(amount), spelled
        read = await api.get(f"/v1/payments/{payment['payment_id']}")
        assert read.json(parse_float=Decimal)["amount"] == Decimal(amount)


async def test_what_is_no_amount_is_refused_over_http_with_one_entry_for_its_field(api: httpx.AsyncClient) -> None:
    texts = [json.dumps(text) for text in (*OUT_OF_RANGE, *NO_PLAIN_DECIMALS) if len(text) < 1_000]
    others = ["true", "false", "null", "[]", "{}", '["1"]', '"NaN"']
    for spelled in (*texts, *OUT_OF_RANGE, *JSON_NUMBERS, *others):
        answer = await charge_amount(api, 1, spelled)
        assert answer.status_code == 422, (spelled, answer.text)
        assert [error["field"] for error in answer.json()["errors"]] == ["amount"], spelled
    for spelled in ("NaN", "Infinity", "-Infinity", "+1", ".5", "5.", "01", "1,000"):
        answer = await charge_amount(api, 1, spelled)
        assert (answer.status_code, answer.json()["code"]) == (400, "malformed-json"), spelled
    assert (await api.get("/v1/payments")).json()["total"] == 0


async def test_an_amount_of_a_currency_without_minor_unit_is_whole_in_charges_and_refunds(
    api: httpx.AsyncClient,
) -> None:
    refused = await charge_amount(api, 1, '"100.5"', currency="JPY")
    assert refused.status_code == 422
    assert refused.json()["errors"] == [
        {"field": "amount", "message": "must be a whole amount, for JPY has no minor unit"}
    ]
    payment = (await charge_amount(api, 1, '"100.00"', currency="jpy")).json()
    assert (payment["amount"], payment["currency"]) == (100, "JPY")
    refund = f"/v1/payments/{payment['payment_id']}/refund"
    half = await api.post(refund, json={"reason": "Half of it", "amount": "50.50"})
    assert (half.status_code, half.json()["errors"][0]["field"]) == (422, "amount")
    whole = await api.post(refund, json={"reason": "Half of it", "amount": "50.00"})
    assert (whole.status_code, whole.json()["refunded_amount"]) == (200, 50)


async def test_an_amount_of_a_currency_with_three_decimals_is_rounded_to_two(api: httpx.AsyncClient) -> None:
    payment = (await charge_amount(api, 1, '"1.235"', currency="KWD")).json(parse_float=Decimal)
    assert (payment["amount"], payment["currency"]) == (Decimal("1.24"), "KWD")
