"""The services that are told of payments: where each message goes, and what its answer means."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import aiohttp

from eci_pay.messages import Destination, service_urls
from eci_pay.outbox import LeasedMessage, Outcome
from eci_pay.settings import Settings

ERROR_LENGTH_MAX = 500
ANSWER_BYTES_MAX = 65_536
"""How much of an answer is read; of a longer one the connection is closed."""
RETRY_AFTER_SECONDS_MAX = 86_400.0

_TRIED_AGAIN = (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a destination takes its messages, and how often one delivery tries."""

    method: str
    path: str
    tries_max: int


ENDPOINTS = {
    Destination.ORDER: Endpoint("PATCH", "/v1/orders/{order_id}/payment-status", 3),
    Destination.INVENTORY: Endpoint("POST", "/v1/inventory/release", 2),
    Destination.NOTIFICATION: Endpoint("POST", "/v1/notifications", 2),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Try:
    """What one request came to. `retry_after_seconds` is what the peer asked for."""

    outcome: Outcome
    error: str | None = None
    retry_after_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Peer:
    """One service. Its answers count by their status alone (RFC 9110): 2xx is delivered; 408, 425, 429 and 5xx, as
    no answer at all, may be another time; any other 4xx is for good. A redirection is not followed."""

    destination: Destination
    base_url: str
    session: aiohttp.ClientSession

    @property
    def endpoint(self) -> Endpoint:
        """Where its messages go."""
        return ENDPOINTS[self.destination]

    async def send(self, message: LeasedMessage) -> Try:
        """Sends a message once. Whatever happens on the way is a failed try."""
        try:
            async with self.session.request(
                self.endpoint.method,
                self.base_url + self.endpoint.path.format(order_id=message.order_id),
                data=message.body.encode(),
                headers=_headers(message),
                allow_redirects=False,
            ) as response:
                return await _tried(response)
        except TimeoutError:
            return Try(outcome=Outcome.FAILED, error=f"no answer within {self.session.timeout.total:g} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Try(outcome=Outcome.FAILED, error=_text(f"{type(error).__name__}: {error}"))


@asynccontextmanager
async def connected_peers(settings: Settings) -> AsyncIterator[Mapping[Destination, Peer]]:
    """The configured services, over connections that are kept alive. No proxy is used."""
    # Its own limits are off: each lane has one, and services behind one host must not take each other's share.
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=settings.eci_pay_relay_timeout_seconds)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), trust_env=False
    ) as session:
        yield {
            destination: Peer(destination=destination, base_url=url, session=session)
            for destination, url in service_urls(settings).items()
        }


def _headers(message: LeasedMessage) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(message.message_id)}
    if message.request_id is not None:
        headers["X-Request-ID"] = message.request_id
    if message.traceparent is not None:
        headers["traceparent"] = message.traceparent
    return headers


async def _tried(response: aiohttp.ClientResponse) -> Try:
    answer = await _body(response)
    status = response.status
    if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
        return Try(outcome=Outcome.DELIVERED)
    error = _text(f"HTTP {status} {response.reason or ''}: {answer.decode('utf-8', 'replace')}")
    for_good = HTTPStatus.BAD_REQUEST <= status < HTTPStatus.INTERNAL_SERVER_ERROR and status not in _TRIED_AGAIN
    if for_good:
        return Try(outcome=Outcome.REFUSED, error=error)
    return Try(
        outcome=Outcome.FAILED,
        error=error,
        retry_after_seconds=retry_after_seconds(response.headers.get("Retry-After")),
    )


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """As much of the answer as has come; the connection is kept only if that is all of it."""
    body = b""
    with suppress(aiohttp.ClientError, OSError):  # TimeoutError among them: the status has come, and it counts
        while len(body) <= ANSWER_BYTES_MAX and not response.content.at_eof():
            body += await response.content.readany()
    if not response.content.at_eof():
        response.close()
    return body


def retry_after_seconds(value: str | None) -> float:
    """How long to wait by a `Retry-After` header (RFC 9110, 10.2.3), a number of seconds or a date; 0 where it says
    nothing sensible."""
    if value is None:
        return 0.0
    text = value.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:10])
    else:
        try:
            at = parsedate_to_datetime(text)
        except (ValueError, OverflowError):
            return 0.0
        seconds = ((at if at.tzinfo else at.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), RETRY_AFTER_SECONDS_MAX)


def _text(text: str) -> str:
    """As it is kept: one line of ASCII, which every database can hold."""
    line = "".join(c if c.isprintable() else " " for c in text[:ERROR_LENGTH_MAX])
    return line.encode("ascii", "backslashreplace").decode()[:ERROR_LENGTH_MAX]
