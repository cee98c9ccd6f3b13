"""Commands about payments: charge, refund, show, list, cancel."""

import shlex
import sys
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli import output
from cli.bulk import BatchOption, BatchOptions, ConcurrencyOption, DryRunOption, ResultsOption, run_batch
from cli.output import JsonOption
from cli.payment_output import print_payment, print_story
from cli.prompts import confirm
from cli.runtime import run_use_case
from eci_pay import errors

if TYPE_CHECKING:
    from eci_pay.answers import Answer
    from eci_pay.service import PaymentService
    from eci_pay.views import PaymentMessages, PaymentView

EXIT_DECLINED = 1
EXIT_UNKNOWN = 6
CHARGE_FILE_MAX_BYTES = 1_000_000
ID_DIGITS_MAX = 19

KeyOption = Annotated[
    str | None,
    typer.Option("--idempotency-key", metavar="KEY", help="Makes it safe to run the same command again."),
]


def register(app: typer.Typer) -> None:
    """Adds the commands of this group."""
    app.command(
        epilog="Example: eci-pay charge sample_requests/charge_payment.json, or eci-pay charge --batch charges.jsonl"
    )(charge)
    app.command(
        epilog="Example: eci-pay refund 42 --reason 'Damaged in transit', or eci-pay refund --batch refunds.csv"
    )(refund)
    app.command(epilog="Example: eci-pay show --order 1001")(show)
    app.command("list", epilog="Example: eci-pay list --status COMPLETED --from 2026-11-01")(list_payments)
    app.command(epilog="Example: eci-pay cancel 42")(cancel)


def charge(
    file: Annotated[
        str | None, typer.Argument(metavar="FILE|-", help="A charge as JSON; - reads standard input.")
    ] = None,
    order_id: Annotated[str | None, typer.Option("--order-id", metavar="N")] = None,
    user_id: Annotated[str | None, typer.Option("--user-id", metavar="N")] = None,
    amount: Annotated[str | None, typer.Option("--amount", metavar="DECIMAL")] = None,
    method: Annotated[str | None, typer.Option("--method", help="CREDIT_CARD, UPI, COD, ...")] = None,
    currency: Annotated[str | None, typer.Option("--currency", help="ISO 4217; INR if left out.")] = None,
    reference: Annotated[str | None, typer.Option("--reference")] = None,
    idempotency_key: KeyOption = None,
    batch: BatchOption = None,
    results: ResultsOption = None,
    concurrency: ConcurrencyOption = None,
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Of --batch: do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Charge an order, once."""
    from eci_pay.bulk_files import BulkKind
    from eci_pay.requests import ChargeRequest, parse_json, parse_request

    options = {
        "order_id": _number(order_id),
        "user_id": _number(user_id),
        "amount": amount,
        "payment_method": method,
        "currency": currency,
        "reference": reference,
    }
    fields = {name: value for name, value in options.items() if value is not None}
    of_batch = BatchOptions(file=batch, results=results, concurrency=concurrency, dry_run=dry_run)
    of_batch.check(
        single=bool(file is not None or fields or idempotency_key is not None),
        single_named="FILE, --idempotency-key and the options of a charge",
    )
    if batch is not None:
        run_batch(BulkKind.CHARGE, of_batch, yes=yes)
        return
    if (file is not None) == bool(fields):
        raise errors.InvalidRequest("give a FILE, or --order-id, --user-id, --amount and --method")
    request: ChargeRequest = parse_request(ChargeRequest, fields if file is None else parse_json(_read(file)))
    with _safe_to_repeat(idempotency_key) as key:
        answer = run_use_case(
            lambda service: service.charges.charge(request=request, idempotency_key=key), changes=True
        )
        _finish(answer)


def refund(
    payment_id: Annotated[str | None, typer.Argument(metavar="PAYMENT_ID")] = None,
    reason: Annotated[str | None, typer.Option("--reason", help="5 to 400 characters.")] = None,
    amount: Annotated[
        str | None, typer.Option("--amount", metavar="DECIMAL", help="All that is left, if left out.")
    ] = None,
    idempotency_key: KeyOption = None,
    batch: BatchOption = None,
    results: ResultsOption = None,
    concurrency: ConcurrencyOption = None,
    dry_run: DryRunOption = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Refund a payment, whole or in part."""
    from eci_pay.bulk_files import BulkKind
    from eci_pay.requests import RefundRequest, parse_payment_id, parse_request

    of_batch = BatchOptions(file=batch, results=results, concurrency=concurrency, dry_run=dry_run)
    of_batch.check(
        single=any(given is not None for given in (payment_id, reason, amount, idempotency_key)),
        single_named="PAYMENT_ID, --amount, --reason and --idempotency-key",
    )
    if batch is not None:
        run_batch(BulkKind.REFUND, of_batch, yes=yes)
        return
    if payment_id is None or reason is None:
        raise errors.InvalidRequest("give a PAYMENT_ID and --reason, or --batch")
    number = parse_payment_id(payment_id)
    fields = {"reason": reason} if amount is None else {"reason": reason, "amount": amount}
    request = parse_request(RefundRequest, fields)
    if not yes:
        confirm(f"Refund {request.amount or 'all that is left'} of payment {payment_id}?", to="refund")
    with _safe_to_repeat(idempotency_key) as key:
        answer = run_use_case(
            lambda service: service.refunds.refund(payment_id=number, request=request, idempotency_key=key),
            changes=True,
        )
        _finish(answer)


def show(
    payment_id: Annotated[str | None, typer.Argument(metavar="PAYMENT_ID")] = None,
    order: Annotated[str | None, typer.Option("--order", metavar="N", help="The payment of an order.")] = None,
    transaction: Annotated[str | None, typer.Option("--transaction", metavar="TXN...")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show a payment with its refunds and its history."""
    from eci_pay.requests import parse_order_id, parse_payment_id

    match payment_id, order, transaction:
        case str(), None, None:
            number = parse_payment_id(payment_id)
            story = run_use_case(lambda service: _told(service, service.payments.by_id(number)))
        case None, str(), None:
            order_number = parse_order_id(order)
            story = run_use_case(lambda service: _told(service, service.payments.by_order(order_number)))
        case None, None, str(given):
            story = run_use_case(lambda service: _told(service, service.payments.by_transaction(given)))
        case _:
            raise errors.InvalidRequest("give one of PAYMENT_ID, --order and --transaction")
    print_story(*story)


async def _told(
    service: "PaymentService", read: "Awaitable[PaymentView]"
) -> "tuple[PaymentView, PaymentMessages, dict[int, str]]":
    """A payment, what others are told of it, and who made its changes."""
    view = await read
    return view, await service.outbox.of_payment(view.payment_id), await service.payments.actors(view.payment_id)


def list_payments(
    status: Annotated[str | None, typer.Option("--status")] = None,
    method: Annotated[str | None, typer.Option("--method")] = None,
    user: Annotated[str | None, typer.Option("--user", metavar="N")] = None,
    created_from: Annotated[
        str | None,
        typer.Option("--from", metavar="DATE", help="Created then or later (UTC date or instant)."),
    ] = None,
    created_to: Annotated[str | None, typer.Option("--to", metavar="DATE", help="Created before that.")] = None,
    page: Annotated[str | None, typer.Option("--page", metavar="N")] = None,
    page_size: Annotated[str | None, typer.Option("--page-size", metavar="N", help="1 to 100; 10 if left out.")] = None,
    cursor: Annotated[str | None, typer.Option("--cursor", help="Where the page before ended.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List payments, newest first."""
    from eci_pay.requests import ListRequest, parse_request

    filters = {
        "status": status,
        "payment_method": method,
        "user_id": user,
        "created_from": created_from,
        "created_to": created_to,
        "page": page,
        "page_size": page_size,
        "cursor": cursor,
    }
    request = parse_request(ListRequest, {name: value for name, value in filters.items() if value is not None})
    output.print_page(run_use_case(lambda service: service.payments.page(request)))


def cancel(payment_id: Annotated[str, typer.Argument(metavar="PAYMENT_ID")], as_json: JsonOption = False) -> None:
    """Cancel a PENDING or FAILED payment, for good."""
    from eci_pay.requests import parse_payment_id

    number = parse_payment_id(payment_id)
    print_payment(run_use_case(lambda service: service.status_changes.cancel(payment_id=number), changes=True))


def _number(text: str | None) -> object:
    """An option that a JSON number stands for; what is no number is left to the validation to name."""
    return int(text) if text is not None and text.isascii() and text.isdigit() and len(text) <= ID_DIGITS_MAX else text


def _read(file: str) -> bytes:
    try:
        if file == "-":
            content = sys.stdin.buffer.read(CHARGE_FILE_MAX_BYTES + 1)
        else:
            with open(file, "rb") as opened:
                content = opened.read(CHARGE_FILE_MAX_BYTES + 1)
    except OSError as error:
        raise errors.InvalidRequest(f"{file}: {error.strerror}") from None
    if len(content) > CHARGE_FILE_MAX_BYTES:
        raise errors.InvalidRequest(f"{file}: has more than {CHARGE_FILE_MAX_BYTES} bytes")
    return content


@contextmanager
def _safe_to_repeat(given: str | None) -> Iterator[str]:
    """The key of the command. One that is made up is told before anything is done, and on failure the command with
    which it is safe to try again."""
    from eci_pay.idempotency import parse_key
    from eci_pay.identifiers import idempotency_key

    key = idempotency_key() if given is None else parse_key(given)
    command = ["eci-pay", *sys.argv[1:]]
    if given is None:
        output.note(f"Idempotency-Key: {key}")
        command += ["--idempotency-key", key]
    try:
        yield key
    except BaseException as error:
        if not (isinstance(error, typer.Exit) and error.exit_code == EXIT_DECLINED):
            _add_hint(error, f"safe to run again: {shlex.join(command)}")
        raise


def _add_hint(error: BaseException, hint: str) -> None:
    """Errors are printed later, and their hint below them; what ends the command otherwise has said its word."""
    if isinstance(error, errors.PayError):
        error.add_note(hint)
    else:
        output.note(hint)


def _finish(answer: "Answer") -> None:
    """Prints what the caller is told, and ends with the exit code of the outcome."""
    if answer.is_declined:
        _print_decline(answer)
        raise typer.Exit(EXIT_DECLINED)
    _print_answer(answer)
    if answer.is_unknown:
        output.note("the outcome is not known yet: the gateway may or may not have acted")
        raise typer.Exit(EXIT_UNKNOWN)


def _print_answer(answer: "Answer") -> None:
    from eci_pay.views import PaymentView

    if answer.replayed:
        output.note("this key was used before: this is the first answer again")
    print_payment(PaymentView.model_validate_json(answer.body))


def _print_decline(answer: "Answer") -> None:
    import json

    problem = json.loads(answer.body)
    if output.Mode.json:
        output.print_json(problem)
    output.note(f"{problem['title']}: {problem['detail']} [{problem['decline_code']}]")
