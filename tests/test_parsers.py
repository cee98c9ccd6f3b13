"""Whatever is fed to the parsers of what comes from outside, they give a valid value or the error that they promise."""

import io
import json
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from starlette.requests import Request as HttpRequest

from eci_pay import errors
from eci_pay.bulk_files import BulkKind, read_bulk_file
from eci_pay.context import bind_origin, current_origin
from eci_pay.idempotency import KEY_LENGTH_MAX, parse_key
from eci_pay.masking import masked_line
from eci_pay.money import AMOUNT_MAX, CENT, parse_amount, parse_currency
from eci_pay.requests import (
    FIELD_ERRORS_MAX,
    ID_MAX,
    ChargeRequest,
    CreateRequest,
    ListRequest,
    RefundRequest,
    Request,
    StatusUpdateRequest,
    parse_instant,
    parse_json,
    parse_order_id,
    parse_payment_id,
    parse_request,
)
from eci_pay.settlement_file import COLUMNS, copy_lines
from eci_pay.table_files import TableFile
from server.bodies import read_query

SECONDS_MAX = 1.0
"""For one call, on a machine that has other work too."""
quickly = settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.too_slow])

NUMBERS = st.one_of(
    st.integers(),
    st.integers(ID_MAX - 2, ID_MAX + 2),
    st.floats(),
    st.decimals(),
    st.from_regex(r"\A[-+]?[0-9]{0,30}\.?[0-9]{0,30}([eE][-+]?[0-9]{1,12})?\Z"),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text())
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
BYTES_LIKE_JSON = st.lists(
    st.sampled_from(
        [b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\\u", b"d800", b"1", b"e9", b"-", b".", b"null"]
    )
    | st.binary(max_size=3)
).map(b"".join)


def timed(call: Callable[[], Any], *promised: type[errors.PayError]) -> Any:
    """What a call gives; None where it raises what it promises."""
    began = time.perf_counter()
    try:
        return call()
    except promised:
        return None
    finally:
        assert time.perf_counter() - began < SECONDS_MAX


@quickly
@given(st.binary() | BYTES_LIKE_JSON | VALUES.map(lambda value: json.dumps(value, default=str).encode()))
@example(b"1e999999999")
@example(b"[" * 60_000)
@example(b"9" * 60_000)
@example(b'{"a":' * 12_000)
@example(b'"\\ud800"')
def test_json_is_a_value_or_malformed(body: bytes) -> None:
    value = timed(lambda: parse_json(body), errors.MalformedJson)
    if value is not None and "E" not in repr(value):
        assert json.loads(body) is not None


@pytest.mark.parametrize("model", [ChargeRequest, CreateRequest, RefundRequest, StatusUpdateRequest, ListRequest])
@quickly
@given(data=st.data())
def test_a_request_is_valid_or_tells_the_faults_of_its_fields(model: type[Request], data: st.DataObject) -> None:
    likely = st.sampled_from(["1", 1, "INR", "UPI", "CREDIT_CARD", "100.00", "FAILED", "Damaged in transit"])
    names = st.sampled_from([*model.model_fields]) | st.text(max_size=5)
    fields = data.draw(st.dictionaries(names, likely | VALUES) | VALUES)
    try:
        request = timed(lambda: parse_request(model, fields))
    except errors.ValidationFailed as error:
        told = error
    else:
        for value in request.model_dump(mode="json").values():
            assert "\0" not in str(value)
            str(value).encode()
        return
    assert 1 <= len(told.errors) <= FIELD_ERRORS_MAX
    assert all(fault.message for fault in told.errors)
    told.detail.encode()


@quickly
@given(NUMBERS | SCALARS)
@example("9" * 60_000)
def test_an_amount_is_one_of_ours_or_refused(value: object) -> None:
    began = time.perf_counter()
    try:
        amount = parse_amount(value)
    except ValueError:
        return
    finally:
        assert time.perf_counter() - began < SECONDS_MAX
    assert 0 < amount <= AMOUNT_MAX
    assert amount == amount.quantize(CENT)


@quickly
@given(st.text())
@example('"' + "\\" * 16_000)
def test_a_key_is_printable_or_refused(text: str) -> None:
    key = timed(lambda: parse_key(text), errors.IdempotencyKeyMissing, errors.IdempotencyKeyInvalid)
    assert key is None or (0 < len(key) <= KEY_LENGTH_MAX and key.isascii() and key.isprintable())


@quickly
@given(st.text() | st.from_regex(r"[0-9]{1,40}"))
@example("9" * 16_000)
@example("0" * 16_000 + "1")
@example("²")
def test_an_id_is_a_number_or_refused(text: str) -> None:
    for parse in (parse_payment_id, parse_order_id):
        number = timed(lambda parse=parse: parse(text), errors.ValidationFailed)  # type: ignore[misc]
        assert number is None or 1 <= number <= ID_MAX


@quickly
@given(
    st.text() | st.datetimes().map(str) | st.from_regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}(T[0-9:.]{2,15})?[-+Z0-9:]{0,6}")
)
def test_an_instant_is_in_utc_or_refused(text: str) -> None:
    instant = timed(lambda: parse_instant(text, "created_from"), errors.ValidationFailed)
    assert instant is None or instant.tzinfo == UTC


@quickly
@given(st.text())
def test_a_currency_is_one_or_refused(text: str) -> None:
    with suppress(ValueError):
        assert re.fullmatch("[A-Z]{3}", parse_currency(text))


@quickly
@given(st.none() | st.text(), st.none() | st.text())
def test_a_request_id_is_printable_whatever_was_sent(request_id: str | None, traceparent: str | None) -> None:
    bound = bind_origin(request_id, traceparent)
    assert bound
    assert bound.isascii()
    assert bound.isprintable()
    assert re.fullmatch("[0-9a-f]{32}|", current_origin().trace_id)


ROWS = st.lists(st.lists(st.text(max_size=10) | NUMBERS.map(str), max_size=10), max_size=4)


def in_csv(header: str, rows: list[list[str]]) -> bytes:
    """Rows as they come, quoted or not."""
    return "\n".join([header, *(",".join(row) for row in rows)]).encode("utf-8", "surrogatepass")


@quickly
@given(st.binary() | BYTES_LIKE_JSON | ROWS.map(lambda rows: in_csv(",".join(COLUMNS), rows)))
def test_a_settlement_file_is_read_or_tells_where_it_is_wrong(content: bytes) -> None:
    timed(lambda: list(copy_lines(TableFile(io.BytesIO(content), "day.csv"))), errors.FileInvalid)


@pytest.mark.parametrize(
    ("kind", "header"),
    [
        (BulkKind.REFUND, "payment_id,amount,reason"),
        (BulkKind.CHARGE, "order_id,user_id,amount,currency,payment_method"),
    ],
)
@quickly
@given(data=st.data())
def test_a_bulk_file_is_read_or_tells_where_it_is_wrong(kind: BulkKind, header: str, data: st.DataObject) -> None:
    content = data.draw(st.binary() | BYTES_LIKE_JSON | ROWS.map(lambda rows: in_csv(header, rows)))
    timed(lambda: read_bulk_file(kind, io.BytesIO(content), "rows.csv"), errors.FileInvalid)


NASTY = (
    "4111 1111 1111 1111",
    "a@",
    "+1",
    "token=",
    '"',
    "\\",
    "://",
    "password: ",
    "bearer ",
    "_secret_",
    "-",
    " ",
    "9",
)


def test_no_query_takes_long_to_read() -> None:
    query = "&".join(f"{number:x}" for number in range(20_000)).encode()
    began = time.perf_counter()
    with pytest.raises(errors.ValidationFailed):
        read_query(HttpRequest({"type": "http", "query_string": query, "headers": []}))
    assert time.perf_counter() - began < SECONDS_MAX


@pytest.mark.parametrize("unit", [*NASTY, *(one + other for one in NASTY for other in NASTY if one < other)])
def test_no_text_takes_long_to_mask(unit: str) -> None:
    text = unit * (4000 // len(unit))
    began = time.perf_counter()
    masked_line(json.dumps({"path": text}))
    assert time.perf_counter() - began < SECONDS_MAX
