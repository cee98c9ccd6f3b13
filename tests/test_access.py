"""API keys: who has none, or one for something else, is turned away; callers see nothing of each other; the audit trail
says who it was."""

import asyncio
import json
import re
import time
from datetime import UTC, datetime, timedelta
from statistics import median
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eci_pay.access import Scope
from eci_pay.errors import RateLimited, Unauthorized, Unavailable
from eci_pay.logs import LogFormat
from eci_pay.rate_limit import BURST_SECONDS, RateLimit
from eci_pay.service import PaymentService
from eci_pay.settings import Settings
from server.openapi import compose
from server.routes import TABLE
from tests.door import Door
from tests.http_server import client_of, opening
from tests.log_lines import logged
from tests.rows import paid
from tests.support import Books, CommandLine, ManualClock, Opener, charge_fields, until

CHARGE = "/v1/payments/charge"
REFUND = {"reason": "Damaged in transit"}
GUARDED = {
    (method, path): operation.wants
    for path, operations in TABLE.items()
    for method, operation in operations.items()
    if operation.wants is not None
}
EVERYBODY = ["/health", "/health/live", "/health/startup", "/health/ready", "/openapi.json", "/docs"]
INVALID, NOT_FOUND = 2, 4
SECRET = "A" * 43
UNGUESSED = f"ecipay_{'0' * 12}_{SECRET}"
GUESSES = 150
"""Of each kind, taken in turns: what the machine does besides slows all kinds alike."""


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """Access is controlled, and what was found out about a key is forgotten at once."""
    return settings.model_copy(update={"eci_pay_auth": "on", "eci_pay_api_key_remember_seconds": 0.0})


async def key_of(service: PaymentService, name: str, *scopes: Scope) -> dict[str, str]:
    """A new key, as a header."""
    _, token = await service.api_keys.create(name=name, scopes=scopes)
    return bearer(token)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def ask(api: httpx.AsyncClient, method: str, path: str, headers: dict[str, str]) -> httpx.Response:
    """Asks for a path of the route table, about payment 1."""
    return await api.request(method, re.sub(r"{\w+}", "1", path), headers=headers)


async def charge(
    api: httpx.AsyncClient, headers: dict[str, str], order_id: int = 1, key: str = "k", **fields: object
) -> httpx.Response:
    return await api.post(CHARGE, json=charge_fields(order_id, **fields), headers={**headers, "Idempotency-Key": key})


def test_everything_that_moves_or_shows_money_wants_a_scope() -> None:
    assert {wants for (_, path), wants in GUARDED.items() if path.startswith("/v1/payments")} == {
        Scope.CHARGE,
        Scope.REFUND,
        Scope.READ,
        Scope.WRITE,
    }
    open_paths = {path for path in TABLE if not any(path == guarded for _, guarded in GUARDED)}
    # The gateway signs what it sends; the others tell nothing of payments.
    assert open_paths == {*EVERYBODY, "/docs/{version}/{file}", "/v1/gateway/events"}


async def test_each_operation_wants_a_key_with_its_scope_and_takes_no_other(
    api: httpx.AsyncClient, service: PaymentService
) -> None:
    keys = {scope: await key_of(service, scope.replace(":", "."), scope) for scope in Scope}
    for (method, path), wanted in GUARDED.items():
        without = await ask(api, method, path, {})
        assert (without.status_code, without.json()["code"]) == (401, "unauthorized")
        assert without.headers["WWW-Authenticate"] == 'Bearer realm="eci-pay"'
        for wrong in (UNGUESSED, "ecipay_", "x" * 5000):
            answer = await ask(api, method, path, bearer(wrong))
            assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")
            assert answer.headers["WWW-Authenticate"] == 'Bearer realm="eci-pay", error="invalid_token"'
        for scope, key in keys.items():
            answer = await ask(api, method, path, key)
            if scope in (wanted, Scope.ADMIN):
                assert answer.status_code not in (401, 403)
            else:
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
                assert f'error="insufficient_scope", scope="{wanted}"' in answer.headers["WWW-Authenticate"]


async def test_health_and_documentation_are_for_everybody(api: httpx.AsyncClient) -> None:
    assert {(await api.get(path)).status_code for path in EVERYBODY} == {200}


async def test_an_authorization_of_another_kind_is_401(api: httpx.AsyncClient) -> None:
    for values in (["Basic dXNlcjpwYXNz"], ["Bearer"], [f"Bearer {UNGUESSED} x"], ["Bearer a", "Bearer b"], ["\xff"]):
        headers = [(b"Authorization", value.encode("latin-1")) for value in values]
        answer = await api.get("/v1/payments", headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (401, "unauthorized")


async def test_nothing_is_read_or_recorded_of_a_caller_without_a_key(api: httpx.AsyncClient, books: Books) -> None:
    for body in (b"{", b"x" * 10_000):
        answer = await api.post(CHARGE, content=body, headers={"Idempotency-Key": "k"})
        assert answer.status_code == 401
    assert await books.value("SELECT count(*) FROM payments") == 0


async def test_a_key_is_refused_once_it_is_revoked_or_has_expired(
    api: httpx.AsyncClient, service: PaymentService, clock: ManualClock
) -> None:
    revoked, of_revoked = await service.api_keys.create(name="a", scopes=[Scope.READ])
    _, of_expired = await service.api_keys.create(
        name="b", scopes=[Scope.READ], expires_at=clock() + timedelta(minutes=1)
    )
    for token in (of_revoked, of_expired):
        assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 200
    await service.api_keys.revoke(revoked.key_id)
    clock.advance(minutes=1)
    for token, why in ((of_revoked, "revoked"), (of_expired, "expired")):
        answer = await api.get("/v1/payments", headers=bearer(token))
        assert answer.status_code == 401
        assert why in answer.json()["detail"]


async def test_a_key_is_remembered_for_a_while_and_not_longer(opened: Opener, settings: Settings, books: Books) -> None:
    async with (
        opened(eci_pay_api_key_remember_seconds=0.3) as service,
        client_of(settings, opening(service)) as api,
    ):
        key, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
        assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 200
        await books.rows("UPDATE api_keys SET revoked_at = now() WHERE key_id = %s", key.key_id)

        async def is_refused() -> bool:
            return (await api.get("/v1/payments", headers=bearer(token))).status_code == 401

        assert not await is_refused()
        await until(is_refused)


async def test_who_is_known_still_reads_the_metrics_while_the_database_is_away(
    opened: Opener, settings: Settings, door: Door
) -> None:
    async with (
        door.opened() as url,
        opened(url=url, eci_pay_database_pool_timeout_seconds=0.3) as service,
        client_of(settings, opening(service)) as api,
    ):
        key = await key_of(service, "prometheus", Scope.METRICS)
        assert "payments_created_total" in (await api.get("/metrics", headers=key)).text
        door.shut()
        answer = await api.get("/metrics", headers=key)
        assert answer.status_code == 200
        assert "eci_pay_build_info" in answer.text
        assert (await api.get("/metrics", headers=bearer(UNGUESSED))).status_code == 503


async def test_only_a_hash_is_kept_which_another_pepper_does_not_make(
    opened: Opener, settings: Settings, books: Books
) -> None:
    async with opened(eci_pay_api_key_pepper=settings_secret("one")) as service:
        key, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
        assert (await service.api_keys.caller(token)).name == "a"
    [row] = await books.rows("SELECT *, secret_hash::text AS shown FROM api_keys")
    secret = token.rpartition("_")[2] if token.count("_") == 2 else token.split("_", 2)[2]
    assert key.key_id in token
    assert secret not in repr(row)
    for pepper in (None, settings_secret("other")):
        async with opened(eci_pay_api_key_pepper=pepper) as service, client_of(settings, opening(service)) as api:
            assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 401


def settings_secret(text: str) -> Any:
    return Settings.model_validate({"eci_pay_api_key_pepper": text}).eci_pay_api_key_pepper


async def test_a_key_never_reveals_the_answer_that_another_caller_was_given(
    api: httpx.AsyncClient, service: PaymentService
) -> None:
    mine = await key_of(service, "shop", Scope.CHARGE)
    theirs = await key_of(service, "other-shop", Scope.CHARGE)
    answer = await charge(api, mine, 1)
    assert answer.status_code == 201
    same = await charge(api, theirs, 1)
    assert (same.status_code, same.json()["code"]) == (409, "order-already-paid")
    assert "Idempotent-Replayed" not in same.headers
    different = await charge(api, theirs, 2)
    assert (different.status_code, different.json()["order_id"]) == (201, 2)
    assert (await charge(api, mine, 1)).content == answer.content


async def test_a_caller_whose_key_is_replaced_keeps_its_idempotency_keys(
    api: httpx.AsyncClient, service: PaymentService, books: Books
) -> None:
    [payment_id] = await paid(service, 1)
    old = await key_of(service, "shop", Scope.REFUND)
    new = await key_of(service, "shop", Scope.REFUND)
    path, body = f"/v1/payments/{payment_id}/refund", {**REFUND, "amount": "10"}
    first = await api.post(path, json=body, headers={**old, "Idempotency-Key": "r"})
    again = await api.post(path, json=body, headers={**new, "Idempotency-Key": "r"})
    assert (again.status_code, again.content) == (200, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert await books.value("SELECT count(*) FROM refunds") == 1


async def test_the_audit_trail_says_whose_key_it_was_and_callers_do_not_see_that(
    api: httpx.AsyncClient, service: PaymentService, books: Books
) -> None:
    shop, token = await service.api_keys.create(name="shop", scopes=[Scope.CHARGE])
    desk, desk_token = await service.api_keys.create(name="desk", scopes=[Scope.REFUND, Scope.WRITE, Scope.READ])
    paid_answer = await charge(api, bearer(token), 1)
    payment_id = paid_answer.json()["payment_id"]
    refunded = await api.post(f"/v1/payments/{payment_id}/refund", json=REFUND, headers=bearer(desk_token))
    created = await api.post("/v1/payments", json=charge_fields(2), headers=bearer(desk_token))
    cancelled = await api.delete(f"/v1/payments/{created.json()['payment_id']}", headers=bearer(desk_token))
    assert [each.status_code for each in (paid_answer, refunded, created, cancelled)] == [201, 200, 201, 200]
    trail = await books.rows("SELECT status, actor FROM transactions ORDER BY transaction_log_id")
    by_shop, by_desk = f"client:shop/{shop.key_id}", f"client:desk/{desk.key_id}"
    assert [row["actor"] for row in trail] == [by_shop] * 2 + [by_desk] * 5
    shown = await api.get(f"/v1/payments/{payment_id}", headers=bearer(desk_token))
    assert shop.key_id not in shown.text
    assert "actor" not in shown.text


async def test_the_audit_trail_says_which_operator_acted_and_when_recovery_did(
    command_line: CommandLine, service: PaymentService, books: Books
) -> None:
    fields = ("--order-id", "1", "--user-id", "7", "--amount", "4000.08", "--method", "CREDIT_CARD")
    assert (await command_line.run("charge", *fields)).exit_code == 6
    [begun] = await books.rows("SELECT actor FROM transactions")
    assert begun["actor"].startswith("operator:")
    await service.recovery.settle_first({await books.value("SELECT payment_id FROM payments")})
    actors = [row["actor"] for row in await books.rows("SELECT actor FROM transactions ORDER BY transaction_log_id")]
    assert actors == [begun["actor"], "recovery"]
    told = (await command_line.run("show", "--order", "1", "--json")).json
    assert [each["actor"] for each in told["transactions"]] == actors
    assert "by recovery" in " ".join((await command_line.run("show", "--order", "1")).stdout.split())


async def test_a_request_names_its_caller_in_the_log_and_never_the_key(
    api: httpx.AsyncClient, service: PaymentService
) -> None:
    key, token = await service.api_keys.create(name="shop", scopes=[Scope.READ])
    log_format: LogFormat = "json"
    with logged(log_format) as lines:
        await api.get("/v1/payments", headers=bearer(token))
        await api.get(f"/v1/payments/transaction/{token}", headers=bearer(token))
    told = [json.loads(line) for line in lines() if json.loads(line)["event"] == "request"]
    assert [line["caller"] for line in told] == [f"client:shop/{key.key_id}"] * 2
    assert token not in "".join(lines())
    assert token.split("_", 2)[2] not in "".join(lines())


async def test_a_caller_above_its_rate_is_told_when_to_come_again_and_its_keys_stay_unused(
    opened: Opener, settings: Settings, books: Books
) -> None:
    slow = settings.model_copy(update={"eci_pay_caller_requests_per_second": 0.5})
    async with opened() as service, client_of(slow, opening(service)) as api:
        greedy = await key_of(service, "greedy", Scope.CHARGE)
        modest = await key_of(service, "modest", Scope.CHARGE)
        answers = [await charge(api, greedy, order_id, key=f"k{order_id}") for order_id in (1, 2)]
        assert [answer.status_code for answer in answers] == [201, 429]
        refused = answers[1]
        assert refused.json()["code"] == "rate-limited"
        assert 1 <= int(refused.headers["Retry-After"]) <= 2
        assert await books.value("SELECT count(*) FROM idempotency_keys") == 1
        assert (await charge(api, modest, 3)).status_code == 201


@given(
    per_second=st.floats(0.1, 1000),
    pauses=st.lists(st.floats(0, 3), min_size=1, max_size=200),
)
def test_no_stretch_of_time_has_more_requests_than_the_rate_and_a_burst(per_second: float, pauses: list[float]) -> None:
    now = 0.0
    limit = RateLimit(per_second, clock=lambda: now)
    taken: list[float] = []
    for pause in pauses:
        now += pause
        try:
            limit.take("caller")
        except RateLimited as error:
            # Who comes again when told to is served.
            now += error.retry_after_seconds
            limit.take("caller")
        taken.append(now)
    burst = max(1.0, per_second * BURST_SECONDS)
    for first in range(len(taken)):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + (taken[last] - taken[first]) * per_second + 1e-6


async def locked_out(books: Books, part: str) -> int:
    """How many statements with this part wait for a lock. Within a transaction PostgreSQL itself looks once."""
    await books.rows("SELECT pg_stat_clear_snapshot()")
    waiting = "wait_event_type = 'Lock' AND datname = current_database() AND strpos(query, %s) > 0"
    number: int = await books.value(f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}", part)
    return number


async def test_requests_that_come_at_once_look_a_key_up_once(service: PaymentService, books: Books) -> None:
    _, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
    async with books.connection.transaction():
        await books.rows("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(service.api_keys.caller(token)) for _ in range(50)]
        await until(lambda: locked_out(books, "FROM api_keys"))
        assert await locked_out(books, "FROM api_keys") == 1
    callers = await asyncio.gather(*asked)
    assert {caller.name for caller in callers} == {"a"}


async def test_who_asks_for_health_takes_one_connection_of_those_that_charges_need(
    api: httpx.AsyncClient, books: Books
) -> None:
    async with books.connection.transaction():
        await books.rows("LOCK TABLE payments IN ACCESS EXCLUSIVE MODE")
        asked = [asyncio.create_task(api.get("/health/ready")) for _ in range(50)]
        await until(lambda: locked_out(books, "is_read_only"))
        assert (await api.get("/health")).status_code == 200
        assert await locked_out(books, "is_read_only") == 1
    assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}


async def test_who_tries_many_keys_does_not_make_others_wait(opened: Opener, books: Books) -> None:
    async with opened(eci_pay_lock_timeout_seconds=0.2) as service:
        unknown = [f"ecipay_{number:012}_{'A' * 43}" for number in range(100)]
        async with books.connection.transaction():
            await books.rows("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
            async with asyncio.timeout(5):
                asked = [service.api_keys.caller(token) for token in unknown]
                answers = await asyncio.gather(*asked, return_exceptions=True)
        assert all(isinstance(answer, Unavailable) for answer in answers)
        _, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
        assert (await service.api_keys.caller(token)).name == "a"


async def test_a_revoked_key_lets_nobody_in_while_keys_cannot_be_looked_up(
    opened: Opener, settings: Settings, books: Books
) -> None:
    async with opened(eci_pay_lock_timeout_seconds=0.2) as service, client_of(settings, opening(service)) as api:
        key, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
        assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 200
        await service.api_keys.revoke(key.key_id)
        async with books.connection.transaction():
            await books.rows("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE")
            assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 503
        assert (await api.get("/v1/payments", headers=bearer(token))).status_code == 401


async def test_how_long_a_key_is_looked_at_tells_nothing_of_it(service: PaymentService) -> None:
    _, token = await service.api_keys.create(name="a", scopes=[Scope.READ])
    body = token[: -len(SECRET)]

    def with_other(place: int) -> str:
        return token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]

    guesses = {
        "nothing is right": UNGUESSED,
        "its id is right": body + SECRET,
        "but for its first character": with_other(len(body)),
        "but for its last character": with_other(len(token) - 1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in guesses}
    for _ in range(GUESSES):
        for name, guess in guesses.items():
            started = time.perf_counter()
            with pytest.raises(Unauthorized, match="no such API key"):
                await service.api_keys.caller(guess)
            seconds[name].append(time.perf_counter() - started)
    medians = [median(each) for each in seconds.values()]
    assert max(medians) < 1.5 * min(medians), {name: median(each) for name, each in seconds.items()}


async def test_the_document_says_which_scope_each_operation_wants(api: httpx.AsyncClient) -> None:
    document = (await api.get("/openapi.json")).json()
    found = {
        (method, path): Scope(document["paths"][path][method.lower()]["security"][0]["apiKey"][0])
        for method, path in GUARDED
    }
    assert found == GUARDED
    relaxed = json.loads(compose(access_controlled=False))
    assert {} in relaxed["paths"][CHARGE]["post"]["security"]


@pytest.fixture
async def key_id(command_line: CommandLine) -> str:
    """A key that the command has made."""
    made = await command_line.run("api-key", "create", "shop", "--scope", "payments:read", "--json")
    key_id: str = made.json["key_id"]
    return key_id


async def test_create_prints_the_key_alone_and_list_never_again(
    command_line: CommandLine, service: PaymentService
) -> None:
    scopes = ("--scope", "payments:charge", "--scope", "payments:read")
    made = await command_line.run("api-key", "create", "order-service", *scopes, "--expires", "90d")
    assert made.exit_code == 0
    token = made.stdout.removesuffix("\n")
    assert re.fullmatch(r"ecipay_[0-9a-z]{12}_[\w-]{43}", token)
    assert "order-service" in made.stderr
    assert (await service.api_keys.caller(token)).scopes == {Scope.CHARGE, Scope.READ}
    for listed in (await command_line.run("api-key", "list"), await command_line.run("api-key", "list", "--json")):
        assert "order-service" in listed.stdout
        assert token.split("_", 2)[2] not in listed.stdout + listed.stderr
    [told] = (await command_line.run("api-key", "list", "--json")).json
    assert (told["state"], told["scopes"]) == ("active", ["payments:charge", "payments:read"])
    assert told["created_by"].startswith("operator:")
    assert told["last_used_at"] is not None
    expires_in = datetime.fromisoformat(told["expires_at"]) - datetime.now(UTC)
    assert timedelta(days=89) < expires_in <= timedelta(days=90)


async def test_a_revoked_key_says_so_and_a_second_time_changes_nothing(command_line: CommandLine, key_id: str) -> None:
    first = await command_line.run("api-key", "revoke", key_id, "--json")
    second = await command_line.run("api-key", "revoke", f"ecipay_{key_id}_{'A' * 43}", "--json")
    assert first.json["state"] == second.json["state"] == "revoked"
    assert first.json["revoked_at"] == second.json["revoked_at"]
    assert first.json["revoked_by"].startswith("operator:")
    assert "revoked" in (await command_line.run("api-key", "list")).stdout


FAULTS = [
    (("create", "shop"), INVALID, "--scope"),
    (("create", "shop", "--scope", "payments:steal"), INVALID, "payments:steal"),
    (("create", "", "--scope", "admin"), INVALID, "name"),
    (("create", "x" * 65, "--scope", "admin"), INVALID, "name"),
    (("create", "a b", "--scope", "admin"), INVALID, "name"),
    (("create", "shop", "--scope", "admin", "--expires", "soon"), INVALID, "soon"),
    (("create", "shop", "--scope", "admin", "--expires", "2020-01-01"), INVALID, "future"),
    (("revoke", "nobody"), NOT_FOUND, "nobody"),
]


async def test_what_cannot_be_done_is_said(command_line: CommandLine) -> None:
    for arguments, exit_code, said in FAULTS:
        result = await command_line.run("api-key", *arguments)
        assert result.exit_code == exit_code
        assert said in result.stderr
        assert "Traceback" not in result.stderr
