"""What an attacker would send: it is refused clearly and quickly, nothing of ours is told, nothing is lost."""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import quantiles
from urllib.parse import quote

import httpx
import psutil
import pytest

from eci_pay.logs import LogFormat
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from tests.http_server import client_of, opening
from tests.log_lines import logged
from tests.raw_http import HOST, RawAnswer, answer_to, charging, connected
from tests.support import Books, RecordingGateway, charge_fields

BODY = json.dumps(charge_fields()).encode()
CHARGE = "/v1/payments/charge"
JSON = {"Content-Type": "application/json"}
REASON = "Damaged in transit"
PROBLEMS = {400, 404, 405, 413, 415, 422, 431}
LEAKS = (
    *("Traceback", "site-packages", ".py", "psycopg", "sqlalchemy", "pydantic", "syntax error", "DETAIL:", "pg_"),
    *("relation ", 'column "', "Decimal", "<class", "codec", "/tmp/", "/root", "/home", "/usr", "0x"),
)
SECONDS_MAX = 2.0
"""How long the slowest answer may take, on a machine that has other work too."""


def tells_nothing(text: str, *said: str) -> bool:
    """Whether an answer speaks of nothing of ours, beside what the client has `said`."""
    for own in said:
        text = text.replace(own, "")
    assert [leak for leak in LEAKS if leak in text] == [], text
    return True


def is_refusal(answer: httpx.Response | RawAnswer, *said: str) -> bool:
    """Whether it is a problem of the client's."""
    status = answer.status if isinstance(answer, RawAnswer) else answer.status_code
    content_type = answer.headers["content-type"]
    text = (answer.body if isinstance(answer, RawAnswer) else answer.content).decode()
    assert status in PROBLEMS, (status, text)
    assert content_type == "application/problem+json"
    return tells_nothing(text, *said)


async def nothing_was_recorded(books: Books, gateway: RecordingGateway) -> bool:
    """Whether neither we nor the gateway know of anything."""
    assert await books.value("SELECT count(*) FROM payments") == 0
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 0
    return gateway.charges == []


def head(*lines: bytes) -> bytes:
    """A charge with these lines instead of its length."""
    return b"\r\n".join([charging(b"")[:-4].replace(b"\r\nContent-Length: 0", b""), *lines, b"", b""])


CHUNKED = b"Transfer-Encoding: chunked"
LENGTH = b"Content-Length: %d" % len(BODY)
WHOLE = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)
SMUGGLED = {
    "both lengths": head(LENGTH, CHUNKED) + WHOLE,
    "both lengths, the other way round": head(CHUNKED, LENGTH) + WHOLE,
    "two lengths": head(LENGTH, b"Content-Length: 1") + BODY,
    "the same length twice": head(LENGTH, LENGTH) + BODY,
    "a list of lengths": head(LENGTH + b", %d" % len(BODY)) + BODY,
    "a signed length": head(b"Content-Length: +%d" % len(BODY)) + BODY,
    "a negative length": head(b"Content-Length: -1") + BODY,
    "a hexadecimal length": head(b"Content-Length: 0x%x" % len(BODY)) + BODY,
    "an empty length": head(b"Content-Length:") + BODY,
    "a length beyond all numbers": head(b"Content-Length: " + b"9" * 30) + BODY,
    "a space before the colon": head(b"Content-Length : %d" % len(BODY)) + BODY,
    "another coding": head(b"Transfer-Encoding: gzip, chunked") + WHOLE,
    "another coding last": head(b"Transfer-Encoding: chunked, gzip") + WHOLE,
    "an unknown coding": head(b"Transfer-Encoding: xchunked") + WHOLE,
    "no coding": head(b"Transfer-Encoding: identity") + WHOLE,
    "two codings": head(CHUNKED, CHUNKED) + WHOLE,
    "a hidden coding": head(b"Transfer-Encoding: \x0bchunked") + WHOLE,
    "chunks in HTTP/1.0": head(CHUNKED).replace(b"HTTP/1.1", b"HTTP/1.0") + WHOLE,
    "a negative chunk": head(CHUNKED) + b"-5\r\n" + BODY,
    "a hexadecimal sign": head(CHUNKED) + b"0x" + WHOLE,
    "a chunk beyond all numbers": head(CHUNKED) + b"f" * 20 + b"\r\n" + BODY,
    "a space after a size": head(CHUNKED) + b"%x \r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    "a chunk longer than it says": head(CHUNKED) + b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "chunks ended by line feeds": head(CHUNKED) + WHOLE.replace(b"\r\n", b"\n"),
    "an extension ended by a line feed": head(CHUNKED) + b"%x;a\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
    "lines ended by line feeds": (head(LENGTH) + BODY).replace(b"\r\n", b"\n"),
    "a line ended by a line feed": head(LENGTH).replace(HOST, b"Host: payments\n") + BODY,
    "a line ended by a carriage return": head(LENGTH).replace(HOST, b"Host: payments\r") + BODY,
    "a folded line": head(LENGTH, b"X-A: b\r\n c") + BODY,
    "a folded first line": head(LENGTH).replace(HOST, b" " + HOST) + BODY,
    "NUL in a value": head(LENGTH, b"X-A: b\0c") + BODY,
    "control characters in a value": head(LENGTH, b"X-A: \x1b[31m") + BODY,
    "NUL in a name": head(LENGTH, b"X\0A: b") + BODY,
    "no name": head(LENGTH, b": b") + BODY,
    "no host": head(LENGTH).replace(HOST, b"") + BODY,
    "two hosts": head(LENGTH).replace(HOST, HOST + HOST) + BODY,
    "another version": head(LENGTH).replace(b"HTTP/1.1", b"HTTP/2.0") + BODY,
    "an old version": head(LENGTH).replace(b"HTTP/1.1", b"HTTP/0.9") + BODY,
    "no version": head(LENGTH).replace(b" HTTP/1.1", b"") + BODY,
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a tunnel": b"CONNECT payments:443 HTTP/1.1\r\n" + HOST + b"\r\n",
    "a method in lower case": head(LENGTH).replace(b"POST", b"post") + BODY,
    "no method": b" " + head(LENGTH) + BODY,
    "a target in UTF-8": head(LENGTH).replace(b"/charge", "/chärge".encode()) + BODY,
    "NUL in a target": head(LENGTH).replace(b"/charge", b"/char\0ge") + BODY,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40,
}


@pytest.mark.parametrize("data", SMUGGLED.values(), ids=SMUGGLED)
async def test_what_others_on_the_way_may_understand_otherwise_is_400_and_ends_its_connection(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway, data: bytes
) -> None:
    async with connected(api) as client:
        await client.send(data)
        answer = await client.answer()
        assert (answer.status, answer.json["code"]) == (400, "bad-request")
        assert is_refusal(answer)
        assert await client.is_closed()
    assert await nothing_was_recorded(books, gateway)


async def test_trailers_are_no_headers(api: httpx.AsyncClient, books: Books, gateway: RecordingGateway) -> None:
    trailers = b"Idempotency-Key: smuggled\r\nX-Request-ID: smuggled\r\n"
    keyless = (head(CHUNKED) + WHOLE).replace(b"Idempotency-Key: k\r\n", b"")
    answer = await answer_to(api, keyless[:-2] + trailers + b"\r\n")
    assert (answer.status, answer.json["code"]) == (400, "idempotency-key-missing")
    assert await nothing_was_recorded(books, gateway)
    answer = await answer_to(api, (head(CHUNKED) + WHOLE)[:-2] + trailers + b"\r\n")
    assert (answer.status, answer.headers["x-request-id"] == "smuggled") == (201, False)


async def test_a_whole_address_is_taken_for_its_path(api: httpx.AsyncClient) -> None:
    for target in (b"http://payments/health", b"http://elsewhere.example/health"):
        assert (await answer_to(api, b"GET " + target + b" HTTP/1.1\r\n" + HOST + b"\r\n")).status == 200


SQL = (
    *("'", '"', "\\", "1; DROP TABLE payments", "1' OR '1'='1", "1) OR (1=1", "1--", "%", "$1", "%s", "%(order_id)s"),
    *("{0}", "'; COMMIT; --", "\ufeff1", "１", "ʼ; --", "1e1", "1_0", "+1"),
)


async def test_sql_is_text_wherever_it_is_sent(api: httpx.AsyncClient, books: Books, gateway: RecordingGateway) -> None:
    async def post(path: str, fields: dict[str, object]) -> httpx.Response:
        return await api.post(path, json=fields, headers={"Idempotency-Key": f"k{random.random()}"})

    def fields(**changed: object) -> dict[str, object]:
        return {**charge_fields(next(numbers)), **changed}

    numbers = iter(range(1, 10_000))
    paid = (await post(CHARGE, fields())).json()["payment_id"]
    for text in SQL:
        for name in ("order_id", "user_id", "currency", "payment_method", text):
            assert is_refusal(await post(CHARGE, fields(**{name: text})), text), (name, text)
        assert (await post(CHARGE, fields(amount=text))).status_code in (201, 422)
        stored = await post(CHARGE, fields(reference=text, payment_token=text))
        assert (stored.status_code, stored.json()["reference"]) == (201, text)
        refunded = await post(f"/v1/payments/{paid}/refund", {"reason": f"Damaged {text}", "amount": "0.01"})
        assert (refunded.status_code, refunded.json()["refunds"][-1]["reason"]) == (200, f"Damaged {text}".strip())
        assert is_refusal(await post(f"/v1/payments/{paid}/refund", {"reason": REASON, "amount": f"x{text}"}))
        assert is_refusal(await api.patch(f"/v1/payments/{paid}/status", json={"status": text}))
        encoded = quote(text, safe="")
        for path in (f"/v1/payments/{encoded}", f"/v1/payments/order/{encoded}", f"/v1/payments/transaction/{encoded}"):
            assert is_refusal(await api.get(path)), path
        for name in ("status", "payment_method", "user_id", "created_from", "created_to", "page", "cursor", encoded):
            assert is_refusal(await api.get(f"/v1/payments?{name}={encoded}"), text), (name, text)
        if text.isascii():
            headers = {"X-Request-ID": text, "traceparent": text, "Idempotency-Key": f"{text}!", "Content-Type": text}
            assert is_refusal(await api.post(CHARGE, json=fields(), headers=headers), text)
            answer = await api.post(CHARGE, json=fields(), headers={**headers, **JSON})
            assert answer.status_code == 201 or (text == '"' and is_refusal(answer, text)), text
    pending = (await post("/v1/payments", fields())).json()["payment_id"]
    changed = await api.patch(
        f"/v1/payments/{pending}/status", json={"status": "COMPLETED", "gateway_response": SQL[5]}
    )
    assert changed.json()["gateway_response"] == SQL[5]
    assert await books.value("SELECT count(*) FROM payments WHERE status = 'COMPLETED'") == len(gateway.charges) + 1
    assert {charge.amount > 0 for charge in gateway.charges} == {True}


SIZE = 60_000
BOMBS = {
    "arrays": b"[" * SIZE,
    "closed arrays": b"[" * (SIZE // 2) + b"]" * (SIZE // 2),
    "objects": b'{"a":' * (SIZE // 5),
    "both": b'[{"a":' * (SIZE // 6),
    "arrays in a field": b'{"order_id":' + b"[" * (SIZE // 2) + b"]" * (SIZE // 2) + b"}",
    "a number of any length": b'{"order_id":' + b"9" * SIZE + b"}",
    "an amount of any length": b'{"amount":' + b"9" * SIZE + b"}",
    "an exact amount": b'{"amount":0.' + b"0" * SIZE + b"1}",
    "an amount in text": b'{"amount":"' + b"9" * SIZE + b'"}',
    "an exponent": b'{"order_id":1e999999999,"amount":1e999999999}',
    "a small exponent": b'{"order_id":1e-999999999,"amount":1e-999999999}',
    "exponents everywhere": b"[" + b"1e999999," * (SIZE // 10) + b"1]",
    "a negative zero": b'{"order_id":-0,"amount":-0}',
    "a long name": b'{"' + b"a" * SIZE + b'":1}',
    "many names": b"{" + b",".join(b'"%d":1' % n for n in range(SIZE // 10)) + b"}",
    "names whose hashes are alike": b"{" + b",".join(b'"%x":1' % (n * 2**61) for n in range(1500)) + b"}",
    "one name again and again": b"{" + b'"a":1,' * (SIZE // 7) + b'"a":1}',
    "one name twice": b'{"order_id":1,"order_id":2}',
    "one name written in two ways": b'{"order_id":1,"order\\u005fid":2}',
    "white space": b" " * SIZE,
    "a long string": b'{"reference":"' + b"a" * SIZE + b'"}',
    "escapes": b'{"reference":"' + b"\\u0061" * (SIZE // 6) + b'"}',
    "an open string": b'"' * (SIZE + 1),
    "backslashes": b'"' + b"\\" * SIZE,
    "NUL": b"\0" * SIZE,
    "NUL in a text": json.dumps(charge_fields(reference="a\0b")).encode(),
    "a lone surrogate": json.dumps(charge_fields(reference="\ud800")).encode(),
    "a lone surrogate in a name": json.dumps(charge_fields(**{"\udfff": 1})).encode(),
    "a lone surrogate in an unknown value": b'{"status":"\\ud800"}',
    "surrogates in UTF-8": b'{"reference":"\xed\xa0\x80"}',
    "overlong UTF-8": b'{"reference":"\xc0\xaf"}',
    "half a character": b'{"reference":"\xf0\x9f"}',
    "UTF-16": '{"order_id":1}'.encode("utf-16"),
    "UTF-32": '{"order_id":1}'.encode("utf-32"),
    "a byte order mark": b"\xef\xbb\xbf" + BODY,
    "a comment": b"/* */" + BODY,
    "two documents": BODY + BODY,
    "NaN": b'{"amount":NaN}',
    "single quotes": BODY.replace(b'"', b"'"),
    "a word": b"null",
    "a prototype": json.dumps(charge_fields(__proto__={"amount": 1}, constructor=1)).encode(),
    "our own names": json.dumps(charge_fields(__class__=1, model_config={}, model_fields=1, __init__=1)).encode(),
}


async def test_no_body_costs_more_than_a_moment(
    api: httpx.AsyncClient, books: Books, gateway: RecordingGateway
) -> None:
    routes = (("POST", CHARGE), ("POST", "/v1/payments"), ("POST", "/v1/payments/1/refund"))
    for name, body in BOMBS.items():
        for method, path in (*routes, ("PATCH", "/v1/payments/1/status"), ("POST", "/v1/gateway/events")):
            began = time.perf_counter()
            answer = await api.request(method, path, content=body, headers={**JSON, "Idempotency-Key": "k"})
            assert time.perf_counter() - began < SECONDS_MAX, name
            assert is_refusal(answer, *map(str, BOMBS)), name
            assert len(answer.content) < 20_000, name
    assert await nothing_was_recorded(books, gateway)


PATHS = (
    *("/v1/payments/%2e%2e/", "/v1/payments/%2e%2e/charge", "/v1/payments/../payments/1", "/v1//payments/1"),
    *("//v1/payments", "/v1/payments//", "/v1/payments/", "/v1/payments/1/", "/v1/payments/1;a=b", "/v1;/payments/1"),
    *("/v1/payments/1%2f", "/v1/payments/%2f1", "/v1%2fpayments/1%2f%2e%2e", "/v1/payments/1%00", "/v1/payments/%00"),
    *(
        "/v1/payments/order/%2500",
        "/v1/payments/transaction/%00",
        "/v1/payments/transaction/%c0%af",
        "/v1/payments/%ff",
    ),
    *("/v1/payments/transaction/%ed%a0%80", "/v1/payments/%c0%ae%c0%ae/", "/v1/payments/%u0031", "/v1/payments/%"),
    *("/v1/payments/%zz", "/V1/PAYMENTS/1", "/v1/payments/１", "/v1/payments/%EF%BC%91", "/v1/payments/1%0d%0aA:b"),
    *("/v1/payments/" + "9" * 5000, "/v1/payments/transaction/" + "x" * 10_000, "/" + "a/" * 5000, "/" + "%41" * 3000),
    *("/v1/payments/1%20", "/v1/payments/%201", "/v1/payments/+1", "/v1/payments/-1", "/v1/payments/1.0", "/\\..\\"),
    *("/.git/config", "/.env", "/etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/docs/../server/app.py", "/server/app.py"),
    *("/docs/%2e%2e/openapi.json", "/docs//x", "/openapi.json/", "/metrics/", "/health/", "/health/../metrics", "*"),
)


async def test_no_path_leads_elsewhere(api: httpx.AsyncClient) -> None:
    for path in PATHS:
        if not path.isascii():
            continue
        for method in (b"GET", b"POST", b"DELETE"):
            request = method + b" " + path.encode() + b" HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n\r\n"
            began = time.perf_counter()
            answer = await answer_to(api, request)
            assert time.perf_counter() - began < SECONDS_MAX
            assert is_refusal(answer), path


FORGED = '\r\n{"event":"request","level":"info","forged":true}\r\n\x1b[2J\x1b]0;owned\x07\x9b31m\x85\u2028\u202e\0\x7f'


@pytest.mark.parametrize("log_format", ["json", "console"])
async def test_no_input_forges_a_line_of_the_log(api: httpx.AsyncClient, log_format: LogFormat) -> None:
    encoded = quote(FORGED, safe="")
    latin = FORGED.encode("latin-1", "ignore")
    visible = bytes(byte for byte in latin if byte >= 32 and byte != 127)
    numbers = iter(range(1, 100))

    async def post(fields: dict[str, object]) -> httpx.Response:
        return await api.post(CHARGE, json=fields, headers={"Idempotency-Key": "k"})

    def raw(*parts: bytes) -> Callable[[], Awaitable[RawAnswer]]:
        return lambda: answer_to(api, b"".join(parts))

    sent: list[Callable[[], Awaitable[object]]] = [
        lambda: api.get(f"/v1/payments/{encoded}"),
        lambda: api.get(f"/v1/payments/transaction/{encoded}"),
        lambda: api.get(f"/{encoded}?{encoded}={encoded}"),
        lambda: api.get(f"/v1/payments?status={encoded}&{encoded}=1"),
        lambda: post(charge_fields(next(numbers), **{FORGED: 1})),
        lambda: post(charge_fields(next(numbers), reference=FORGED, payment_method=FORGED, currency=FORGED)),
        lambda: post(charge_fields(next(numbers), reference=FORGED.replace("\0", ""), payment_token=FORGED[:-3])),
        raw(b"GET /health HTTP/1.1\r\n", HOST, b"X-Request-ID: ", visible, b"\r\n\r\n"),
        raw(b"GET /health HTTP/1.1\r\n", HOST, b"traceparent: ", visible, b"\r\n\r\n"),
        raw(b"GET /health HTTP/1.1\r\n", HOST, b"X-Request-ID: ", latin, b"\r\n\r\n"),
        raw(b"GET /", latin, b" HTTP/1.1\r\n", HOST, b"\r\n"),
        raw(latin, b" / HTTP/1.1\r\n", HOST, b"\r\n"),
        raw(charging(BODY, key=visible)),
    ]
    with logged(log_format, level="DEBUG") as lines:
        for send in sent:
            await send()
        told = lines()
    assert len([line for line in told if "request" in line]) >= len(sent)
    for line in told:
        assert line.isprintable(), line
        if log_format == "json":
            assert "forged" not in json.loads(line)


async def test_a_long_path_is_cut_in_the_log_and_costs_no_more_than_a_moment(api: httpx.AsyncClient) -> None:
    with logged("json") as lines:
        for unit in ("-_secret_", "4111 1111 1111 1111 ", "a@", "://"):
            began = time.perf_counter()
            await answer_to(api, f"GET /{quote(unit, safe='') * 300} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
            assert time.perf_counter() - began < SECONDS_MAX, unit
        told = [line for line in lines() if '"logger":"server.requests"' in line]
    assert len(told) == 4
    assert max(map(len, told)) < 2000


MALFORMED_REQUESTS = 10_000
CLIENTS = 32
FILLER = b"\0" * 80_000
"""Ends whatever a server still waits for: more than any body, and no request."""
SEED = 20261123
ALPHABET = b"\0\t\n\r !\"#$%&'()*+,-./0123456789:;<=>?@AZ[\\]^_`az{|}~\x7f\x80\xc0\xed\xff"


def requests_to_spoil() -> list[bytes]:
    """Valid ones of every kind."""
    refund = json.dumps({"reason": REASON, "amount": "0.01"}).encode()
    status = json.dumps({"status": "CANCELLED"}).encode()
    return [
        charging(BODY),
        head(CHUNKED) + WHOLE,
        charging(BODY).replace(CHARGE.encode(), b"/v1/payments"),
        charging(refund).replace(CHARGE.encode(), b"/v1/payments/1/refund"),
        charging(status).replace(b"POST", b"PATCH").replace(CHARGE.encode(), b"/v1/payments/1/status"),
        charging(BODY).replace(CHARGE.encode(), b"/v1/gateway/events"),
        *(
            method + b" " + path + b" HTTP/1.1\r\n" + HOST + b"Accept: */*\r\nX-Request-ID: mine\r\n\r\n"
            for method, path in (
                (b"GET", b"/v1/payments?status=COMPLETED&page=1&page_size=10&created_from=2026-11-01"),
                (b"GET", b"/v1/payments/1"),
                (b"GET", b"/v1/payments/order/1"),
                (b"GET", b"/v1/payments/transaction/TXN01M82K73A83433WHCDRPSSAG4Q"),
                (b"DELETE", b"/v1/payments/1"),
                (b"GET", b"/health/ready"),
                (b"GET", b"/docs"),
            )
        ),
    ]


def spoiled(chance: random.Random, request: bytes) -> bytes:
    """A request after some accidents; where its body is hit, its length is often made true again."""
    data = bytearray(request)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(data) + 1)
        end = min(len(data), at + chance.randint(0, 12))
        some = bytes(chance.choice(ALPHABET) for _ in range(chance.randint(1, 8)))
        match chance.randrange(6):
            case 0:
                data[at:end] = b""
            case 1:
                data[at:at] = some
            case 2:
                data[at:end] = some
            case 3:
                data[at:at] = data[at:end] * chance.randint(1, 50)
            case 4:
                data[at:at] = b"%%%02x" % chance.randrange(256)
            case _:
                lines = bytes(data).split(b"\r\n")
                lines.insert(chance.randrange(len(lines)), chance.choice(lines))
                data = bytearray(b"\r\n".join(lines))
    whole, found, body = bytes(data).partition(b"\r\n\r\n")
    if found and b"Content-Length: " in whole and chance.random() < 0.8:
        before, _, after = whole.partition(b"Content-Length: ")
        whole = before + b"Content-Length: %d" % len(body) + after.lstrip(b"0123456789")
    return whole + found + body


@pytest.fixture
async def busy(settings: Settings, service: PaymentService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that waits for nobody for long."""
    changed = settings.model_copy(update={"eci_pay_read_timeout_seconds": 1.0})
    async with client_of(changed, opening(service)) as client:
        yield client


async def test_ten_thousand_malformed_requests_are_answered_quickly_and_tell_nothing(
    busy: httpx.AsyncClient, books: Books, caplog: pytest.LogCaptureFixture
) -> None:
    chance = random.Random(SEED)
    valid = requests_to_spoil()
    waiting = [spoiled(chance, chance.choice(valid)) for _ in range(MALFORMED_REQUESTS)]
    durations: list[float] = []
    statuses: set[int] = set()

    async def attack() -> None:
        while waiting:
            async with connected(busy) as client:
                while waiting and not client.reader.at_eof():
                    data = waiting.pop()
                    began = time.perf_counter()
                    await client.send(data)
                    try:
                        try:
                            answer = await asyncio.wait_for(client.answer(to_head=data.startswith(b"HEAD")), 0.1)
                        except TimeoutError:
                            began = time.perf_counter()
                            await client.send(FILLER)
                            answer = await client.answer()
                    except (asyncio.IncompleteReadError, ConnectionError):
                        break
                    durations.append(time.perf_counter() - began)
                    statuses.add(answer.status)
                    assert answer.status < 500, (data, answer)
                    if "problem" in answer.headers["content-type"]:
                        tells_nothing(answer.body.decode(), data.decode("latin-1"))
                    if answer.headers.get("connection") == "close":
                        break

    memory = psutil.Process().memory_info().rss
    await asyncio.gather(*(attack() for _ in range(CLIENTS)))
    grown = psutil.Process().memory_info().rss - memory
    assert len(durations) > MALFORMED_REQUESTS * 0.9
    assert statuses >= {400, 404, 405, 415, 422}
    assert quantiles(durations, n=100)[98] < SECONDS_MAX
    assert grown < 100_000_000
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []
    assert (await busy.get("/health/ready")).status_code == 200
    answer = await busy.post(CHARGE, json=charge_fields(10**9), headers={"Idempotency-Key": "after"})
    assert answer.status_code == 201
