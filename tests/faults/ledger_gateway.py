"""A payment gateway in a process of its own, in the dialect of Stripe's API v1, with a durable ledger.

The ledger is a SQLite file that is synced before anything is answered, so it outlives SIGKILL and tells after every
accident what money has really moved. One key never moves money twice; two keys may. On demand the gateway behaves as a
gateway behind a bad network does: it delays, loses requests, loses answers, and fails before or after it has acted.

    python -m tests.faults.ledger_gateway --port 0 --ledger ledger.sqlite --seed 1

Stripe keeps a 500 under its key. Ours are accidents of the network in front: a repetition gets the true answer.
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import random
import re
import secrets
import signal
import socket
import sqlite3
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web
from aiohttp.typedefs import Handler

from tests.faults.proxy import HOST, free_port

KEY_NAME = "eci_pay_key"
"""The entry of an object's metadata that says whose act it was."""
WEBHOOK_TIMEOUT_SECONDS = 2.0
START_TIMEOUT_SECONDS = 20.0
START_TRIES = 3
API_VERSION = "2025-09-30.clover"
AMOUNT_MAX = 99_999_999
PAGE_MAX = 100
KEY_LENGTH_MAX = 255

DECLINES = {
    "pm_card_chargeDeclined": ("generic_decline", "Your card was declined."),
    "pm_card_chargeDeclinedInsufficientFunds": ("insufficient_funds", "Your card has insufficient funds."),
}
SEARCH = re.compile(r"""metadata\[(['"])(?P<name>.+?)\1\]\s*:\s*(['"])(?P<value>.*)\3""")
METADATA = re.compile(r"metadata\[(.+)\]")
CREATED = {"created": "=", "created[gt]": ">", "created[gte]": ">=", "created[lt]": "<", "created[lte]": "<="}

SCHEMA = """
CREATE TABLE IF NOT EXISTS intents (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL,
    amount INTEGER NOT NULL CHECK (amount > 0),
    currency TEXT NOT NULL,
    status TEXT NOT NULL,
    created REAL NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS metadata (
    name TEXT NOT NULL,
    value TEXT NOT NULL,
    seq INTEGER NOT NULL REFERENCES intents,
    PRIMARY KEY (name, value, seq)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS refunds (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    key TEXT NOT NULL,
    payment_intent TEXT NOT NULL REFERENCES intents (id),
    amount INTEGER NOT NULL CHECK (amount > 0),
    created REAL NOT NULL,
    body TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS refunds_of_intent ON refunds (payment_intent);
CREATE TABLE IF NOT EXISTS answers (
    idempotency_key TEXT PRIMARY KEY,
    digest TEXT NOT NULL,
    request_id TEXT NOT NULL,
    status INTEGER NOT NULL,
    body TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS counts (
    name TEXT PRIMARY KEY,
    number INTEGER NOT NULL
);
"""

KEPT = "SELECT digest, request_id, status, body FROM answers WHERE idempotency_key = ?"
COUNT = "INSERT INTO counts VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET number = number + excluded.number"

Form = dict[str, str]
Condition = tuple[str, tuple[object, ...]]
"""A part of a WHERE clause, with its values."""


@dataclass(frozen=True)
class Charge:
    """A payment intent. `amount` is in minor units; `key` is empty where its metadata has none."""

    key: str
    id: str
    amount: int
    currency: str
    status: str

    @property
    def took_money(self) -> bool:
        """Whether it was charged."""
        return self.status == "succeeded"


@dataclass(frozen=True)
class Refund:
    """Money given back."""

    key: str
    id: str
    payment_intent: str
    amount: int


@dataclass(frozen=True)
class Ledger:
    """All that the gateway has done, oldest first.

    `requests` are all POST requests, `repeats` those of them that were given a stored answer. These and `faults` may
    lack what was counted since the last act before a SIGKILL; charges and refunds are complete.
    """

    charges: tuple[Charge, ...]
    refunds: tuple[Refund, ...]
    requests: int
    repeats: int
    faults: dict[str, int]

    def taken(self) -> dict[str, int]:
        """The money taken by key."""
        return _sums((charge.key, charge.amount) for charge in self.charges if charge.took_money)

    def given_back(self) -> dict[str, int]:
        """The money given back by key."""
        return _sums((refund.key, refund.amount) for refund in self.refunds)

    def moved_twice(self) -> list[str]:
        """The keys under which money moved more than once."""
        moves = Counter(charge.key for charge in self.charges if charge.took_money)
        moves.update(refund.key for refund in self.refunds)
        return sorted(key for key, times in moves.items() if times > 1)

    def overdrawn(self) -> list[str]:
        """The payment intents of which more was given back than was taken."""
        taken = {charge.id: charge.amount for charge in self.charges if charge.took_money}
        given = _sums((refund.payment_intent, refund.amount) for refund in self.refunds)
        return sorted(intent for intent, amount in given.items() if amount > taken.get(intent, 0))


def read_ledger(path: Path) -> Ledger:
    """The ledger in a file, whether its gateway is running, stopped or killed."""
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True)) as connection:
        return _ledger_in(connection)


def _ledger_in(connection: sqlite3.Connection) -> Ledger:
    connection.execute("BEGIN")
    charges = connection.execute("SELECT key, id, amount, currency, status FROM intents ORDER BY seq").fetchall()
    refunds = connection.execute("SELECT key, id, payment_intent, amount FROM refunds ORDER BY seq").fetchall()
    counts = dict(connection.execute("SELECT name, number FROM counts"))
    connection.execute("COMMIT")
    return Ledger(
        charges=tuple(Charge(*row) for row in charges),
        refunds=tuple(Refund(*row) for row in refunds),
        requests=counts.get("requests", 0),
        repeats=counts.get("repeats", 0),
        faults={name: counts[name] for name in RATES if name in counts},
    )


def _sums(amounts: Iterator[tuple[str, int]]) -> dict[str, int]:
    sums: Counter[str] = Counter()
    for name, amount in amounts:
        sums[name] += amount
    return dict(sums)


@dataclass(frozen=True)
class Faults:
    """How often each fault befalls a POST request, between 0 and 1, and how long a delay can be."""

    delay: float = 0.0
    drop_request: float = 0.0
    error_before: float = 0.0
    drop_answer: float = 0.0
    error_after: float = 0.0
    answer_twice: float = 0.0
    delay_seconds: float = 1.5

    @classmethod
    def of(cls, values: Mapping[str, object]) -> "Faults":
        """Those that are named; the others never happen. Raises ValueError."""
        known = {one.name for one in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ValueError(f"there is no fault {name!r}, only {', '.join(sorted(known))}")
            top = 1.0 if name in RATES else float("inf")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= top:
                raise ValueError(f"{name} must be a number between 0 and {top}, not {value!r}")
        return cls(**{name: float(str(value)) for name, value in values.items()})

    def draw(self, generator: random.Random) -> "Luck":
        """What befalls the next request. It takes as many random numbers whatever the rates are."""
        hits = {name: generator.random() < getattr(self, name) for name in RATES}
        wait_seconds = generator.random() * self.delay_seconds
        return Luck(
            wait_seconds=wait_seconds if hits["delay"] else 0.0,
            before=next((name for name in ("drop_request", "error_before") if hits[name]), None),
            after=next((name for name in ("drop_answer", "error_after") if hits[name]), None),
            twice=hits["answer_twice"],
        )


RATES = tuple(one.name for one in fields(Faults) if one.name != "delay_seconds")


@dataclass(frozen=True)
class Luck:
    """What befalls one request: how long it waits, what happens instead of the act, and what instead of the answer."""

    wait_seconds: float
    before: str | None
    after: str | None
    twice: bool


@dataclass(frozen=True)
class _Answer:
    """How a request is answered. `event` is what a webhook tells, if the act is news; `original` the first request."""

    status: int
    body: str
    event: tuple[str, dict[str, Any]] | None = None
    original: str | None = None


class _Refused(Exception):
    """A request that is answered with an error which is not kept under its key."""

    def __init__(self, status: int, message: str, *, kind: str = "invalid_request_error", **more: object) -> None:
        super().__init__(message)
        self.status = status
        self.error = {"type": kind, "message": message, **more}

    def answer(self) -> _Answer:
        """The same as an answer, to be kept."""
        return _Answer(self.status, json.dumps({"error": self.error}))


class _Book:
    """The ledger file, and what is done in it. An act and the answer under its key are one transaction."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None)
        for setting in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=5000"):
            self._connection.execute(f"PRAGMA {setting}")
        self._connection.executescript(SCHEMA)
        self._uncounted: Counter[str] = Counter()

    def close(self) -> None:
        """Keeps what was counted, and closes the file."""
        with self._transaction():
            pass
        self._connection.close()

    def count(self, name: str) -> None:
        """Counts, in the file as of the next act."""
        self._uncounted[name] += 1

    def starts(self) -> int:
        """Counts a start of the process; tells how many there were."""
        self.count("starts")
        with self._transaction():
            pass
        (number,) = self._connection.execute("SELECT number FROM counts WHERE name = 'starts'").fetchone()
        return int(number)

    def ledger(self) -> Ledger:
        """All that was done, every count included."""
        with self._transaction():
            pass
        return _ledger_in(self._connection)

    def once(self, key: str | None, digest: str, request_id: str, act: Callable[[], _Answer]) -> _Answer:
        """Acts, or gives the answer that is kept under the key. A refusal that is raised leaves nothing behind."""
        with self._transaction():
            if key is None:
                return act()
            row = self._connection.execute(KEPT, (key,)).fetchone()
            if row is None:
                answer = act()
                self._connection.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?)", (key, digest, request_id, answer.status, answer.body)
                )
                return answer
            kept_digest, original, status, body = row
            if kept_digest != digest:
                raise _other_parameters(key)
            self.count("repeats")
            return _Answer(status, body, original=original)

    def add_intent(self, intent: dict[str, Any], created: float) -> None:
        """Writes a new payment intent."""
        metadata: dict[str, str] = intent["metadata"]
        columns = (intent["id"], metadata.get(KEY_NAME, ""), intent["amount"], intent["currency"], intent["status"])
        cursor = self._connection.execute(
            "INSERT INTO intents (id, key, amount, currency, status, created, body) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (*columns, created, json.dumps(intent)),
        )
        entries = [(name, value, cursor.lastrowid) for name, value in metadata.items()]
        self._connection.executemany("INSERT INTO metadata VALUES (?, ?, ?)", entries)

    def change_intent(self, intent: dict[str, Any]) -> None:
        """Writes what has become of a payment intent."""
        self._connection.execute(
            "UPDATE intents SET status = ?, body = ? WHERE id = ?", (intent["status"], json.dumps(intent), intent["id"])
        )

    def add_refund(self, refund: dict[str, Any], created: float) -> None:
        """Writes a new refund."""
        columns = (refund["id"], refund["metadata"].get(KEY_NAME, ""), refund["payment_intent"], refund["amount"])
        self._connection.execute(
            "INSERT INTO refunds (id, key, payment_intent, amount, created, body) VALUES (?, ?, ?, ?, ?, ?)",
            (*columns, created, json.dumps(refund)),
        )

    def refunded(self, intent_id: str) -> int:
        """How much of a payment intent was given back."""
        query = "SELECT coalesce(sum(amount), 0) FROM refunds WHERE payment_intent = ?"
        return int(self._connection.execute(query, (intent_id,)).fetchone()[0])

    def find(self, table: str, object_id: str, *, missing: int = 404) -> dict[str, Any]:
        """An object. Raises _Refused where there is none; Stripe answers 400 where a parameter names it."""
        row = self._connection.execute(f"SELECT body FROM {table} WHERE id = ?", (object_id,)).fetchone()
        if row is None:
            name = "payment_intent" if table == "intents" else "refund"
            raise _Refused(missing, f"No such {name}: '{object_id}'", code="resource_missing")
        found: dict[str, Any] = json.loads(row[0])
        return found

    def page(self, table: str, conditions: list[Condition], after: str | None, limit: int) -> "_Page":
        """The newest objects first, from the one after `after` on."""
        if after is not None:
            self.find(table, after, missing=400)
            conditions = [*conditions, (f"seq < (SELECT seq FROM {table} WHERE id = ?)", (after,))]
        where = " AND ".join(["TRUE", *(part for part, _ in conditions)])
        rows = self._connection.execute(
            f"SELECT body FROM {table} WHERE {where} ORDER BY seq DESC LIMIT ?",
            (*(value for _, values in conditions for value in values), limit + 1),
        ).fetchall()
        return _Page([json.loads(body) for (body,) in rows[:limit]], has_more=len(rows) > limit)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.executemany(COUNT, list(self._uncounted.items()))
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._uncounted.clear()


@dataclass(frozen=True)
class _Page:
    data: list[dict[str, Any]]
    has_more: bool


class _Acts:
    """What the gateway does, on its book. Whoever calls holds a transaction."""

    def __init__(self, book: _Book) -> None:
        self._book = book

    def create_intent(self, form: Form) -> _Answer:
        """Takes the money if it is confirmed at once, unless the card is declined."""
        amount, currency = _amount(form, required=True), _currency(form)
        method, confirm = form.get("payment_method"), _flag(form, "confirm")
        if form.get("capture_method") == "manual":
            raise _Refused(400, "This gateway captures at once.", param="capture_method")
        if method is not None and not method.startswith("pm_"):
            raise _Refused(400, f"No such PaymentMethod: '{method}'", code="resource_missing", param="payment_method")
        if confirm and method is None:
            raise _Refused(400, "A payment method is needed to confirm.", code="parameter_missing")
        now = time.time()
        intent: dict[str, Any] = {
            "id": _new_id("pi_3"),
            "object": "payment_intent",
            "amount": amount,
            "amount_capturable": 0,
            "amount_received": 0,
            "canceled_at": None,
            "cancellation_reason": None,
            "capture_method": form.get("capture_method", "automatic_async"),
            "confirmation_method": "automatic",
            "created": int(now),
            "currency": currency,
            "customer": form.get("customer"),
            "description": form.get("description"),
            "last_payment_error": None,
            "latest_charge": None,
            "livemode": False,
            "metadata": _metadata(form),
            "next_action": None,
            "payment_method": method,
            "payment_method_types": _items(form, "payment_method_types") or ["card"],
            "status": "requires_confirmation" if method else "requires_payment_method",
        }
        answer = _confirmed(intent) if confirm and method else _Answer(200, json.dumps(intent))
        self._book.add_intent(intent, now)
        return answer

    def cancel_intent(self, intent_id: str, form: Form) -> _Answer:
        """Makes sure that an intent never takes money."""
        intent = self._book.find("intents", intent_id)
        if intent["status"] in ("succeeded", "canceled"):
            message = f"You cannot cancel this PaymentIntent because it has a status of {intent['status']}."
            return _Refused(400, message, code="payment_intent_unexpected_state", payment_intent=intent).answer()
        intent |= {
            "status": "canceled",
            "canceled_at": int(time.time()),
            "cancellation_reason": form.get("cancellation_reason"),
        }
        self._book.change_intent(intent)
        return _Answer(200, json.dumps(intent), ("payment_intent.canceled", intent))

    def create_refund(self, form: Form) -> _Answer:
        """Gives money back, never more than is left of what was taken."""
        intent_id = form.get("payment_intent")
        if not intent_id:
            raise _Refused(400, "Missing required param: payment_intent.", code="parameter_missing")
        asked = _amount(form, required=False)
        intent = self._book.find("intents", intent_id, missing=400)
        left = intent["amount_received"] - self._book.refunded(intent_id)
        amount = left if asked is None else asked
        if intent["status"] != "succeeded":
            message = f"This PaymentIntent ({intent_id}) does not have a successful charge to refund."
            return _Refused(400, message, param="payment_intent").answer()
        if left <= 0:
            message = f"Charge {intent['latest_charge']} has already been refunded."
            return _Refused(400, message, code="charge_already_refunded").answer()
        if amount > left:
            message = f"Refund amount ({amount}) is greater than unrefunded amount on charge ({left})"
            return _Refused(400, message, param="amount").answer()
        now = time.time()
        refund = {
            "id": _new_id("re_3"),
            "object": "refund",
            "amount": amount,
            "charge": intent["latest_charge"],
            "created": int(now),
            "currency": intent["currency"],
            "metadata": _metadata(form),
            "payment_intent": intent_id,
            "reason": form.get("reason"),
            "status": "succeeded",
        }
        self._book.add_refund(refund, now)
        return _Answer(200, json.dumps(refund), ("refund.created", refund))


def _confirmed(intent: dict[str, Any]) -> _Answer:
    """Takes the money, or the card is declined; changes the intent."""
    intent["latest_charge"] = _new_id("ch_3")
    if (decline := DECLINES.get(intent["payment_method"])) is None:
        intent |= {"status": "succeeded", "amount_received": intent["amount"]}
        return _Answer(200, json.dumps(intent), ("payment_intent.succeeded", intent))
    error = {
        "type": "card_error",
        "code": "card_declined",
        "decline_code": decline[0],
        "message": decline[1],
        "charge": intent["latest_charge"],
        "payment_method": {"id": intent["payment_method"], "object": "payment_method", "type": "card"},
    }
    intent |= {"status": "requires_payment_method", "payment_method": None, "last_payment_error": error}
    body = json.dumps({"error": {**error, "payment_intent": intent}})
    return _Answer(402, body, ("payment_intent.payment_failed", intent))


class _Gateway:
    """The gateway's HTTP side: who may ask, what befalls a request, who hears of an act."""

    def __init__(self, options: argparse.Namespace, faults: Faults) -> None:
        self._book = _Book(options.ledger)
        self._acts = _Acts(self._book)
        self._generator = random.Random(f"{options.seed}-{self._book.starts()}")
        self._faults = faults
        self._search_lag: float = options.search_lag
        self._webhook_url: str | None = options.webhook_url
        self._webhook_secret: str = options.webhook_secret
        self._in_flight: dict[str, str] = {}
        self._deliveries: set[asyncio.Task[None]] = set()

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[self._guard])
        intents, refunds = "/v1/payment_intents", "/v1/refunds"
        app.add_routes(
            [
                web.post(intents, self._create_intent),
                web.get(intents, self._list_intents),
                web.get(f"{intents}/search", self._search_intents),
                web.get(f"{intents}/{{id}}", self._show("intents")),
                web.post(f"{intents}/{{id}}/cancel", self._cancel_intent),
                web.post(refunds, self._create_refund),
                web.get(refunds, self._list_refunds),
                web.get(f"{refunds}/{{id}}", self._show("refunds")),
                web.post("/_faults", self._set_faults),
                web.get("/_ledger", self._show_ledger),
            ]
        )
        return app

    async def close(self) -> None:
        """Gives up what is still to be told, and closes the ledger."""
        for task in self._deliveries:
            task.cancel()
        await asyncio.gather(*self._deliveries, return_exceptions=True)
        self._book.close()

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Lets in who has a key of ours, and answers refusals as Stripe does."""
        try:
            _authorize(request)
            return await handler(request)
        except _Refused as refused:
            return web.json_response({"error": refused.error}, status=refused.status)
        except web.HTTPClientError as error:
            message = f"Unrecognized request URL ({request.method}: {request.path})."
            return web.json_response(
                {"error": {"type": "invalid_request_error", "message": message}}, status=error.status
            )

    async def _create_intent(self, request: web.Request) -> web.Response:
        return await self._post(request, self._acts.create_intent)

    async def _cancel_intent(self, request: web.Request) -> web.Response:
        return await self._post(request, lambda form: self._acts.cancel_intent(request.match_info["id"], form))

    async def _create_refund(self, request: web.Request) -> web.Response:
        return await self._post(request, self._acts.create_refund)

    async def _post(self, request: web.Request, act: Callable[[Form], _Answer]) -> web.Response:
        """Acts, and answers as luck has it. Whether the client still listens makes no difference to the act."""
        body = await request.text()
        luck = self._faults.draw(self._generator)
        self._book.count("requests")
        if luck.before is not None:
            self._book.count(luck.before)
            return _cut(request) if luck.before == "drop_request" else _failed()
        request_id = _new_id("req_")
        answer = await self._act_once(request, body, request_id, luck, act)
        self._tell(answer, request, request_id, twice=luck.twice)
        if luck.after is not None:
            self._book.count(luck.after)
            return _cut(request) if luck.after == "drop_answer" else _failed()
        headers = {"Request-Id": request_id, "Stripe-Version": request.headers.get("Stripe-Version", API_VERSION)}
        if key := request.headers.get("Idempotency-Key"):
            headers["Idempotency-Key"] = key
        if answer.original is not None:
            headers |= {"Idempotent-Replayed": "true", "Original-Request": answer.original}
        return web.Response(status=answer.status, text=answer.body, content_type="application/json", headers=headers)

    async def _act_once(
        self, request: web.Request, body: str, request_id: str, luck: Luck, act: Callable[[Form], _Answer]
    ) -> _Answer:
        """Acts once for a key, and on its behalf never twice at a time. Refusals are answers too: they may get lost."""
        key = request.headers.get("Idempotency-Key")
        pairs = parse_qsl(body, keep_blank_values=True)
        digest = hashlib.sha256(json.dumps([request.path, sorted(pairs)]).encode()).hexdigest()
        if key is not None and len(key) > KEY_LENGTH_MAX:
            raise _Refused(400, f"Idempotency keys have at most {KEY_LENGTH_MAX} characters.")
        if key is not None and key in self._in_flight:
            if self._in_flight[key] != digest:
                raise _other_parameters(key)
            message = (
                "There is currently another in-progress request using this Idempotent Key. Please try again later."
            )
            raise _Refused(409, message, kind="idempotency_error", code="idempotency_key_in_use")
        if key is not None:
            self._in_flight[key] = digest
        try:
            if luck.wait_seconds:
                self._book.count("delay")
                await asyncio.sleep(luck.wait_seconds)
            return self._book.once(key, digest, request_id, lambda: act(dict(pairs)))
        except _Refused as refused:
            return refused.answer()
        finally:
            if key is not None:
                del self._in_flight[key]

    def _show(self, table: str) -> Callable[[web.Request], Any]:
        async def show(request: web.Request) -> web.Response:
            return web.json_response(self._book.find(table, request.match_info["id"]))

        return show

    async def _list_intents(self, request: web.Request) -> web.Response:
        return self._list("intents", request, {})

    async def _list_refunds(self, request: web.Request) -> web.Response:
        return self._list("refunds", request, {"payment_intent": "payment_intent = ?"})

    def _list(self, table: str, request: web.Request, filters: dict[str, str]) -> web.Response:
        """A page of a table. A parameter that would be passed over is refused, as it would change the meaning."""
        filters = {**filters, **{name: f"CAST(created AS INTEGER) {sign} ?" for name, sign in CREATED.items()}}
        conditions: list[Condition] = []
        for name, value in request.query.items():
            if name in filters:
                conditions.append((filters[name], (_integer(value, name) if name in CREATED else value,)))
            elif name not in ("limit", "starting_after") and not name.startswith("expand["):
                raise _unknown_parameter(name)
        page = self._book.page(table, conditions, request.query.get("starting_after"), _limit(request))
        return web.json_response({"object": "list", "url": request.path, "has_more": page.has_more, "data": page.data})

    async def _search_intents(self, request: web.Request) -> web.Response:
        """Finds intents by one entry of their metadata, a while after they were made, as the index is behind."""
        for name in request.query:
            if name not in ("query", "limit", "page"):
                raise _unknown_parameter(name)
        query = SEARCH.fullmatch(request.query.get("query", "").strip())
        if query is None:
            raise _Refused(400, "We were unable to parse your search query: metadata['name']:'value'", param="query")
        value = re.sub(r"\\(.)", r"\1", query["value"])
        conditions: list[Condition] = [
            ("created <= ?", (time.time() - self._search_lag,)),
            ("seq IN (SELECT seq FROM metadata WHERE name = ? AND value = ?)", (query["name"], value)),
        ]
        page = self._book.page("intents", conditions, request.query.get("page"), _limit(request))
        return web.json_response(
            {
                "object": "search_result",
                "url": request.path,
                "has_more": page.has_more,
                "next_page": page.data[-1]["id"] if page.has_more else None,
                "data": page.data,
            }
        )

    async def _set_faults(self, request: web.Request) -> web.Response:
        """Sets the faults that are named; the others never happen any more."""
        try:
            self._faults = Faults.of(await request.json())
        except ValueError as error:
            raise _Refused(400, str(error)) from None
        return web.json_response(asdict(self._faults))

    async def _show_ledger(self, _: web.Request) -> web.Response:
        return web.json_response(asdict(self._book.ledger()))

    def _tell(self, answer: _Answer, request: web.Request, request_id: str, *, twice: bool) -> None:
        """Has the webhook told of an act, in the background."""
        if answer.event is None or self._webhook_url is None:
            return
        kind, subject = answer.event
        event = {
            "id": _new_id("evt_3"),
            "object": "event",
            "api_version": API_VERSION,
            "created": int(time.time()),
            "data": {"object": subject},
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": request_id, "idempotency_key": request.headers.get("Idempotency-Key")},
            "type": kind,
        }
        if twice:
            self._book.count("answer_twice")
        for _ in range(2 if twice else 1):
            task = asyncio.create_task(self._deliver(self._webhook_url, json.dumps(event).encode()))
            self._deliveries.add(task)
            task.add_done_callback(self._deliveries.discard)

    async def _deliver(self, url: str, body: bytes) -> None:
        """Posts an event once; nobody minds if it does not arrive."""
        headers = {
            "Content-Type": "application/json; charset=utf-8",
            "Stripe-Signature": sign(body, self._webhook_secret),
        }
        timeout = aiohttp.ClientTimeout(total=WEBHOOK_TIMEOUT_SECONDS)
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with aiohttp.ClientSession(timeout=timeout) as session, session.post(url, data=body, headers=headers):
                pass


def sign(body: bytes, secret: str, timestamp: int | None = None) -> str:
    """The header `Stripe-Signature` of an event."""
    timestamp = int(time.time()) if timestamp is None else timestamp
    signature = hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={signature}"


def _authorize(request: web.Request) -> None:
    scheme, _, secret = request.headers.get("Authorization", "").partition(" ")
    if request.path.startswith("/v1/") and not (scheme == "Bearer" and secret.startswith("sk_test_")):
        raise _Refused(401, "You did not provide a valid API key: Authorization: Bearer sk_test_...")


def _cut(request: web.Request) -> web.Response:
    """Resets the client's connection; the response is never sent."""
    if request.transport is not None:
        connection = request.transport.get_extra_info("socket")
        with suppress(OSError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        request.transport.abort()
    return web.Response()


def _failed() -> web.Response:
    error = {"type": "api_error", "message": "An error occurred with our connection. Please try again."}
    return web.json_response({"error": error}, status=500)


def _other_parameters(key: str) -> _Refused:
    message = (
        "Keys for idempotent requests can only be used with the same parameters they were first used with. "
        f"Try using a key other than '{key}' if you meant to execute a different request."
    )
    return _Refused(400, message, kind="idempotency_error")


def _unknown_parameter(name: str) -> _Refused:
    return _Refused(400, f"Received unknown parameter: {name}", code="parameter_unknown", param=name)


def _metadata(form: Form) -> dict[str, str]:
    entries = ((METADATA.fullmatch(name), value) for name, value in form.items())
    return {match[1]: value for match, value in entries if match and value}


def _items(form: Form, name: str) -> list[str]:
    return [value for entry, value in form.items() if entry.startswith(f"{name}[")]


def _flag(form: Form, name: str) -> bool:
    value = form.get(name, "false")
    if value not in ("true", "false"):
        raise _Refused(400, f"Invalid boolean: {value}", param=name)
    return value == "true"


def _integer(value: str, name: str) -> int:
    if not re.fullmatch(r"\d{1,12}", value):
        raise _Refused(400, f"Invalid integer: {value}", code="parameter_invalid_integer", param=name)
    return int(value)


def _amount(form: Form, *, required: bool) -> int | None:
    if "amount" not in form:
        if required:
            raise _Refused(400, "Missing required param: amount.", code="parameter_missing", param="amount")
        return None
    amount = _integer(form["amount"], "amount")
    if not 1 <= amount <= AMOUNT_MAX:
        raise _Refused(400, f"Invalid positive integer: {amount}", code="parameter_invalid_integer", param="amount")
    return amount


def _currency(form: Form) -> str:
    if "currency" not in form:
        raise _Refused(400, "Missing required param: currency.", code="parameter_missing", param="currency")
    if not re.fullmatch(r"[a-zA-Z]{3}", form["currency"]):
        raise _Refused(400, f"Invalid currency: {form['currency']}", param="currency")
    return form["currency"].lower()


def _limit(request: web.Request) -> int:
    limit = _integer(request.query.get("limit", "10"), "limit")
    if not 1 <= limit <= PAGE_MAX:
        raise _Refused(400, f"This value must be between 1 and {PAGE_MAX}.", param="limit")
    return limit


def _new_id(prefix: str) -> str:
    return prefix + secrets.token_hex(12)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A payment gateway with a durable ledger that can be made to fail")
    parser.add_argument("--port", type=int, default=0, help="0 for a free one")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--seed", default="0", help="of the faults; every start draws others")
    parser.add_argument("--faults", default="{}", help='JSON, such as {"drop_answer": 0.1}')
    parser.add_argument("--search-lag", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--webhook-url")
    parser.add_argument("--webhook-secret", default="whsec_test")
    parser.add_argument("--until-stdin-ends", action="store_true", help="ends with the process that started it")
    return parser.parse_args()


async def _serve(options: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    if options.until_stdin_ends:
        loop.add_reader(sys.stdin.fileno(), ended.set)
    gateway = _Gateway(options, Faults.of(json.loads(options.faults)))
    runner = web.AppRunner(gateway.app(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, HOST, options.port, backlog=1024)
    await site.start()
    print(f"listening on {runner.addresses[0][1]}", flush=True)
    await ended.wait()
    await runner.cleanup()
    await gateway.close()


@dataclass
class LedgerGateway:
    """The gateway for a test: `async with LedgerGateway(tmp_path / "ledger.sqlite") as gateway`.

    Its port and its faults stay the same over `kill` and `restart`, and so does its ledger.
    """

    path: Path
    seed: int = 1
    search_lag: float = 0.0
    webhook_url: str | None = None
    webhook_secret: str = "whsec_test"
    faults: Mapping[str, float] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    _process: asyncio.subprocess.Process | None = field(default=None, init=False)

    async def __aenter__(self) -> "LedgerGateway":
        for remaining in reversed(range(START_TRIES)):
            try:
                await self._start()
                break
            except ConnectionError:
                if not remaining:
                    raise
                self.port = free_port()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.kill()

    @property
    def url(self) -> str:
        """What Stripe's `api_base` is set to."""
        return f"http://{HOST}:{self.port}"

    @property
    def is_running(self) -> bool:
        """Whether its process lives."""
        return self._process is not None and self._process.returncode is None

    async def kill(self) -> None:
        """Ends it with SIGKILL; nothing happens if it does not run."""
        if self._process is not None:
            process, self._process = self._process, None
            with suppress(ProcessLookupError):
                process.kill()
            if process.stdin is not None:
                process.stdin.close()
            await process.communicate()

    async def restart(self) -> None:
        """Starts it again with the same port and ledger; kills it before if it runs."""
        await self.kill()
        await self._start()

    async def set_faults(self, **rates: float) -> None:
        """Sets the faults that are named; the others never happen any more."""
        Faults.of(rates)
        self.faults = rates
        async with aiohttp.ClientSession() as session, session.post(f"{self.url}/_faults", json=rates) as response:
            response.raise_for_status()

    async def ledger(self) -> Ledger:
        """The ledger, every count included while it runs."""
        if self.is_running:
            async with aiohttp.ClientSession() as session, session.get(f"{self.url}/_ledger") as response:
                response.raise_for_status()
        return read_ledger(self.path)

    async def _start(self) -> None:
        """Starts the process and waits for its line. Raises ConnectionError where it ends before."""
        options: dict[str, object] = {
            "--port": self.port,
            "--ledger": self.path,
            "--seed": self.seed,
            "--faults": json.dumps(dict(self.faults)),
            "--search-lag": self.search_lag,
            "--webhook-secret": self.webhook_secret,
        }
        if self.webhook_url is not None:
            options["--webhook-url"] = self.webhook_url
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.faults.ledger_gateway",
            "--until-stdin-ends",
            *(str(part) for option in options.items() for part in option),
            cwd=Path(__file__).parents[2],
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdout is not None
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                line = await self._process.stdout.readline()
        except BaseException:
            await self.kill()
            raise
        if not line.startswith(b"listening on "):
            await self.kill()
            raise ConnectionError(f"the gateway does not start on port {self.port}; see its standard error")


def main() -> NoReturn:
    """Runs the gateway until it is told to end."""
    asyncio.run(_serve(_options()))
    sys.exit(0)


if __name__ == "__main__":
    main()
