"""The command that tells the story of a payment, and proves each sentence of it."""

import logging
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import typer

from cli import output
from cli.runtime import run, settings_of_command

if TYPE_CHECKING:
    from rich.console import Console

    from eci_pay.answers import Answer
    from eci_pay.service import PaymentService
    from eci_pay.settings import Settings
    from eci_pay.views import PaymentView
    from server.stand_ins import StandIns

EXIT_DISPROVED = 1
PARTIAL_REFUND = 499
SUCCESS = "PAYMENT_SUCCESS"
OK = 200
RELAY_SECONDS_MAX = 30.0
TWO_ATTEMPTS = ["PROCESSING", "FAILED", "PROCESSING", "COMPLETED"]
IMPATIENT = {"eci_pay_relay_retry_seconds": 0.1}
"""What fails in the story is repeated soon."""


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command(epilog="Example: eci-pay demo")(demo)


def demo() -> None:
    """Place orders, charge, retry, decline, refund, reconcile: on a database of its own, dropped at the end."""
    from eci_pay.database import create_database, drop_database
    from eci_pay.gateways.simulated import SimulatedGateway
    from eci_pay.messages import Destination
    from eci_pay.migrations import bundled_migrations, migrate
    from eci_pay.service import database_url, payment_service
    from server.stand_ins import StandIns, running

    settings = settings_of_command()
    logging.getLogger("eci_pay.failure_digest").setLevel(logging.CRITICAL)  # what fails in the story is meant to

    async def tell() -> bool:
        server = await database_url(settings)
        name = f"eci_pay_demo_{secrets.token_hex(4)}"
        url = await create_database(server, name)
        try:
            await migrate(url, bundled_migrations())
            stand_ins = StandIns()
            gateway = SimulatedGateway(latency_seconds=0, slow_seconds=0)
            async with running(stand_ins, dict.fromkeys(Destination, 0)) as urls:
                told = {f"{peer}_service_url": urls[peer] for peer in urls}
                ours = settings.model_copy(update=told | IMPATIENT | {"eci_pay_gateway": "simulated"})
                async with payment_service(ours, url, gateway=gateway) as service:
                    story = Story(service, stand_ins, ours)
                    await story.tell()
                    return story.summarize()
        finally:
            await drop_database(server, name)

    if not run(tell()):
        raise typer.Exit(EXIT_DISPROVED)


class Story:
    """The steps, in order. Each prints what is done and what came of it, and records what that proves."""

    def __init__(self, service: "PaymentService", stand_ins: "StandIns", settings: "Settings") -> None:
        self._service = service
        self._stand_ins = stand_ins
        self._settings = settings
        self._out: Console = output.console()
        self._proofs: list[tuple[str, bool]] = []
        self._day = datetime.now(UTC).date()

    async def tell(self) -> None:
        """The whole story."""
        self._out.print("[bold]eci-pay demo[/]: three orders, told step by step, and what other services are told")
        first = await self._paid_order()
        await self._declined_order()
        await self._refunds(first)
        await self._too_much(first)
        await self._outage()
        await self._settlement()

    def summarize(self) -> bool:
        """Prints what was proved; tells whether all of it was."""
        self._out.print()
        rows = [("[green]proved[/]" if held else "[red]NOT SO[/]", claim) for claim, held in self._proofs]
        self._out.print(output.table(("", "Claim"), rows))
        held = sum(held for _, held in self._proofs)
        self._out.print(f"{held} of {len(self._proofs)} claims proved")
        return held == len(self._proofs)

    async def _paid_order(self) -> "PaymentView":
        self._step("Order 1001 is placed: 1,499.00 INR by credit card. We charge it.")
        answer = await self._charge(order_id=1001, amount="1499.00", method="CREDIT_CARD", key="order-1001")
        view = self._payment(answer)
        told = await self._relay()
        self._prove("a charge is captured and has its audit trail", self._history(view) == ["PROCESSING", "COMPLETED"])
        self._prove("order and customer are told of it", told == {"order": ["COMPLETED"], "notification": [SUCCESS]})

        self._step("The answer got lost on the way. We send the same charge again, with the same key.")
        again = await self._charge(order_id=1001, amount="1499.00", method="CREDIT_CARD", key="order-1001")
        self._payment(again)
        await self._relay()
        self._prove("the same key gives the same answer, byte for byte", again.replayed and again.body == answer.body)

        self._step("A bug in the shop charges order 1001 once more, with a new key.")
        await self._refused(
            "order-already-paid", "an order is charged at most once", order_id=1001, key="order-1001-bug"
        )
        return view

    async def _declined_order(self) -> None:
        self._step("Order 1002 is placed: 4,000.02 INR. The card is declined.")
        answer = await self._charge(order_id=1002, amount="4000.02", method="CREDIT_CARD", key="order-1002")
        self._out.print(f"   declined with status {answer.status_code}")
        failed = await self._service.payments.by_order(1002)
        told = await self._relay()
        self._prove("a declined charge takes no money", answer.is_declined and failed.captured_at is None)
        self._prove("what was reserved for it is released", told.get("inventory") == ["Payment failed"])

        self._step("The customer tries another card, under a new key.")
        answer = await self._charge(order_id=1002, amount="4000.02", method="DEBIT_CARD", key="order-1002-again")
        view = self._payment(answer)
        await self._relay()
        same = view.payment_id == failed.payment_id and view.attempt == failed.attempt + 1
        self._prove(
            "another attempt keeps the order's one payment and its history",
            same and self._history(view) == TWO_ATTEMPTS,
        )

    async def _refunds(self, paid: "PaymentView") -> None:
        self._step("One item of order 1001 comes back: 499.00 INR are refunded.")
        view = self._payment(await self._refund(paid.payment_id, "One item returned", amount=f"{PARTIAL_REFUND}.00"))
        await self._relay()
        partly = view.status.value == "COMPLETED" and view.refunded_amount == PARTIAL_REFUND
        self._prove("a partial refund leaves the payment completed", partly)

        self._step("Then the rest comes back: all that is left is refunded.")
        view = self._payment(await self._refund(paid.payment_id, "Order returned"))
        await self._relay()
        whole = view.status.value == "REFUNDED" and view.refunded_amount == view.amount
        self._prove("a full refund ends in REFUNDED", whole)

    async def _too_much(self, paid: "PaymentView") -> None:
        from eci_pay.errors import InvalidState

        self._step("Somebody asks for one more refund of order 1001.")
        try:
            await self._refund(paid.payment_id, "Asking for more", amount="0.01")
        except InvalidState as error:
            self._out.print(f"   refused: {error.detail}")
        view = await self._service.payments.by_id(paid.payment_id)
        self._prove("no more is ever refunded than was captured", view.refunded_amount == view.amount)

    async def _outage(self) -> None:
        from eci_pay.messages import Destination

        self._step("The Order service is out of order. Order 1003 is charged and, soon after, refunded.")
        self._stand_ins.failing.add(Destination.ORDER)
        view = self._payment(await self._charge(order_id=1003, amount="250.00", method="UPI", key="order-1003"))
        self._payment(await self._refund(view.payment_id, "Ordered by mistake"))
        told = await self._relay()
        customer = told.get("notification") == [SUCCESS, "PAYMENT_REFUNDED"]
        self._prove("who is out of order holds nobody else up", customer and told.get("order") is None)

        self._step("It is back.")
        self._stand_ins.failing.clear()
        told = await self._relay(until_delivered=True)
        in_order = told.get("order") == ["COMPLETED", "REFUNDED"]
        self._prove("nothing was lost, and it comes in the order in which it happened", in_order)

    async def _settlement(self) -> None:
        import io

        from eci_pay.reconciliation import Job, Watch
        from eci_pay.table_files import FileFormat, TableFile

        self._step("The day is over. The gateway sends its settlement, and we compare it with our books.")
        file = io.StringIO()
        await self._service.settlements.export(self._day, FileFormat.CSV, file.write)
        table = TableFile(io.BytesIO(file.getvalue().encode()), "the settlement")
        report, _ = await self._service.reconciliation.run(Job(operator="demo", file=table), Watch())
        for each in report.sums:
            self._out.print(
                f"   {each.line_class.label}: {output.counted(each.count, 'line')}, gateway {each.gateway_net:,.2f} "
                f"{each.currency}, our books {each.our_net:,.2f}"
            )
        self._prove("our books and the gateway's are the same, line by line", report.lines > 0 and report.is_clean)

    async def _relay(self, *, until_delivered: bool = False) -> dict[str, list[str]]:
        """Delivers what is due; prints and returns what each service took, in short."""
        import asyncio

        from eci_pay.relay import connected_relay

        self._stand_ins.received.clear()
        async with asyncio.timeout(RELAY_SECONDS_MAX):
            while True:
                async with connected_relay(self._settings, self._service.outbox) as relay:
                    await relay.drain()
                if not until_delivered or not any(each.pending for each in await self._service.outbox.stats()):
                    break
                await asyncio.sleep(self._settings.eci_pay_relay_poll_seconds)
        told: dict[str, list[str]] = {}
        for received in self._stand_ins.received:
            body = received.body
            says = body.get("payment_status") or body.get("type") or body["reason"]
            if received.status == OK:
                told.setdefault(received.destination, []).append(says)
            came_to = "is told" if received.status == OK else f"answers {received.status} to"
            details = f": {body['message']}" if "message" in body else ""
            self._out.print(
                f"   [dim]→ {received.destination} {came_to} {says}{output.shown(details)}[/]", soft_wrap=True
            )
        return told

    async def _charge(self, *, order_id: int, amount: str, method: str, key: str) -> "Answer":
        from eci_pay.requests import ChargeRequest, parse_request

        fields = {"order_id": order_id, "user_id": 7, "amount": amount, "payment_method": method}
        request = parse_request(ChargeRequest, fields)
        return await self._service.charges.charge(request=request, idempotency_key=key)

    async def _refund(self, payment_id: int, reason: str, *, amount: str | None = None) -> "Answer":
        from eci_pay.requests import RefundRequest, parse_request

        request = parse_request(RefundRequest, {"reason": reason, "amount": amount})
        return await self._service.refunds.refund(payment_id=payment_id, request=request)

    async def _refused(self, code: str, claim: str, *, order_id: int, key: str) -> None:
        from eci_pay.errors import Conflict

        refusal = None
        try:
            await self._charge(order_id=order_id, amount="1499.00", method="UPI", key=key)
        except Conflict as error:
            refusal = error
            self._out.print(f"   refused: {error.detail}")
        self._prove(claim, refusal is not None and refusal.code == code)

    def _payment(self, answer: "Answer") -> "PaymentView":
        from eci_pay.views import PaymentView

        view = PaymentView.model_validate_json(answer.body)
        refunded = f", {view.refunded_amount:,.2f} refunded" if view.refunded_amount else ""
        replayed = ", replayed" if answer.replayed else ""
        self._out.print(
            f"   payment {view.payment_id}: {output.styled(view.status)}, "
            f"{view.amount:,.2f} {view.currency}{refunded} (status {answer.status_code}{replayed})"
        )
        return view

    def _history(self, view: "PaymentView") -> list[str]:
        return [transaction.status for transaction in view.transactions]

    def _step(self, sentence: str) -> None:
        self._out.print(f"\n[bold]•[/] {sentence}")

    def _prove(self, claim: str, held: bool) -> None:
        self._proofs.append((claim, held))
