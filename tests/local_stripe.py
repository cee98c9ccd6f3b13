"""Runs localstripe (PyPI): a Stripe that nobody here wrote, in a process of its own, with an API to look into.

What it does not support is told at the top of `test_stripe.py`. It keeps its store in one file for the whole machine,
/tmp/localstripe.pickle, which is why the tests that use it belong to one xdist group.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from eci_pay.gateways.stripe import StripeGateway

SECRET_KEY = "sk_test_0urVeryOwnSecret"
"""localstripe takes every key that begins with `sk_`, and refuses all others."""
VISA = "pm_card_visa"
DECLINED_CARD = "pm_card_chargeCustomerFail"
CARD_THAT_ASKS_ITS_HOLDER = "4000002500003155"
PAGE_SIZE = 100
STARTS_MAX = 3
START_SECONDS = 15.0
END_SECONDS = 10.0


@dataclass(frozen=True)
class LocalStripe:
    """A running localstripe, as somebody with the secret key of the account sees it."""

    port: int

    @property
    def url(self) -> str:
        """What a gateway is given as the base of Stripe's API."""
        return f"http://127.0.0.1:{self.port}"

    def gateway(
        self,
        *,
        port: int | None = None,
        secret_key: str = SECRET_KEY,
        webhook_secret: str | None = None,
        timeout_seconds: float = 10.0,
    ) -> StripeGateway:
        """The product's own gateway on this account, through another port where one is given."""
        return StripeGateway(
            secret_key=secret_key,
            webhook_secret=webhook_secret,
            api_base=f"http://127.0.0.1:{port or self.port}",
            timeout_seconds=timeout_seconds,
        )

    async def intents(self) -> list[dict[str, Any]]:
        """Every PaymentIntent of the account, the oldest first, those that only rule out a charge among them."""
        return await self._list("/v1/payment_intents")

    async def refunds(self) -> list[dict[str, Any]]:
        """Every Refund of the account, in no order that tells anything: it is by the second."""
        return await self._list("/v1/refunds")

    async def card(self, number: str) -> str:
        """The id of a new PaymentMethod with this card number, as a shop's page would make one."""
        card = {"number": number, "exp_month": 12, "exp_year": 2030, "cvc": "123"}
        made = await self._ask("POST", "/v1/payment_methods", {"type": "card", "card": card})
        return str(made["id"])

    async def send_webhooks(self, url: str, secret: str, events: list[str]) -> None:
        """Has these events sent to `url` from now on, signed with `secret`; no events: none are sent."""
        await self._ask("POST", "/_config/webhooks/ours", {"url": url, "secret": secret, "events": events})

    async def forget_everything(self) -> None:
        """Empties the account."""
        await self._ask("DELETE", "/_config/data")

    async def _list(self, path: str) -> list[dict[str, Any]]:
        found = await self._ask("GET", f"{path}?limit={PAGE_SIZE}")
        assert not found["has_more"]
        rows: list[dict[str, Any]] = found["data"]
        return rows

    async def _ask(self, method: str, path: str, body: dict[str, object] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {SECRET_KEY}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers, timeout=10) as client:
            answer = await client.request(method, path, json=body)
        assert answer.is_success, answer.text
        return answer.json() if answer.content else None


@contextmanager
def running_local_stripe() -> Iterator[LocalStripe]:
    """Runs localstripe on a free port, ended in the end. Another process may take that port first: then once more."""
    with tempfile.TemporaryFile() as log:
        for _ in range(STARTS_MAX):
            port = _free_port()
            command = [sys.executable, "-m", "localstripe", "--port", str(port), "--from-scratch"]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            try:
                if _listens(port, process):
                    yield LocalStripe(port)
                    return
            finally:
                _end(process)
        log.seek(0)
        raise RuntimeError(f"localstripe does not start: {log.read().decode()}")


def _listens(port: int, process: subprocess.Popen[bytes]) -> bool:
    """Waits until the process takes connections; False where it ended instead. There is no event for it."""
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return True
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port
