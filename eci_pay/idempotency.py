"""Idempotency keys: what one is, what a used one answers, and when it expires.

Follows the IETF draft "The Idempotency-Key HTTP Header Field" (draft-ietf-httpapi-idempotency-key-header) and
Stripe's practice: the first finished answer is replayed byte for byte for 24 hours.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from http import HTTPStatus

from eci_pay.answers import Answer
from eci_pay.database import Connection, Database, Row, fetch
from eci_pay.deletion import delete_all
from eci_pay.errors import (
    IdempotencyKeyInFlight,
    IdempotencyKeyInvalid,
    IdempotencyKeyMissing,
    IdempotencyKeyReused,
    RequestTooLate,
)
from eci_pay.instruments import replayed
from eci_pay.requests import ChargeRequest, Request

KEY_LENGTH_MAX = 255
KEY_LIFETIME = timedelta(hours=24)
EXPIRE_BATCH_SIZE_MAX = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """A key as one request presents it. `value` is None where the request came without one. Where the key may have been
    used long ago, nothing is begun `not_after` that: once it has expired, it cannot tell what was done."""

    value: str | None
    caller: str
    request_hash: str | None
    not_after: datetime | None = None

    @classmethod
    def of(
        cls, value: str | None, caller: str, operation: str, request: Request, not_after: datetime | None = None
    ) -> "Claim":
        """The claim of a validated request; `operation` names its route and path."""
        return cls(
            value=value,
            caller=caller,
            request_hash=None if value is None else request_hash(operation, request),
            not_after=not_after,
        )

    def check(self, at: datetime) -> None:
        """Raises RequestTooLate where nothing may be begun at that instant."""
        if self.not_after is not None and at > self.not_after:
            raise RequestTooLate(f"it was to be begun by {self.not_after:%Y-%m-%d %H:%M:%S} UTC; nothing was sent")


def parse_key(raw: str | None) -> str:
    """The key that a header or an option holds: quoted (an sf-string of RFC 8941) or bare, which are equal.

    Raises IdempotencyKeyMissing and IdempotencyKeyInvalid.
    """
    if raw is None or not (text := raw.strip(" \t")):
        raise IdempotencyKeyMissing
    key = _unquoted(text) if text.startswith('"') else text
    if not key:
        raise IdempotencyKeyMissing
    if len(key) > KEY_LENGTH_MAX:
        raise IdempotencyKeyInvalid(f"the Idempotency-Key has more than {KEY_LENGTH_MAX} characters")
    if not (key.isascii() and key.isprintable()):
        raise IdempotencyKeyInvalid("the Idempotency-Key must consist of printable ASCII characters")
    return key


def request_hash(operation: str, request: Request) -> str:
    """SHA-256 of the validated request and its operation: equal for requests that ask for the same."""
    # What is left out does not count, so that a field that a later release adds changes no hash.
    fields = request.model_dump(mode="json", exclude_none=True)
    if isinstance(request, ChargeRequest) and request.payment_token is not None:
        # Another card is another request, though what the token says must not be found in the hash's source.
        token = request.payment_token.get_secret_value()
        fields["payment_token"] = hashlib.sha256(token.encode()).hexdigest()
    return hashlib.sha256(_CANONICAL.encode([operation, fields]).encode()).hexdigest()


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


def is_expired(row: Row, now: datetime) -> bool:
    """Whether a key may be used anew: finished and past its time. An unfinished key never expires."""
    return row["response_body"] is not None and row["expires_at"] <= now


def recorded_answer(row: Row, claim: Claim) -> Answer | None:
    """What a live key answers; None where its request has not been answered yet.

    Raises IdempotencyKeyReused where the key belongs to a different request.
    """
    if row["request_hash"] != claim.request_hash:
        raise IdempotencyKeyReused("this Idempotency-Key was used with a different request: use a new key")
    if row["response_body"] is None:
        return None
    replayed()
    return Answer(
        status_code=row["status_code"],
        body=row["response_body"],
        payment_id=row["key_payment_id"],
        replayed=True,
    )


def refuse_in_flight(payment_id: int) -> IdempotencyKeyInFlight:
    """The error of a key whose first request is still running."""
    return IdempotencyKeyInFlight(
        "the first request with this Idempotency-Key is still running: ask again in a moment",
        payment_id=payment_id,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Finish:
    """An answer to store under a key, given `at` that instant. A released key is finished and expired at once: it is
    used anew, not replayed."""

    key_id: int
    begin_id: str
    answer: Answer
    at: datetime
    releases: bool = False


async def finish(connection: Connection, finishes: Sequence[Finish]) -> dict[int, Answer]:
    """Stores answers in the transaction of the connection; returns what each key holds now.

    Where somebody finished a key before, that is theirs. A key that was released or claimed anew is missing.
    """
    if not finishes:
        return {}
    rows = await fetch(
        connection,
        "keys_finish",
        {
            "key_id": [finish.key_id for finish in finishes],
            "begin_id": [finish.begin_id for finish in finishes],
            "response_body": [finish.answer.body for finish in finishes],
            "status_code": [finish.answer.status_code for finish in finishes],
            "at": [finish.at for finish in finishes],
            "expires_at": [finish.at + KEY_LIFETIME for finish in finishes],
            "releases_key": [finish.releases for finish in finishes],
        },
    )
    return {row["id"]: _stored_answer(row) for row in rows if not row["released"]}


async def read_answer(database: Database, key_id: int) -> Answer | None:
    """The answer that a key holds by now; None while it holds none."""
    rows = await database.read("key_by_id", {"key_id": key_id})
    return _stored_answer(rows[0]) if rows and rows[0]["response_body"] is not None else None


async def mark_unknown(database: Database, key_id: int) -> None:
    """Notes that the outcome is unknown, so that a replay is told 202 and not "in flight"."""
    await database.fetch("keys_mark_unknown", {"key_id": [key_id]})


def is_marked_unknown(row: Row) -> bool:
    """Whether the first request ended without an outcome."""
    return bool(row["status_code"] == HTTPStatus.ACCEPTED)


class KeyExpiry:
    """Deletes keys that are finished and past their time, in batches, beside any number of others."""

    def __init__(self, database: Database, clock: Callable[[], datetime]) -> None:
        self._database = database
        self._clock = clock

    async def count(self) -> int:
        """How many keys `delete` would delete."""
        rows = await self._database.read("keys_expired_count", {"now": self._clock()})
        return int(rows[0]["expired"])

    async def estimate(self) -> int:
        """About how many keys there are, finished or not, without counting them."""
        rows = await self._database.read("keys_estimate")
        return int(rows[0]["keys"])

    async def delete(self, on_progress: Callable[[int], None] = lambda _: None) -> int:
        """Deletes them all; tells the running total after each batch, and at the end returns it."""
        return await delete_all(self.delete_batch, EXPIRE_BATCH_SIZE_MAX, on_progress)

    async def delete_batch(self) -> int:
        """Deletes at most `EXPIRE_BATCH_SIZE_MAX`; returns how many."""
        params = {"now": self._clock(), "batch_size_max": EXPIRE_BATCH_SIZE_MAX}
        rows = await self._database.fetch("keys_expire", params)
        return int(rows[0]["deleted"])


def _stored_answer(row: Row) -> Answer:
    return Answer(status_code=row["status_code"], body=row["response_body"], payment_id=row["payment_id"])


def _unquoted(text: str) -> str:
    """The content of an sf-string: printable ASCII, in which only quote and backslash are escaped."""
    body = text[1:-1]
    if len(text) < 2 or not text.endswith('"'):  # noqa: PLR2004 - two quotes
        raise IdempotencyKeyInvalid("the Idempotency-Key opens a quote and does not close it")
    characters = iter(body)
    content = []
    for character in characters:
        if character == '"':
            raise IdempotencyKeyInvalid("the Idempotency-Key has a quote inside that is not escaped")
        if character == "\\":
            character = next(characters, "")  # noqa: PLW2901 - the escaped character stands for itself
            if character not in ('"', "\\"):
                raise IdempotencyKeyInvalid("the Idempotency-Key has an unknown escape")
        content.append(character)
    return "".join(content)
