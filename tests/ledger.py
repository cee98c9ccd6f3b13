"""A gateway with books of its own, that loses requests and answers where a test tells it to."""

import asyncio

from eci_pay.gateways import (
    Approved,
    Declined,
    GatewayCharge,
    GatewayRefund,
    GatewayUnavailable,
    NotFound,
    Outcome,
    Unknown,
)
from tests.support import RecordingGateway

NOT_IN_TIME = Unknown(message="no answer")
Operation = GatewayCharge | GatewayRefund


class Ledger(RecordingGateway):
    """Keeps its own books by key, and acts at most once per key; loses requests and answers where it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.booked: dict[str, Approved | Declined] = {}
        self.looked: list[str] = []
        self.ruled_out: list[str] = []
        self.looks_at_once: dict[str, int] = {}
        self.looked_at_twice: list[str] = []
        self.verdict: Declined | None = None
        self.loses_requests = False
        self.loses_answers = False
        self.is_reachable = True
        self.lookup_answer: Unknown | None = None
        self.lookup_error: BaseException | None = None
        self.sent = asyncio.Event()
        self.may_act = asyncio.Event()
        self.may_act.set()
        self.may_answer_lookup = asyncio.Event()
        self.may_answer_lookup.set()
        self.lookup_waits = asyncio.Event()

    async def charge(self, charge: GatewayCharge) -> Outcome:
        self.charges.append(charge)
        return await self._take(charge)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        self.refunds.append(refund)
        return await self._take(refund)

    async def lookup(self, operation: Operation) -> Outcome | NotFound:
        key = operation.key
        self.looked.append(key)
        self.looks_at_once[key] = self.looks_at_once.get(key, 0) + 1
        if self.looks_at_once[key] > 1:
            self.looked_at_twice.append(key)
        try:
            if self.lookup_error is not None:
                raise self.lookup_error
            if not self.is_reachable:
                raise GatewayUnavailable("refused")
            # What it knew when it was asked: the answer may be on its way for long.
            answer = self.lookup_answer or self.booked.get(key) or NotFound()
            self.lookup_waits.set()
            await self.may_answer_lookup.wait()
            await asyncio.sleep(0)
            return answer
        finally:
            self.looks_at_once[key] -= 1

    async def rule_out(self, operation: Operation) -> Outcome | NotFound:
        self.ruled_out.append(operation.key)
        return self.lookup_answer or self.booked.get(operation.key) or NotFound()

    def act(self, key: str) -> Approved | Declined:
        """Moves the money, or refuses to."""
        return self.booked.setdefault(key, self.verdict or Approved(reference=f"REF {key[-8:]}"))

    def given_back(self) -> list[str]:
        """The keys under which late money was given back."""
        return [key for key in self.booked if key.endswith("-LATE")]

    async def _take(self, operation: Operation) -> Outcome:
        if not self.is_reachable:
            raise GatewayUnavailable("refused")
        self.sent.set()
        if self.loses_requests:
            return NOT_IN_TIME
        await self.may_act.wait()
        outcome = self.act(operation.key)
        return NOT_IN_TIME if self.loses_answers else outcome
