"""The equipment does what other tests rely on: it keeps what it has done, and breaks what it says it breaks."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from aiohttp import web

from tests.faults.ledger_gateway import Charge, LedgerGateway, Refund, read_ledger
from tests.faults.postgres import Cluster
from tests.faults.proxy import HOST, Proxy, free_port
from tests.support import until

SECRET = "whsec_equipment"
HANGS_SECONDS = 0.2
PATIENCE_SECONDS = 10.0
KEYS = {"Authorization": "Bearer sk_test_equipment"}


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[LedgerGateway]:
    """A gateway without faults."""
    async with LedgerGateway(tmp_path / "ledger.sqlite") as running:
        yield running


@pytest.fixture
async def client(gateway: LedgerGateway) -> AsyncIterator[httpx.AsyncClient]:
    """Asks the gateway, with a key that it takes."""
    async with httpx.AsyncClient(base_url=gateway.url, headers=KEYS) as open_client:
        yield open_client


async def charge(client: httpx.AsyncClient, key: str, **fields: str) -> httpx.Response:
    """Charges 100.00, with form fields to differ in."""
    form = {
        "amount": "10000",
        "currency": "inr",
        "confirm": "true",
        "payment_method": "pm_card_visa",
        "payment_method_types[0]": "card",
        "metadata[eci_pay_key]": key,
        **fields,
    }
    return await client.post("/v1/payment_intents", data=form, headers={"Idempotency-Key": key})


async def refund(client: httpx.AsyncClient, key: str, intent: str, amount: int) -> httpx.Response:
    """Gives a part of a charge back."""
    form = {"payment_intent": intent, "amount": str(amount), "metadata[eci_pay_key]": key}
    return await client.post("/v1/refunds", data=form, headers={"Idempotency-Key": key})


async def search(client: httpx.AsyncClient, key: str) -> list[dict[str, Any]]:
    """The payment intents of a key."""
    found = await client.get("/v1/payment_intents/search", params={"query": f"metadata['eci_pay_key']:'{key}'"})
    data: list[dict[str, Any]] = found.json()["data"]
    return data


async def test_a_repetition_gets_the_first_answer(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    first, second = await charge(client, "A-1"), await charge(client, "A-1")
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.content == second.content
    assert "idempotent-replayed" not in first.headers
    assert second.headers["idempotent-replayed"] == "true"
    ledger = await gateway.ledger()
    assert ledger.charges == (Charge("A-1", first.json()["id"], 10000, "inr", "succeeded"),)
    assert (ledger.requests, ledger.repeats, ledger.moved_twice()) == (2, 1, [])


async def test_a_decline_is_kept_and_takes_nothing(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    answers = [
        await charge(client, "A-1", payment_method="pm_card_chargeDeclinedInsufficientFunds"),
        await charge(client, "A-1", payment_method="pm_card_chargeDeclinedInsufficientFunds"),
    ]
    assert [answer.status_code for answer in answers] == [402, 402]
    assert answers[0].content == answers[1].content
    error = answers[0].json()["error"]
    assert (error["code"], error["decline_code"]) == ("card_declined", "insufficient_funds")
    assert error["payment_intent"]["status"] == "requires_payment_method"
    assert (await gateway.ledger()).taken() == {}


async def test_other_parameters_are_refused_and_bad_ones_not_kept(
    gateway: LedgerGateway, client: httpx.AsyncClient
) -> None:
    invalid = await charge(client, "A-1", amount="many")
    assert (invalid.status_code, invalid.json()["error"]["type"]) == (400, "invalid_request_error")
    assert (await charge(client, "A-1")).status_code == 200
    other = await charge(client, "A-1", amount="1")
    assert (other.status_code, other.json()["error"]["type"]) == (400, "idempotency_error")
    assert (await client.get("/v1/refunds", headers={"Authorization": ""})).status_code == 401
    assert (await gateway.ledger()).taken() == {"A-1": 10000}


async def test_no_more_is_given_back_than_was_taken(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    intent = (await charge(client, "A-1")).json()["id"]
    given = await refund(client, "A-1-R1", intent, 6000)
    assert given.json()["status"] == "succeeded"
    too_much = await refund(client, "A-1-R2", intent, 4001)
    assert "greater than unrefunded amount" in too_much.json()["error"]["message"]
    assert (await refund(client, "A-1-R3", intent, 4000)).status_code == 200
    nothing_left = await refund(client, "A-1-R4", intent, 1)
    assert (nothing_left.status_code, nothing_left.json()["error"]["code"]) == (400, "charge_already_refunded")
    cancelled = await client.post(f"/v1/payment_intents/{intent}/cancel")
    assert cancelled.json()["error"]["code"] == "payment_intent_unexpected_state"
    page = (await client.get("/v1/refunds", params={"payment_intent": intent, "limit": "1"})).json()
    assert (len(page["data"]), page["has_more"]) == (1, True)
    ledger = await gateway.ledger()
    assert ledger.refunds[0] == Refund("A-1-R1", given.json()["id"], intent, 6000)
    assert (ledger.given_back(), ledger.overdrawn()) == ({"A-1-R1": 6000, "A-1-R3": 4000}, [])


async def test_an_intent_is_cancelled_and_found_again(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    waiting = await charge(client, "O'Hara", confirm="false")
    assert waiting.json()["status"] == "requires_confirmation"
    cancelled = await client.post(f"/v1/payment_intents/{waiting.json()['id']}/cancel")
    assert cancelled.json()["status"] == "canceled"
    newer = (await charge(client, "A-2")).json()
    assert await search(client, "O\\'Hara") == [cancelled.json()]
    assert await search(client, "A") == []
    page = (await client.get("/v1/payment_intents", params={"starting_after": newer["id"]})).json()
    assert (page["data"], page["has_more"]) == ([cancelled.json()], False)
    assert (await client.get(f"/v1/payment_intents/{newer['id']}")).json() == newer
    assert (await client.get("/v1/payment_intents/pi_none")).status_code == 404


async def test_what_was_done_outlives_a_kill(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    first = await charge(client, "A-1")
    await gateway.kill()
    assert read_ledger(gateway.path).taken() == {"A-1": 10000}
    await gateway.restart()
    again = await charge(client, "A-1")
    assert again.content == first.content
    assert again.headers["idempotent-replayed"] == "true"
    assert (await gateway.ledger()).moved_twice() == []


async def test_a_lost_answer_is_acted_on_and_a_lost_request_is_not(
    gateway: LedgerGateway, client: httpx.AsyncClient
) -> None:
    await gateway.set_faults(drop_request=1.0)
    with pytest.raises(httpx.TransportError):
        await charge(client, "A-1")
    assert (await gateway.ledger()).taken() == {}
    await gateway.set_faults(drop_answer=1.0)
    with pytest.raises(httpx.TransportError):
        await charge(client, "A-1")
    assert (await gateway.ledger()).taken() == {"A-1": 10000}
    await gateway.set_faults()
    assert (await charge(client, "A-1")).headers["idempotent-replayed"] == "true"
    assert (await gateway.ledger()).faults == {"drop_request": 1, "drop_answer": 1}


async def test_errors_before_and_after_the_act(gateway: LedgerGateway, client: httpx.AsyncClient) -> None:
    await gateway.set_faults(error_before=1.0)
    assert (await charge(client, "A-1")).json()["error"]["type"] == "api_error"
    assert (await gateway.ledger()).taken() == {}
    await gateway.set_faults(error_after=1.0)
    assert (await charge(client, "A-1")).status_code == 500
    assert (await charge(client, "A-2", amount="many")).status_code == 500
    await gateway.set_faults()
    assert (await charge(client, "A-1")).json()["status"] == "succeeded"
    assert (await gateway.ledger()).taken() == {"A-1": 10000}


async def test_a_delayed_request_is_acted_on_for_a_client_that_is_gone(
    gateway: LedgerGateway, client: httpx.AsyncClient
) -> None:
    await gateway.set_faults(delay=1.0, delay_seconds=1.0)  # with our seed, the first request waits 0.6 seconds
    waiting = asyncio.create_task(charge(client, "A-1"))

    async def is_delayed() -> bool:
        return (await gateway.ledger()).faults == {"delay": 1}

    async def is_charged() -> bool:
        return bool((await gateway.ledger()).taken())

    await until(is_delayed)
    conflict = await charge(client, "A-1")
    assert (conflict.status_code, conflict.json()["error"]["code"]) == (409, "idempotency_key_in_use")
    waiting.cancel()
    assert not await is_charged()
    await until(is_charged)
    await gateway.set_faults()
    assert (await charge(client, "A-1")).headers["idempotent-replayed"] == "true"
    assert (await gateway.ledger()).taken() == {"A-1": 10000}


async def test_a_webhook_is_told_of_an_act_twice_but_of_no_repetition(tmp_path: Path) -> None:
    heard: list[tuple[str, bytes]] = []

    async def hear(request: web.Request) -> web.Response:
        heard.append((request.headers["Stripe-Signature"], await request.read()))
        return web.Response(status=500)

    app = web.Application()
    app.router.add_post("/webhook", hear)
    runner = web.AppRunner(app)
    await runner.setup()
    port = free_port()
    await web.TCPSite(runner, HOST, port).start()
    url = f"http://{HOST}:{port}/webhook"
    path = tmp_path / "ledger.sqlite"
    twice = {"answer_twice": 1.0}
    async with (
        LedgerGateway(path, webhook_url=url, webhook_secret=SECRET, faults=twice) as gateway,
        httpx.AsyncClient(base_url=gateway.url, headers=KEYS) as client,
    ):
        intent = (await charge(client, "A-1")).json()
        await charge(client, "A-1")
        await refund(client, "A-1-R1", intent["id"], 1)

        async def all_heard() -> bool:
            return len(heard) == 4

        await until(all_heard)
    await runner.cleanup()
    events = [json.loads(body) for _, body in heard]
    assert sorted(event["type"] for event in events) == 2 * ["payment_intent.succeeded"] + 2 * ["refund.created"]
    assert len({event["id"] for event in events}) == 2
    assert intent in [event["data"]["object"] for event in events]
    for header, body in heard:
        timestamp, signature = (part.split("=")[1] for part in header.split(","))
        signed = f"{timestamp}.".encode() + body
        assert hmac.compare_digest(signature, hmac.new(SECRET.encode(), signed, hashlib.sha256).hexdigest())


@pytest.fixture
async def echo() -> AsyncIterator[Proxy]:
    """A proxy in front of a server that sends back what it is sent."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(1000):
            writer.write(chunk)
        writer.close()

    server = await asyncio.start_server(serve, HOST, 0)
    async with Proxy(*server.sockets[0].getsockname()).running() as proxy:
        yield proxy
    server.close()


async def test_a_proxy_passes_on_and_a_cut_resets(echo: Proxy) -> None:
    reader, writer = await asyncio.open_connection(HOST, echo.port)
    writer.write(b"hello")
    assert await reader.readexactly(5) == b"hello"
    echo.cut()
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    assert (echo.cuts, echo.connections) == (1, 0)
    writer.close()


async def test_a_proxy_refuses_and_is_back(echo: Proxy) -> None:
    async with echo.refusing():
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(HOST, echo.port)
    reader, writer = await asyncio.open_connection(HOST, echo.port)
    writer.write(b"hello")
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), PATIENCE_SECONDS) == b"hello"
    writer.close()


async def test_a_proxy_loses_the_rest_of_an_answer(echo: Proxy) -> None:
    echo.cut_after_bytes(3)
    reader, writer = await asyncio.open_connection(HOST, echo.port)
    writer.write(b"hello")
    assert await reader.readexactly(3) == b"hel"
    with pytest.raises(ConnectionResetError):
        await asyncio.wait_for(reader.read(), PATIENCE_SECONDS)
    assert echo.cuts == 1
    writer.close()


async def test_a_proxy_holds_bytes(echo: Proxy) -> None:
    reader, writer = await asyncio.open_connection(HOST, echo.port)
    echo.stall()
    writer.write(b"hello")
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reader.readexactly(1), HANGS_SECONDS)
    echo.resume()
    assert await reader.readexactly(5) == b"hello"
    echo.delay_seconds = HANGS_SECONDS / 2
    started = asyncio.get_running_loop().time()
    writer.write(b"slow")
    assert await reader.readexactly(4) == b"slow"
    assert asyncio.get_running_loop().time() - started >= HANGS_SECONDS
    writer.close()


async def test_a_crashed_cluster_keeps_what_was_committed() -> None:
    async with Cluster(fsync=True) as cluster:
        async with await psycopg.AsyncConnection.connect(cluster.url, autocommit=True) as connection:
            await connection.execute("CREATE TABLE kept (id int)")
            await connection.execute("INSERT INTO kept VALUES (1)")
        open_one = await psycopg.AsyncConnection.connect(cluster.url)
        await open_one.execute("INSERT INTO kept VALUES (2)")
        await cluster.stop_immediate()
        with pytest.raises(psycopg.OperationalError):
            await open_one.execute("COMMIT")
        await cluster.restart()
        async with await psycopg.AsyncConnection.connect(cluster.url) as connection:
            assert await (await connection.execute("SELECT id FROM kept")).fetchall() == [(1,)]
            assert await (await connection.execute("SHOW fsync")).fetchone() == ("on",)
            assert await cluster.terminate_backends() == 1
            with pytest.raises(psycopg.errors.AdminShutdown):
                await connection.execute("SELECT 1")
