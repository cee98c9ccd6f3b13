"""What browsers are told: which pages may call, and what they must not do with what they get."""

from collections.abc import AsyncIterator

import httpx
import pytest

from eci_pay.service import PaymentService
from eci_pay.settings import Settings, load_settings
from server import docs
from tests.http_server import client_of, opening
from tests.support import charge_fields
from tests.test_serving import charge

SHOP, DESK, ELSEWHERE = "https://shop.example", "http://localhost:3000", "https://evil.example"
CHARGE = "/v1/payments/charge"
PREFLIGHT = {
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type,idempotency-key",
}


@pytest.fixture
async def shared(settings: Settings, service: PaymentService) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server that pages of two origins may call."""
    changed = settings.model_copy(update={"eci_pay_cors_origins": (SHOP, DESK)})
    async with client_of(changed, opening(service), checked=False) as client:
        yield client


def of_cors(answer: httpx.Response) -> dict[str, str]:
    """What an answer tells a browser about who may read it."""
    return {name: value for name, value in answer.headers.items() if name.startswith("access-control")}


def test_origins_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ECI_PAY_CORS_ORIGINS", f"{SHOP}, {DESK}")
    assert load_settings().eci_pay_cors_origins == (SHOP, DESK)


async def test_no_page_of_elsewhere_may_call_unless_it_is_named(
    api: httpx.AsyncClient, shared: httpx.AsyncClient
) -> None:
    for client, status in ((api, 405), (shared, 400)):
        preflight = await client.options(CHARGE, headers={**PREFLIGHT, "Origin": ELSEWHERE})
        assert preflight.status_code == status
        assert "access-control-allow-origin" not in of_cors(preflight)
        answer = await client.get("/v1/payments", headers={"Origin": ELSEWHERE})
        assert "access-control-allow-origin" not in of_cors(answer)


async def test_a_page_that_is_named_may_charge_and_reads_the_answers(shared: httpx.AsyncClient) -> None:
    for origin in (SHOP, DESK):
        preflight = await shared.options(CHARGE, headers={**PREFLIGHT, "Origin": origin})
        assert preflight.status_code == 200
        told = of_cors(preflight)
        assert told["access-control-allow-origin"] == origin
        assert told["access-control-allow-methods"] == "GET, POST, PATCH, DELETE"
        assert {"authorization", "idempotency-key"} <= {
            name.strip().lower() for name in told["access-control-allow-headers"].split(",")
        }
        assert "access-control-allow-credentials" not in told
        headers = {"Origin": origin, "Idempotency-Key": "k"}
        for answer in (
            await shared.post(CHARGE, json=charge_fields(), headers=headers),
            await shared.post(CHARGE, json={}, headers=headers),
            await shared.get("/nowhere", headers=headers),
        ):
            assert of_cors(answer)["access-control-allow-origin"] == origin
            exposed = of_cors(answer)["access-control-expose-headers"]
            assert exposed == "Idempotent-Replayed, Location, Retry-After, X-Request-ID"
            assert "Origin" in answer.headers["Vary"]


@pytest.mark.parametrize(
    "changed", [{"Access-Control-Request-Method": "PUT"}, {"Access-Control-Request-Headers": "cookie"}]
)
async def test_only_what_the_api_has_may_be_sent(shared: httpx.AsyncClient, changed: dict[str, str]) -> None:
    answer = await shared.options(CHARGE, headers={**PREFLIGHT, "Origin": SHOP, **changed})
    assert answer.status_code == 400


async def test_nobody_on_the_way_keeps_an_answer_or_guesses_what_it_is(api: httpx.AsyncClient) -> None:
    paid = await charge(api)
    for answer in (
        paid,
        await api.get(f"/v1/payments/{paid.json()['payment_id']}"),
        await api.get("/v1/payments"),
        await api.get("/nowhere"),
        await api.post(CHARGE, json={}),
        await api.get("/health"),
        await api.get("/metrics"),
        await api.get("/openapi.json"),
    ):
        assert answer.headers.get_list("Cache-Control") == ["no-store"]
        assert answer.headers.get_list("X-Content-Type-Options") == ["nosniff"]


async def test_the_page_has_the_headers_that_guard_it(api: httpx.AsyncClient) -> None:
    for path in ("/docs", f"/docs/{docs.version()}/page.js"):
        answer = await api.get(path)
        for name, value in {
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Embedder-Policy": "require-corp",
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Permitted-Cross-Domain-Policies": "none",
        }.items():
            assert answer.headers.get_list(name) == [value]
        assert "geolocation=()" in answer.headers["Permissions-Policy"]
        assert answer.headers["Cache-Control"] != "no-store"
        assert "Server" not in answer.headers
