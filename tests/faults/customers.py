"""The customers of the storm: they charge, retry, refund and cancel, at any replica, and write down what they are told.

What each does is drawn from the seed; they bear with every failure, and hold the service to what it has said.
"""

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import aiohttp

REQUEST_TIMEOUT_SECONDS = 6.0
TRIES_MAX = 8
RETRY_SECONDS_MAX = 0.3
FINAL = (200, 201, 402)
"""What is an answer for good: the same again for whoever repeats the request."""
REFUSED = (400, 404, 409, 422)
GOOD_CARD = "pm_card_visa"
BAD_CARDS = ("pm_card_chargeDeclined", "pm_card_chargeDeclinedInsufficientFunds")


@dataclass(frozen=True)
class Told:
    """What one try was answered; status 0: nothing."""

    at: float
    status: int
    body: str
    replica: int

    @property
    def is_final(self) -> bool:
        """Whether it was an answer for good."""
        return self.status in FINAL


@dataclass
class Request:
    """One request and all that its tries were told. `amount` is in major units, None: all that is left."""

    kind: str
    order_id: int
    key: str | None
    path: str
    body: dict[str, Any]
    told: list[Told] = field(default_factory=list)
    payment_id: int | None = None

    def finals(self) -> list[Told]:
        """The answers for good."""
        return [told for told in self.told if told.is_final]

    def document(self) -> dict[str, Any]:
        """For a reader of the history."""
        return {
            "kind": self.kind,
            "order_id": self.order_id,
            "payment_id": self.payment_id,
            "key": self.key,
            "body": self.body,
            "told": [
                {"at": round(told.at, 3), "status": told.status, "replica": told.replica, "body": told.body[:2000]}
                for told in self.told
            ],
        }


@dataclass
class History:
    """Everything that the customers did."""

    started: float = field(default_factory=time.monotonic)
    requests: list[Request] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    """What a customer saw at once that must never be."""

    def add(self, request: Request) -> Request:
        """Remembers a request before it is sent."""
        self.requests.append(request)
        return request

    def note(self, request: Request, told: Told) -> None:
        """Remembers an answer."""
        earlier = next(iter(request.finals()), None)
        request.told.append(told)
        self.statuses[told.status] += 1
        if told.status == 500:
            self.faults.append(f"{request.key or request.path} was answered 500: {told.body}")
        if told.is_final and earlier is not None and (told.status, told.body) != (earlier.status, earlier.body):
            self.faults.append(f"{request.key} was told {earlier} and then {told}")

    @property
    def operations(self) -> int:
        """How many requests were sent, every try counted."""
        return sum(len(request.told) for request in self.requests)


class Customers:
    """Concurrent customers of some replicas. `addresses` are those of the replicas, whether they are up or not."""

    def __init__(self, seed: int, addresses: list[str], history: History, *, number: int) -> None:
        self._seed = seed
        self._addresses = addresses
        self._history = history
        self._number = number
        self._closed = asyncio.Event()
        self._orders = 0

    async def business(self) -> None:
        """What they do until they are sent home."""
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS)
        async with (
            aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
            asyncio.TaskGroup() as group,
        ):
            for number in range(self._number):
                group.create_task(self._customer(session, random.Random(f"{self._seed} {number}")))

    def go_home(self) -> None:
        """No customer begins anything new."""
        self._closed.set()

    async def ask_again(self) -> None:
        """Repeats every request with a key until it has an answer for good, or is refused."""
        timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS)
        chance = random.Random(f"{self._seed} again")
        async with aiohttp.ClientSession(timeout=timeout) as session:
            for request in self._history.requests:
                if request.key is not None:
                    await self._insist(session, chance, request)

    async def _customer(self, session: aiohttp.ClientSession, chance: random.Random) -> None:
        while not self._closed.is_set():
            self._orders += 1
            await self._order(session, chance, self._orders)

    async def _order(self, session: aiohttp.ClientSession, chance: random.Random, order_id: int) -> None:
        """Buys something, sometimes in a hurry, and sometimes wants the money back."""
        if chance.random() < 0.1:
            await self._cash(session, chance, order_id)
            return
        charge = self._charge(chance, order_id, 1)
        match chance.random():
            case draw if draw < 0.15:  # a double click
                await asyncio.gather(*(self._insist(session, chance, charge) for _ in range(2)))
            case draw if draw < 0.25:  # two windows
                other = self._charge(chance, order_id, 2)
                await asyncio.gather(*(self._insist(session, chance, each) for each in (charge, other)))
            case _:
                await self._insist(session, chance, charge)
        if not any(told.status == 201 for told in charge.told):
            if chance.random() < 0.5:
                await self._insist(session, chance, self._charge(chance, order_id, 3))
            elif charge.payment_id is not None and chance.random() < 0.6:
                await self._try(session, chance, self._cancel(order_id, charge.payment_id))
            return
        if chance.random() < 0.5:
            await self._give_back(session, chance, charge)
        if chance.random() < 0.3:
            await self._insist(session, chance, charge)

    async def _cash(self, session: aiohttp.ClientSession, chance: random.Random, order_id: int) -> None:
        """Pays at the door, and somebody sets the status by hand; or is recorded by the legacy way."""
        cash = self._charge(chance, order_id, 1)
        cash.kind = chance.choice(("cash", "create"))
        cash.path = "/v1/payments/charge" if cash.kind == "cash" else "/v1/payments"
        cash.body = {name: value for name, value in cash.body.items() if name != "payment_token"}
        cash.body["payment_method"] = "COD"
        await self._insist(session, chance, cash)
        if cash.payment_id is None:
            return
        paid = Request("update", order_id, None, f"/v1/payments/{cash.payment_id}/status", {"status": "COMPLETED"})
        await self._try(session, chance, self._history.add(paid))
        if any(told.status == 200 for told in paid.told) and chance.random() < 0.5:
            await self._give_back(session, chance, cash)

    async def _give_back(self, session: aiohttp.ClientSession, chance: random.Random, charge: Request) -> None:
        assert charge.payment_id is not None
        amount = charge.body["amount"]
        parts: list[str | None] = [None]
        if chance.random() < 0.6:
            part = f"{float(amount) / 4:.2f}"
            parts = [part, part, None] if chance.random() < 0.5 else [part, part]
        refunds = [
            self._refund(charge, number, part, keyed=chance.random() < 0.9)
            for number, part in enumerate(parts, start=1)
        ]
        if chance.random() < 0.4:
            await asyncio.gather(*(self._insist(session, chance, refund) for refund in refunds))
        else:
            for refund in refunds:
                await self._insist(session, chance, refund)

    def _charge(self, chance: random.Random, order_id: int, number: int) -> Request:
        card = chance.choice(BAD_CARDS) if chance.random() < 0.12 else GOOD_CARD
        body = {
            "order_id": order_id,
            "user_id": 1 + order_id % 50,
            "amount": f"{chance.randint(400, 50_000) / 100:.2f}",
            "currency": chance.choice(("INR", "USD")),
            "payment_method": chance.choice(("CREDIT_CARD", "DEBIT_CARD")),
            "payment_token": card,
        }
        key = f"order {order_id} charge {number}"
        return self._history.add(Request("charge", order_id, key, "/v1/payments/charge", body))

    def _refund(self, charge: Request, number: int, amount: str | None, *, keyed: bool) -> Request:
        body = {"reason": f"Return {number} of order {charge.order_id}", **({"amount": amount} if amount else {})}
        key = f"order {charge.order_id} refund {number}" if keyed else None
        path = f"/v1/payments/{charge.payment_id}/refund"
        return self._history.add(Request("refund", charge.order_id, key, path, body, payment_id=charge.payment_id))

    def _cancel(self, order_id: int, payment_id: int) -> Request:
        path = f"/v1/payments/{payment_id}"
        return self._history.add(Request("cancel", order_id, None, path, {}, payment_id=payment_id))

    async def _insist(self, session: aiohttp.ClientSession, chance: random.Random, request: Request) -> None:
        """Repeats the request until it has an answer for good; one without a key is sent once."""
        for _ in range(TRIES_MAX if request.key is not None else 1):
            told = await self._try(session, chance, request)
            if told.is_final or (told.status in REFUSED and "in-flight" not in told.body):
                return
            await asyncio.sleep(chance.uniform(0, RETRY_SECONDS_MAX))

    async def _try(self, session: aiohttp.ClientSession, chance: random.Random, request: Request) -> Told:
        replica = chance.randrange(len(self._addresses))
        headers = {} if request.key is None else {"Idempotency-Key": f'"{request.key}"'}
        method = {"cancel": "DELETE", "update": "PATCH"}.get(request.kind, "POST")
        url = self._addresses[replica] + request.path
        status, body = 0, ""
        try:
            async with session.request(method, url, json=request.body or None, headers=headers) as response:
                body = await response.text()
                status = response.status
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            body = type(error).__name__
        told = Told(time.monotonic() - self._history.started, status, body, replica)
        self._history.note(request, told)
        if request.kind in ("charge", "cash", "create") and status in (200, 201, 202, 402):
            request.payment_id = json.loads(body)["payment_id"]
        return told
