"""What one connection may take: the size of a head, the time to send and to read, places, and requests in progress."""

import asyncio
import json
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import psutil
import pytest

from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from server import docs
from server.connections import HEADERS_MAX, PIPELINE_MAX, SURPLUS_MAX
from tests.http_server import client_of, opening
from tests.log_lines import logged
from tests.raw_http import HOST, RawAnswer, RawClient, answer_to, charging, connected
from tests.support import Books, CommandLine, RecordingGateway, charge_fields, until
from tests.test_http_errors import SwitchedGateway
from tests.test_serving import serving

HEALTH = b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"
BODY = json.dumps(charge_fields()).encode()
TIMEOUT_SECONDS = 0.5
CONNECTIONS_MAX = 3


@pytest.fixture
def gateway() -> SwitchedGateway:
    """Answers at once unless a test holds it back."""
    return SwitchedGateway()


@pytest.fixture
async def impatient(settings: Settings, service: PaymentService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that waits for nobody for long."""
    changed = settings.model_copy(update={"eci_pay_read_timeout_seconds": TIMEOUT_SECONDS})
    async with client_of(changed, opening(service)) as client:
        yield client


@pytest.fixture
async def crowded(settings: Settings, service: PaymentService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that has few places."""
    changed = {"eci_pay_connections_max": CONNECTIONS_MAX, "eci_pay_requests_max": 2}
    async with client_of(settings.model_copy(update=changed), opening(service)) as client:
        yield client


def is_problem(answer: RawAnswer, status: int, code: str) -> bool:
    """Whether that is what it is, complete and guarded, and the end of its connection."""
    document, headers = answer.json, answer.headers
    assert (answer.status, document["code"], document["status"]) == (status, code, status), answer
    assert headers["content-type"] == "application/problem+json"
    assert document["request_id"] == headers["x-request-id"]
    assert (headers["cache-control"], headers["x-content-type-options"]) == ("no-store", "nosniff")
    assert headers["connection"] == "close"
    return True


async def nothing_was_recorded(books: Books, gateway: RecordingGateway) -> bool:
    """Whether neither we nor the gateway know of anything."""
    assert await books.value("SELECT count(*) FROM payments") == 0
    assert await books.value("SELECT count(*) FROM idempotency_keys") == 0
    return gateway.charges == []


async def charged(client: RawClient, order_id: int) -> RawAnswer:
    """Charges an order."""
    body = json.dumps(charge_fields(order_id)).encode()
    await client.send(charging(body, key=b"k%d" % order_id))
    return await client.answer()


def padded(size: int) -> bytes:
    """A request for health whose head has about so many bytes, in some headers."""
    return HEALTH[:-2] + b"".join(b"X-%d: %s\r\n" % (n, b"x" * (size // 10)) for n in range(10)) + b"\r\n"


async def test_a_head_above_the_limit_is_431_in_whatever_pieces_it_comes(
    api: httpx.AsyncClient, settings: Settings
) -> None:
    limit = settings.eci_pay_headers_max_bytes
    long = padded(limit)
    endless = HEALTH[:-2] + b"X: " + b"x" * limit
    path = b"GET /" + b"x" * limit + b" HTTP/1.1\r\n" + HOST + b"\r\n"
    for data in (long, endless, path, b"GET /" + b"x" * limit):
        assert is_problem(await answer_to(api, data), 431, "headers-too-large")
        async with connected(api) as client:
            for start in range(0, len(data), 5000):
                await client.send(data[start : start + 5000])
                await asyncio.sleep(0)
            assert is_problem(await client.answer(), 431, "headers-too-large")
            assert await client.is_closed()
    assert (await answer_to(api, padded(limit - 500))).status == 200


async def test_a_large_head_behind_another_request_is_431_after_that_ones_answer(
    api: httpx.AsyncClient, settings: Settings
) -> None:
    async with connected(api) as client:
        await client.send(HEALTH + padded(settings.eci_pay_headers_max_bytes) + HEALTH)
        assert (await client.answer()).status == 200
        assert is_problem(await client.answer(), 431, "headers-too-large")
        assert await client.is_closed()


async def test_a_body_does_not_count_as_the_head_of_the_next_request(
    api: httpx.AsyncClient, settings: Settings
) -> None:
    body = BODY + b" " * (settings.eci_pay_body_max_bytes - len(BODY))
    async with connected(api) as client:
        await client.send(charging(body) + HEALTH[:-4])
        assert (await client.answer()).status == 201
        await client.send(HEALTH[-4:])
        assert (await client.answer()).status == 200


async def test_too_many_headers_are_431(api: httpx.AsyncClient) -> None:
    many = HEALTH[:-2] + b"A: b\r\n" * (HEADERS_MAX - 1)
    assert (await answer_to(api, many + b"\r\n")).status == 200
    assert is_problem(await answer_to(api, many + b"A: b\r\n\r\n"), 431, "headers-too-large")


@pytest.mark.parametrize(
    "framing",
    [
        b"0\r\n" + b"T: t\r\n" * 10_000,
        b"0\r\nT: " + b"t" * 50_000,
        b"1;x=" + b"y" * 50_000,
        b"0\r\n" + b"T: t\r\n" * 10_000 + b"\r\n",
    ],
    ids=["endless trailers", "a long trailer", "a long chunk extension", "many trailers"],
)
async def test_what_surrounds_the_chunks_of_a_body_is_bounded_too(
    api: httpx.AsyncClient, books: Books, gateway: SwitchedGateway, framing: bytes
) -> None:
    head = charging(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    async with connected(api) as client:
        await client.send(head)
        for start in range(0, len(framing), 8192):
            await client.send(framing[start : start + 8192])
            await asyncio.sleep(0.001)
        answer = await client.answer()
    assert answer.json["code"] in ("headers-too-large", "malformed-json")
    assert framing.endswith(b"\r\n\r\n") or is_problem(answer, 431, "headers-too-large")
    assert await nothing_was_recorded(books, gateway)


async def test_a_head_that_does_not_come_is_408(impatient: httpx.AsyncClient) -> None:
    for part in (b"G", HEALTH[:20], HEALTH[:-1]):
        async with connected(impatient) as client:
            await client.send(part)
            assert is_problem(await client.answer(), 408, "request-timeout")
            assert await client.is_closed()


async def test_a_head_that_trickles_in_is_408_all_the_same(impatient: httpx.AsyncClient) -> None:
    async def trickle(client: RawClient) -> None:
        for number in range(10_000):
            await client.send(b"X-%d: y\r\n" % number)
            await asyncio.sleep(TIMEOUT_SECONDS / 10)

    async with connected(impatient) as client:
        await client.send(HEALTH[:-2])
        trickling = asyncio.create_task(trickle(client))
        assert is_problem(await client.answer(), 408, "request-timeout")
        trickling.cancel()


async def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(impatient: httpx.AsyncClient) -> None:
    for nothing in (b"", b"\r\n\r\n"):
        async with connected(impatient) as client:
            await client.send(nothing)
            assert await client.is_closed()


async def test_a_body_that_does_not_come_is_408_and_nothing_is_begun(
    impatient: httpx.AsyncClient, books: Books, gateway: SwitchedGateway
) -> None:
    for whole in (charging(BODY), charging(BODY, b"Connection: close")):
        async with connected(impatient) as client:
            await client.send(whole[:-1])
            assert is_problem(await client.answer(), 408, "request-timeout")
            assert await client.is_closed()
    assert await nothing_was_recorded(books, gateway)


async def test_a_body_that_nobody_asked_for_does_not_keep_its_connection(impatient: httpx.AsyncClient) -> None:
    async with connected(impatient) as client:
        await client.send(b"GET /health HTTP/1.1\r\n" + HOST + b"Content-Length: 1000\r\n\r\nabc")
        assert (await client.answer()).status == 200
        assert await client.is_closed()


async def test_a_client_that_waits_between_its_requests_is_not_hurried(impatient: httpx.AsyncClient) -> None:
    async with connected(impatient) as client:
        for _ in range(2):
            await client.send(HEALTH)
            assert (await client.answer()).status == 200
            await asyncio.sleep(TIMEOUT_SECONDS * 2)
        assert (await charged(client, 1)).status == 201


async def test_a_slow_gateway_is_no_slow_client(impatient: httpx.AsyncClient, gateway: SwitchedGateway) -> None:
    gateway.released.clear()
    async with connected(impatient) as client:
        await client.send(charging(BODY) + HEALTH)
        await asyncio.sleep(TIMEOUT_SECONDS * 2)
        gateway.released.set()
        assert [(await client.answer()).status, (await client.answer()).status] == [201, 200]


LARGE = "swagger-ui-bundle.js"


@contextmanager
def asking_for_much(api: httpx.AsyncClient, times: int = 1) -> Iterator[socket.socket]:
    """A client with little room for the large answers that it has asked for."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((api.base_url.host, api.base_url.port))
        client.setblocking(False)
        client.sendall((f"GET /docs/{docs.version()}/{LARGE} HTTP/1.1\r\n".encode() + HOST + b"\r\n") * times)
        yield client


async def test_who_does_not_read_the_answers_is_cut_off(impatient: httpx.AsyncClient) -> None:
    with asking_for_much(impatient, times=10) as client:  # more than the system's own buffers take
        port = client.getsockname()[1]

        async def is_served() -> bool:
            return any(found.raddr and found.raddr.port == port for found in psutil.Process().net_connections("tcp"))

        async def is_cut() -> bool:
            return not await is_served()

        await until(is_served)
        await until(is_cut)


async def test_who_reads_slowly_but_reads_gets_everything(impatient: httpx.AsyncClient) -> None:
    with asking_for_much(impatient) as client:
        loop = asyncio.get_running_loop()
        began, received = loop.time(), 0
        async with asyncio.timeout(30):
            while received < docs.files()[LARGE].stat().st_size:
                received += len(part := await loop.sock_recv(client, 65536))
                assert part
                await asyncio.sleep(0.005)
        assert loop.time() - began > TIMEOUT_SECONDS * 2


async def test_an_empty_line_behind_a_charge_does_not_end_it(
    impatient: httpx.AsyncClient, gateway: SwitchedGateway
) -> None:
    gateway.released.clear()
    async with connected(impatient) as client:
        await client.send(charging(BODY))
        await until_asked(gateway)
        await client.send(b"\r\n")
        await asyncio.sleep(TIMEOUT_SECONDS * 2)
        gateway.released.set()
        assert (await client.answer()).status == 201


async def test_requests_ahead_of_their_answers_are_answered_in_order_and_are_bounded(
    api: httpx.AsyncClient, gateway: SwitchedGateway, books: Books
) -> None:
    async with connected(api) as client:
        await client.send(
            b"".join(
                charging(json.dumps(charge_fields(n)).encode(), key=b"k%d" % n) for n in range(1, PIPELINE_MAX + 10)
            )
        )
        answers = [await client.answer() for _ in range(PIPELINE_MAX + 2)]
        assert [answer.json.get("order_id") for answer in answers] == [*range(1, PIPELINE_MAX + 2), None]
        assert is_problem(answers[-1], 400, "bad-request")
        assert await client.is_closed()
    assert await books.value("SELECT count(*) FROM payments") == PIPELINE_MAX + 1


async def test_nonsense_behind_a_charge_does_not_take_the_place_of_its_answer(
    api: httpx.AsyncClient, gateway: SwitchedGateway
) -> None:
    gateway.released.clear()
    async with connected(api) as client:
        await client.send(charging(BODY) + b"\x00\x01 nonsense")
        await until_asked(gateway)
        gateway.released.set()
        assert (await client.answer()).json["status"] == "COMPLETED"
        assert is_problem(await client.answer(), 400, "bad-request")
        assert await client.is_closed()


async def until_asked(gateway: SwitchedGateway) -> None:
    """Waits until a charge is with the gateway."""

    async def is_asked() -> bool:
        return bool(gateway.charges)

    await until(is_asked)


async def test_a_request_that_asks_for_another_protocol_is_one_like_any_other(api: httpx.AsyncClient) -> None:
    for protocol in (b"h2c", b"websocket"):
        async with connected(api) as client:
            upgrade = b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
            await client.send(HEALTH[:-2] + upgrade + HEALTH)
            assert [(await client.answer()).status for _ in range(2)] == [200, 200]
            await client.send(charging(BODY, b"Connection: Upgrade", b"Upgrade: " + protocol))
            assert is_problem(await client.answer(), 400, "bad-request")


async def test_a_body_is_asked_for_only_where_it_will_be_taken(api: httpx.AsyncClient, settings: Settings) -> None:
    async with connected(api) as client:
        whole = charging(BODY, b"Expect: 100-continue")
        await client.send(whole[: -len(BODY)])
        assert (await client.answer()).status == 100
        await client.send(BODY)
        assert (await client.answer()).status == 201
    too_large = charging(b" " * (settings.eci_pay_body_max_bytes + 1), b"Expect: 100-continue")
    head = too_large[: too_large.index(b"\r\n\r\n") + 4]
    assert is_problem(await answer_to(api, head), 413, "body-too-large")


async def test_who_sends_far_too_much_still_reads_why_it_was_refused(
    api: httpx.AsyncClient, settings: Settings
) -> None:
    megabytes = b" " * 8_000_000
    assert is_problem(await answer_to(api, charging(megabytes)), 413, "body-too-large")
    chunked = charging(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    assert is_problem(await answer_to(api, chunked + b"7A1200\r\n" + megabytes), 413, "body-too-large")
    assert is_problem(await answer_to(api, b"nonsense" + megabytes), 400, "bad-request")


async def test_connections_beyond_the_limit_are_told_503_and_the_others_notice_nothing(
    crowded: httpx.AsyncClient,
) -> None:
    async with connected(crowded) as first, connected(crowded) as second, connected(crowded) as third:
        for client in (first, second, third):
            await client.send(HEALTH)
            assert (await client.answer()).status == 200
        for _ in range(3):
            async with connected(crowded) as surplus:
                await surplus.send(charging(BODY))
                refused = await surplus.answer()
                assert is_problem(refused, 503, "unavailable")
                assert int(refused.headers["retry-after"]) > 0
                assert await surplus.is_closed()
        assert (await answer_to(crowded, HEALTH)).status == 200
        assert (await charged(first, 1)).status == 201
        third.writer.transport.abort()
        await until(lambda: is_taken(crowded))


async def test_idle_connections_hold_their_places_no_longer_than_silent_ones_once_all_are_taken(
    settings: Settings, service: PaymentService
) -> None:
    few = {"eci_pay_connections_max": 1, "eci_pay_read_timeout_seconds": TIMEOUT_SECONDS}
    async with client_of(settings.model_copy(update=few), opening(service)) as api, connected(api) as idle:
        await idle.send(HEALTH)
        assert (await idle.answer()).status == 200
        await until(lambda: is_taken(api))
        assert await idle.is_closed()


async def is_taken(api: httpx.AsyncClient) -> bool:
    """Whether a new connection is served."""
    async with connected(api) as client:
        with suppress(asyncio.IncompleteReadError):
            return (await charged(client, 2)).status == 201
        return False


async def test_far_too_many_connections_are_cut_off(crowded: httpx.AsyncClient) -> None:
    opened = [
        await asyncio.open_connection(crowded.base_url.host, crowded.base_url.port)
        for _ in range(CONNECTIONS_MAX + SURPLUS_MAX)
    ]
    async with connected(crowded) as client:
        assert await client.is_closed()
    for _, writer in opened:
        writer.transport.abort()
    await until(lambda: is_taken(crowded))


async def test_requests_beyond_the_limit_are_503_before_anything_is_recorded_and_health_is_answered(
    crowded: httpx.AsyncClient, gateway: SwitchedGateway, books: Books
) -> None:
    gateway.released.clear()
    async with connected(crowded) as first, connected(crowded) as second, connected(crowded) as third:
        for number, client in ((1, first), (2, second)):
            await client.send(charging(json.dumps(charge_fields(number)).encode(), key=b"k%d" % number))
        await until(lambda: books.rows("SELECT 1 FROM payments OFFSET 1"))
        refused = await charged(third, 3)
        assert (refused.status, refused.json["code"]) == (503, "unavailable")
        assert int(refused.headers["retry-after"]) > 0
        assert await books.value("SELECT count(*) FROM payments") == 2
        for path in (b"/health", b"/health/live", b"/health/ready", b"/metrics"):
            await third.send(HEALTH.replace(b"/health", path))
            assert (await third.answer()).status == 200
        gateway.released.set()
        assert [(await client.answer()).status for client in (first, second)] == [201, 201]
        assert (await charged(third, 3)).status == 201


async def test_what_is_refused_has_a_line_in_the_log_and_counts_in_the_metrics(api: httpx.AsyncClient) -> None:
    with logged("json") as lines:
        answer = await answer_to(api, b"\x1b[31mnonsense\r\n\r\n")
        (line,) = [json.loads(line) for line in lines() if "request refused" in line]
    assert (line["status"], line["request_id"]) == (400, answer.json["request_id"])
    assert line["reason"] == answer.json["detail"]
    counted = 'http_request_duration_seconds_count{method="other",route="other",status="400"}'
    assert counted in (await api.get("/metrics")).text


async def test_a_stopping_server_waits_for_slow_clients_no_longer_than_they_may_take(
    database_url: str, tmp_path: Path, books: Books
) -> None:
    environment = {"DATABASE_URL": database_url, "ECI_PAY_READ_TIMEOUT_SECONDS": "1"}
    async with (
        serving(CommandLine(environment, tmp_path)) as server,
        server.client() as api,
        connected(api) as silent,
        connected(api) as idle,
        connected(api) as in_head,
        connected(api) as in_body,
    ):
        await idle.send(HEALTH)
        assert (await idle.answer()).status == 200
        await in_head.send(HEALTH[:-1])
        await in_body.send(charging(BODY)[:-1])
        assert await server.end(signal.SIGTERM) == 0
        assert is_problem(await in_body.answer(), 408, "request-timeout")
        assert await silent.is_closed()
        assert await idle.is_closed()
    assert await books.value("SELECT count(*) FROM payments") == 0
