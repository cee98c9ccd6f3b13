"""The OpenAPI document: it is valid, it has the whole route table, and the server does what it says."""

import asyncio
import json
import os
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openapi_spec_validator import validate

from eci_pay import request_schemas
from eci_pay.errors import PayError, ValidationFailed
from eci_pay.idempotency import parse_key
from eci_pay.money import parse_amount
from eci_pay.requests import ChargeRequest, RefundRequest, parse_request
from server.openapi import CODES_OF_ACCESS, CODES_OF_ALL
from server.openapi_operations import DESCRIBED
from server.openapi_parts import PARAMETERS
from server.openapi_problems import PROBLEMS
from server.routes import TABLE
from tests.contract import document, resolved, validator
from tests.support import charge_fields

SCHEMATHESIS = Path(sys.executable).parent / "schemathesis"
CONFIG = Path(__file__).parent / "schemathesis.toml"
EXAMINATION_SECONDS_MAX = 150
"""It takes a tenth of that where nobody else is at work."""


def operations() -> dict[str, dict[str, Any]]:
    """The documented operations, by method and path."""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document()["paths"].items()
        for method, operation in methods.items()
        if method != "parameters"
    }


async def test_the_server_gives_a_valid_document(api: httpx.AsyncClient) -> None:
    answer = await api.get("/openapi.json")
    assert answer.status_code == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.json() == document()
    assert answer.json()["openapi"] == "3.1.0"
    validate(answer.json())


def test_the_document_has_every_route_with_all_its_answers_and_no_other() -> None:
    routed = {f"{method} {path}": operation for path, methods in TABLE.items() for method, operation in methods.items()}
    assert set(operations()) == set(DESCRIBED) == set(routed)
    for name, operation in operations().items():
        of_access = CODES_OF_ACCESS if routed[name].wants else ()
        codes = {*routed[name].codes, *of_access, *CODES_OF_ALL}
        statuses = {str(PROBLEMS[code].status) for code in codes}
        answers = operation["responses"]
        assert set(answers) == statuses | {str(status) for status in DESCRIBED[name].answers}
        documented = set()
        for status in statuses:
            (content,) = answers[status]["content"].items()
            assert content[0] == "application/problem+json"
            documented |= set(content[1]["examples"])
        assert documented == codes


def test_every_operation_has_a_name_of_its_own_and_a_known_tag() -> None:
    named = [operation["operationId"] for operation in operations().values()]
    assert len(set(named)) == len(named)
    assert {tag for operation in operations().values() for tag in operation["tags"]} == {
        tag["name"] for tag in document()["tags"]
    }


def test_every_example_is_what_its_schema_says() -> None:
    checked = 0
    for operation in operations().values():
        contents = [answer["content"] for answer in operation["responses"].values()]
        if "requestBody" in operation:
            contents.append(operation["requestBody"]["content"])
        for content in (part for parts in contents for part in parts.values()):
            for example in content["examples"].values():
                validator(json.dumps(content["schema"])).validate(example["value"])
                checked += 1
        for parameter in map(resolved, operation["parameters"]):
            if "example" in parameter:
                validator(json.dumps(parameter["schema"])).validate(parameter["example"])
    assert checked > 50


def accepts(schema: dict[str, Any], value: object) -> bool:
    """Whether a schema does."""
    return jsonschema_rs.validator_for(schema).is_valid(value)


def amount_taken(text: str) -> bool:
    """Whether the server takes an amount."""
    try:
        parse_amount(text)
    except ValueError:
        return False
    return True


AT_THE_LIMITS = (
    *("0", "0.005", "0.0051", "0.00500", "0.006", "0.01", "0000.0049", "1.", "99999.999", "00100000", "100001"),
    *("100000", "100000.", "100000.0049", "100000.005", "100000.0050", "100000.00501", "100000.006", "100000.01"),
)
NO_AMOUNTS = ("", ".5", "-1", "+1", " 1", "1e2", "1_0", "\u0661", "1" * 61, "0" * 60)


@pytest.mark.parametrize("text", [*AT_THE_LIMITS, *NO_AMOUNTS, "0" * 59 + "1"])
def test_the_pattern_of_an_amount_is_what_the_server_takes(text: str) -> None:
    assert accepts(request_schemas.AMOUNT, text) == amount_taken(text)


@given(st.from_regex(r"\A0{0,2}[0-9]{0,6}\.?0{0,3}[0-9]{0,4}\Z"))
def test_the_pattern_of_an_amount_is_what_the_server_takes_of_any_digits(text: str) -> None:
    assert accepts(request_schemas.AMOUNT, text) == amount_taken(text)


@given(st.decimals(min_value=0, max_value=Decimal("100000.01"), allow_nan=False, places=4))
def test_the_limits_of_a_number_are_what_the_server_takes(amount: Decimal) -> None:
    assert accepts(request_schemas.AMOUNT, float(amount)) == amount_taken(str(amount))


def reason_taken(text: str) -> bool:
    """Whether the server takes a reason."""
    try:
        parse_request(RefundRequest, {"reason": text})
    except ValidationFailed:
        return False
    return True


@given(st.text(alphabet=st.sampled_from("ab \t\n\x0b\x1c\x00\x85\xa0\u2003\u3000\ufeffé😀"), max_size=9))
def test_the_pattern_of_a_reason_is_what_the_server_takes(text: str) -> None:
    assert accepts(request_schemas.REASON, text) == reason_taken(text)


@pytest.mark.parametrize("length", [4, 5, 400, 401])
def test_the_length_of_a_reason_is_what_the_server_takes(length: int) -> None:
    text = f" {'é' * length}\n"
    assert accepts(request_schemas.REASON, text) == reason_taken(text) == (5 <= length <= 400)


def key_taken(text: str) -> bool:
    """Whether the server takes a key."""
    try:
        parse_key(text)
    except PayError:
        return False
    return True


KEYS = ("a", "a b", '"a"', '"a', 'a"', '""', '" "', r'"\""', r'"\a"', '"a"b"', "", "é", "a\tb", "\\", r'"\\"', '"\\"')


@pytest.mark.parametrize("text", [*KEYS, "x" * 255, "x" * 256, f'"{"x" * 255}"', f'"{"x" * 256}"'])
def test_the_pattern_of_a_key_is_what_the_server_takes(text: str) -> None:
    assert accepts(PARAMETERS["Idempotency-Key"]["schema"], text) == key_taken(text)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"currency": "JPY"},
        {"currency": "JPY", "amount": "100.5"},
        {"currency": "JPY", "amount": 100.5},
        {"currency": "XYZ"},
        {"payment_method": "credit_card"},
        {"order_id": 2**63 - 1},
        {"order_id": 2**63},
        {"order_id": 0},
        {"user_id": "1"},
        {"reference": ""},
        {"reference": "x" * 100},
        {"reference": "x" * 101},
        {"reference": "a\0"},
        {"reference": None},
        {"payment_token": "x" * 501},
        {"payment_token": "a\0"},
        {"amount": True},
        {"further": 1},
    ],
)
def test_the_schema_of_a_charge_is_what_the_server_takes(fields: dict[str, object]) -> None:
    body = charge_fields(**fields)  # type: ignore[arg-type]
    try:
        parse_request(ChargeRequest, body)
        taken = True
    except ValidationFailed:
        taken = False
    schema = json.dumps({"$ref": "#/components/schemas/ChargeRequest"})
    assert validator(schema).is_valid(body) == taken


async def test_schemathesis_finds_nothing(api: httpx.AsyncClient, tmp_path: Path) -> None:
    # From a file, for of what it loads from a server it leaves out the address that it was loaded from.
    file = tmp_path / "openapi.json"
    file.write_bytes((await api.get("/openapi.json")).content)
    process = await asyncio.create_subprocess_exec(
        SCHEMATHESIS,
        *("--config-file", CONFIG, "run", file, "--url", str(api.base_url)),
        cwd=tmp_path,  # it leaves its findings where it runs
        env={**os.environ, "PYTHONPATH": str(CONFIG.parent.parent)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(EXAMINATION_SECONDS_MAX):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    examined = re.search(r"Tested: (\d+)", printed.decode())
    assert examined is not None
    assert int(examined[1]) == len(operations())
