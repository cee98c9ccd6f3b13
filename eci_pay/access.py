"""Who may call the HTTP API, and what for: API keys, each with a name and scopes.

A key is `ecipay_ID_SECRET`: the id is public, the secret 256 random bits, of which only a keyed hash is stored. That is
a fast one: a slow one protects what people choose, and this cannot be guessed.
The name is the caller: its idempotency keys are its own, and stay so when one of its API keys takes another's place.
"""

import asyncio
import base64
import hashlib
import hmac
import re
import secrets
import string
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Generic, TypeVar

from eci_pay.context import current_actor
from eci_pay.database import Database, Row
from eci_pay.errors import ApiKeyNotFound, Unauthorized, Unavailable, ValidationFailed, apart

SECRET_BYTES = 32
KEY_ID_LENGTH = 12
NAME_LENGTH_MAX = 64
REMEMBERED_MAX = 10_000
"""How many keys, known or not, one process remembers at a time."""
LOOKUPS_AT_A_TIME_MAX = 2
"""Each of all keys that were asked for since the one before, so that whoever tries keys takes little of the pool from
those who have one, and does not make them wait."""

USE_NOTED_EVERY = timedelta(hours=1)
T = TypeVar("T")

_NOTHING = (0.0, None)
_PERSON = b"eci-pay api key"  # BLAKE2 keeps hashes of different purposes apart by it: at most 16 bytes
_TOKEN = re.compile(rf"ecipay_(?P<key_id>[0-9a-z]{{{KEY_ID_LENGTH}}})_(?P<secret>[0-9A-Za-z_-]{{43}})")
_NAME = re.compile(rf"[0-9A-Za-z](?:[0-9A-Za-z._-]{{0,{NAME_LENGTH_MAX - 1}}})")


class Scope(StrEnum):
    """What a key may be used for."""

    CHARGE = "payments:charge"
    REFUND = "payments:refund"
    READ = "payments:read"
    WRITE = "payments:write"
    METRICS = "metrics:read"
    ADMIN = "admin"
    """Everything."""


_KNOWN_SCOPES = frozenset(scope.value for scope in Scope)


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Whose key a request has."""

    name: str
    key_id: str
    scopes: frozenset[Scope]

    @property
    def actor(self) -> str:
        """As the audit trail names it."""
        return f"client:{self.name}/{self.key_id}"

    def may(self, scope: Scope) -> bool:
        """Whether the key has the scope."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiKey:
    """A key as it is kept, without its secret."""

    key_id: str
    name: str
    scopes: tuple[str, ...]
    created_by: str | None
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    revoked_by: str | None
    last_used_at: datetime | None

    @classmethod
    def of_row(cls, row: Row) -> "ApiKey":
        """Of a row of `api_keys_list.sql`."""
        return cls(**{**row, "scopes": tuple(row["scopes"])})

    def state(self, now: datetime) -> str:
        """active, expired or revoked."""
        if self.revoked_at is not None:
            return "revoked"
        return "expired" if self.expires_at is not None and self.expires_at <= now else "active"


class _Memory(Generic[T]):
    """What was found out about secrets, by their hashes, for some seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._found: dict[bytes, tuple[float, T]] = {}

    def get(self, secret_hash: bytes) -> T | None:
        until, found = self._found.get(secret_hash, _NOTHING)
        return found if time.monotonic() < until else None

    def get_old(self, secret_hash: bytes) -> T | None:
        """However old it is."""
        return self._found.get(secret_hash, _NOTHING)[1]

    def put(self, secret_hash: bytes, found: T) -> None:
        self._found.pop(secret_hash, None)  # the oldest come first
        while len(self._found) >= REMEMBERED_MAX:
            self._found.pop(next(iter(self._found)))
        self._found[secret_hash] = (time.monotonic() + self._seconds, found)


class ApiKeys:
    """The keys. Every method raises Unavailable."""

    def __init__(
        self, database: Database, *, pepper: str, remember_seconds: float, clock: Callable[[], datetime]
    ) -> None:
        self._database = database
        # Of any length; BLAKE2 takes a key of up to 64 bytes.
        self._pepper = hashlib.sha512(pepper.encode()).digest() if pepper else b""
        self._clock = clock
        # Apart, so that whoever tries keys does not make those be forgotten that are used.
        self._known: _Memory[Row] = _Memory(remember_seconds)
        self._unknown: _Memory[bool] = _Memory(remember_seconds)
        self._asked: dict[bytes, asyncio.Future[Row | None]] = {}
        self._waiting: dict[bytes, str] = {}
        """The ids of those that no look has begun for."""
        self._looking: set[asyncio.Task[None]] = set()

    async def create(
        self, *, name: str, scopes: Collection[Scope], expires_at: datetime | None = None
    ) -> tuple[ApiKey, str]:
        """Makes a key; returns it and, for the only time, what its owner has to send. Raises ValidationFailed."""
        if not _NAME.fullmatch(name):
            raise ValidationFailed.of(
                "name", f"must be up to {NAME_LENGTH_MAX} ASCII letters, digits, dots, dashes and underscores"
            )
        if not scopes:
            raise ValidationFailed.of("scope", "at least one is needed")
        if expires_at is not None and expires_at <= self._clock():
            raise ValidationFailed.of("expires", "must be in the future")
        alphabet = string.digits + string.ascii_lowercase
        key_id = "".join(secrets.choice(alphabet) for _ in range(KEY_ID_LENGTH))
        secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode().rstrip("=")
        params = {
            "key_id": key_id,
            "name": name,
            "scopes": sorted(scope.value for scope in scopes),
            "secret_hash": self._hash(key_id, secret),
            "created_by": current_actor(),
            "created_at": self._clock(),
            "expires_at": expires_at,
        }
        (row,) = await self._database.fetch("api_key_create", params)
        return ApiKey.of_row(row), f"ecipay_{key_id}_{secret}"

    async def list(self) -> tuple[ApiKey, ...]:
        """All of them, oldest first."""
        return tuple(ApiKey.of_row(row) for row in await self._database.read("api_keys_list"))

    async def revoke(self, key_id: str) -> ApiKey:
        """Ends a key for good, by its id or by itself, as it is found where it got out; a second time changes nothing.
        Servers notice when what they remember ends. Raises ApiKeyNotFound."""
        if whole := _TOKEN.fullmatch(key_id):
            key_id = whole["key_id"]
        params = {"key_id": key_id, "at": self._clock(), "revoked_by": current_actor()}
        rows = await self._database.fetch("api_key_revoke", params)
        if not rows:
            raise ApiKeyNotFound(f"there is no API key {key_id}: `eci-pay api-key list` shows them")
        return ApiKey.of_row(rows[0])

    async def caller(self, token: str, *, may_be_outdated: bool = False) -> Caller:
        """Whose key this is. While the database is away, a key that was known stays so where that `may_be_outdated`,
        though it may have been revoked. Raises Unauthorized."""
        parts = _TOKEN.fullmatch(token)
        if parts is None:
            raise Unauthorized("this is no API key of eci-pay", key_was_given=True)
        secret_hash = self._hash(parts["key_id"], parts["secret"])
        try:
            row = await self._found(parts["key_id"], secret_hash)
        except Unavailable:
            row = self._known.get_old(secret_hash) if may_be_outdated else None
            if row is None:
                raise
        if row is None:
            raise Unauthorized("there is no such API key", key_was_given=True)
        if row["revoked_at"] is not None:
            raise Unauthorized("this API key was revoked", key_was_given=True)
        if row["expires_at"] is not None and row["expires_at"] <= self._clock():
            raise Unauthorized("this API key has expired", key_was_given=True)
        caller: Caller = row["caller"]
        return caller

    def _hash(self, key_id: str, secret: str) -> bytes:
        return hashlib.blake2b(
            secret.encode(), digest_size=32, key=self._pepper, salt=key_id.encode(), person=_PERSON
        ).digest()

    async def _found(self, key_id: str, secret_hash: bytes) -> Row | None:
        """The row of the key that has this secret, at most as old as what is remembered. Requests that come at the same
        time share a look."""
        found = self._known.get(secret_hash)
        if found is not None or self._unknown.get(secret_hash):
            return found
        asked = self._asked.get(secret_hash)
        if asked is None:
            asked = asyncio.get_running_loop().create_future()
            self._asked[secret_hash] = asked
            self._waiting[secret_hash] = key_id
            self._look_soon()
        return await asyncio.shield(asked)

    def _look_soon(self, ended: asyncio.Task[None] | None = None) -> None:
        if ended is not None:
            self._looking.discard(ended)
        if self._waiting and len(self._looking) < LOOKUPS_AT_A_TIME_MAX:
            # In a context of its own, for it looks for others too: its log lines have no request's id.
            looking = asyncio.create_task(self._look_up_waiting(), context=Context())
            self._looking.add(looking)
            looking.add_done_callback(self._look_soon)

    async def _look_up_waiting(self) -> None:
        """Looks up all that wait."""
        key_ids, self._waiting = self._waiting, {}
        found: dict[bytes, Row] = {}
        try:
            found = await self._look_up(key_ids)
            for secret_hash in key_ids:
                self._asked[secret_hash].set_result(found.get(secret_hash))
        except Exception as error:
            for secret_hash in key_ids:
                self._asked[secret_hash].set_exception(apart(error))
                self._asked[secret_hash].exception()  # whoever asked may have gone
        finally:
            for secret_hash in key_ids:
                self._asked.pop(secret_hash).cancel()  # which changes nothing, but where the look was broken off
        with suppress(Unavailable):
            await self._note_use(found)

    async def _look_up(self, key_ids: Mapping[bytes, str]) -> dict[bytes, Row]:
        """Those that are ours, by the hashes of their secrets."""
        read = await self._database.read("api_keys_by_id", {"key_ids": list(set(key_ids.values()))})
        rows = {row["key_id"]: row for row in read}
        found: dict[bytes, Row] = {}
        for secret_hash, key_id in key_ids.items():
            row = rows.get(key_id)
            # What is compared are hashes, so how long it takes would tell nothing of a secret anyway.
            if row is None or not hmac.compare_digest(row["secret_hash"], secret_hash):
                self._unknown.put(secret_hash, True)
                continue
            # A later release may have scopes that this one does not know.
            scopes = frozenset(Scope(scope) for scope in row["scopes"] if scope in _KNOWN_SCOPES)
            found[secret_hash] = {**row, "caller": Caller(name=row["name"], key_id=key_id, scopes=scopes)}
            self._known.put(secret_hash, found[secret_hash])
        return found

    async def _note_use(self, found: Mapping[bytes, Row]) -> None:
        now = self._clock()
        key_ids = [
            row["key_id"]
            for row in found.values()
            if row["last_used_at"] is None or now - row["last_used_at"] > USE_NOTED_EVERY
        ]
        if key_ids:
            await self._database.fetch("api_keys_used", {"key_ids": key_ids, "at": now})
