"""Stripe: charges are PaymentIntents that are confirmed as they are created, refunds are Refunds.

Our key goes along twice: as Stripe's idempotency key, so that nothing is done twice, and in the metadata, so that it is
found again. Written against https://docs.stripe.com/api (idempotent requests, errors, search, webhooks).
"""

import logging
from contextlib import suppress
from decimal import Decimal
from typing import Any

import aiohttp
import stripe

from eci_pay.errors import EventRefused
from eci_pay.gateways import (
    Approved,
    Declined,
    GatewayCharge,
    GatewayEvent,
    GatewayRefund,
    GatewayUnavailable,
    NotFound,
    Outcome,
    Unknown,
)
from eci_pay.money import currency_exponents

API_VERSION = "2024-06-20"
"""The version of Stripe's API that requests are written in. Stripe keeps old ones, and its library would move on."""
KEY = "eci_pay_key"
"""The metadata that holds our key."""
RULED_OUT = "eci_pay_ruled_out"
"""The metadata of a PaymentIntent that only keeps its idempotency key from being used by a charge."""
METHODS = ("CREDIT_CARD", "DEBIT_CARD")
PAGE_SIZE = 100
PAGES_MAX = 100
"""How much of the list is read where Stripe's search cannot be used."""
CLOCKS_APART_SECONDS = 600
"""How far Stripe's instant of a charge may be from that of its begin: by clocks, and by the way there."""
SIGNATURE_AGE_SECONDS_MAX = 300
"""How old an event's signature may be: Stripe signs anew whenever it repeats an event."""

# Where Stripe's minor unit is not that of ISO 4217 (https://docs.stripe.com/currencies#special-cases).
_EXPONENTS = {"ISK": 2, "UGX": 2, "MGA": 0}
_NOT_SENT = (aiohttp.ClientConnectorError,)

# At DEBUG it would write the bodies of requests, payment tokens among them.
logging.getLogger("stripe").setLevel(logging.WARNING)


class StripeGateway:
    """One Stripe account. Nothing is retried here: a repetition is for recovery, which looks first."""

    def __init__(self, *, secret_key: str, webhook_secret: str | None, api_base: str, timeout_seconds: float) -> None:
        self._webhook_secret = webhook_secret
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._secret_key = secret_key
        self._api_base = api_base
        self._session: aiohttp.ClientSession | None = None
        self._client: stripe.StripeClient | None = None

    def fault(self, charge: GatewayCharge) -> tuple[str, str] | None:
        """Cards alone, by the id of a PaymentMethod that the shop's page has made with Stripe."""
        if charge.payment_method not in METHODS:
            return "payment_method", f"must be one of {', '.join(METHODS)}, or COD: the gateway takes cards"
        if charge.payment_token is None:
            return "payment_token", "is required: the id of a PaymentMethod of Stripe's"
        if minor_units(charge.amount, charge.currency) is None:
            return "amount", f"has more decimals than Stripe takes of {charge.currency}"
        return None

    async def charge(self, charge: GatewayCharge) -> Outcome:
        """Creates and confirms a PaymentIntent."""
        amount = minor_units(charge.amount, charge.currency)
        assert amount is not None, "else `fault` has said so"
        assert charge.payment_token is not None
        try:
            intent = await self._stripe().payment_intents.create_async(
                {
                    "amount": amount,
                    "currency": charge.currency.lower(),
                    "confirm": True,
                    "payment_method": charge.payment_token,
                    "payment_method_types": ["card"],  # type: ignore[typeddict-unknown-key]  # of API_VERSION
                    "metadata": {KEY: charge.key},
                },
                {"idempotency_key": charge.key},
            )
        except stripe.CardError as error:
            return _declined(error)
        except stripe.StripeError as error:
            return _failed(error)
        return await self._outcome_of(intent)

    async def refund(self, refund: GatewayRefund) -> Outcome:
        """Creates a Refund."""
        amount = minor_units(refund.amount, refund.currency)
        if amount is None:
            return Declined(
                code="invalid_amount", message=f"It has more decimals than Stripe gives back of {refund.currency}."
            )
        try:
            made = await self._stripe().refunds.create_async(
                {
                    "payment_intent": refund.charge_reference,
                    "amount": amount,
                    "metadata": {KEY: refund.key},
                },
                {"idempotency_key": refund.key},
            )
            return _of_refund(made)
        except stripe.StripeError as error:
            return _failed(error)

    async def lookup(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Finds what has our key in its metadata."""
        try:
            if isinstance(operation, GatewayRefund):
                return await self._find_refund(operation)
            intent = await self._find_intent(operation)
        except stripe.StripeError as error:
            return _not_found_out(error)
        return intent if isinstance(intent, NotFound) else await self._outcome_of(intent)

    async def rule_out(self, operation: GatewayCharge | GatewayRefund) -> Outcome | NotFound:
        """Uses up the idempotency key of a charge by a PaymentIntent that is never confirmed: a charge with that key
        that arrives later is refused for its different parameters; one that has arrived shows in that ours is.

        A refund has no harmless form: it is only looked up.
        """
        if isinstance(operation, GatewayRefund):
            return await self.lookup(operation)
        try:
            intent = await self._stripe().payment_intents.create_async(
                {
                    "amount": minor_units(operation.amount, operation.currency) or 1,
                    "currency": operation.currency.lower(),
                    "payment_method_types": ["card"],  # type: ignore[typeddict-unknown-key]  # of API_VERSION
                    "metadata": {KEY: operation.key, RULED_OUT: "yes"},
                },
                {"idempotency_key": operation.key},
            )
        except stripe.IdempotencyError:
            return await self._received(operation)
        except stripe.InvalidRequestError:
            return NotFound()  # such a charge is refused whenever it comes
        except stripe.StripeError as error:
            return _not_found_out(error)
        with suppress(stripe.StripeError):
            await self._cancel(intent)  # for tidiness: what is never confirmed takes no money
        return NotFound()

    def read_event(self, body: bytes, signature: str | None) -> GatewayEvent | None:
        """A signed event, if it tells what became of something of ours."""
        if self._webhook_secret is None:
            raise EventRefused("no webhook secret is set")
        try:
            event = stripe.Webhook.construct_event(body, signature, self._webhook_secret, SIGNATURE_AGE_SECONDS_MAX)
            told = event.data.object
            if not isinstance(told, stripe.StripeObject):
                raise TypeError(type(told))  # noqa: TRY301
            metadata = _metadata(told)
        except stripe.SignatureVerificationError as error:
            raise EventRefused(str(error.user_message or error)) from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise EventRefused("the body is no event of Stripe's") from None
        if KEY not in metadata or RULED_OUT in metadata:
            return None
        outcome = _of_object(told)
        return GatewayEvent(key=metadata[KEY], outcome=outcome) if isinstance(outcome, Approved | Declined) else None

    async def close(self) -> None:
        """Closes the connections."""
        if self._session is not None:
            await self._session.close()

    async def _outcome_of(self, intent: stripe.PaymentIntent) -> Outcome:
        """A card that wants its holder to confirm is declined: nobody can ask the holder here."""
        if intent.status != "requires_action":
            return _of_intent(intent)
        try:
            await self._cancel(intent)
        except stripe.StripeError as error:
            return Unknown(
                message=f"Stripe waits for the card's holder, and could not be told to stop: {_words(error)}"
            )
        return Declined(code="authentication_required", message="The card wants its holder to confirm the payment.")

    async def _received(self, charge: GatewayCharge) -> Outcome:
        """What became of a charge that Stripe has received, as the list says, which lags behind nothing. One that is
        not there may still be worked on."""
        try:
            intent = await self._find_intent_in_list(charge)
        except stripe.StripeError as error:
            return _not_found_out(error)
        if isinstance(intent, NotFound):
            return Unknown(message="Stripe has received the charge and does not show it yet.", answered=True)
        return await self._outcome_of(intent)

    async def _find_intent(self, charge: GatewayCharge) -> stripe.PaymentIntent | NotFound:
        try:
            found = await self._stripe().payment_intents.search_async(
                {"query": f"metadata['{KEY}']:'{charge.key}'", "limit": PAGE_SIZE}
            )
        except stripe.InvalidRequestError:
            # There is no search in some countries, India among them.
            return await self._find_intent_in_list(charge)
        return _charge_among(found.data, charge.key) or NotFound()

    async def _find_intent_in_list(self, charge: GatewayCharge) -> stripe.PaymentIntent | NotFound:
        """Reads the PaymentIntents that were made when the charge was, the newest first; `PAGES_MAX` bounds how many.

        Where it is not among them, ruling it out tells for sure.
        """
        params: stripe.params.PaymentIntentListParams = {"limit": PAGE_SIZE}
        if charge.begun_at is not None:
            begun = int(charge.begun_at.timestamp())
            params["created"] = {"gte": begun - CLOCKS_APART_SECONDS, "lte": begun + CLOCKS_APART_SECONDS}
        for _ in range(PAGES_MAX):
            try:
                page = await self._stripe().payment_intents.list_async(params)
            except stripe.InvalidRequestError:
                if "created" not in params:
                    raise
                del params["created"]  # not every stand-in of Stripe knows it
                continue
            if intent := _charge_among(page.data, charge.key):
                return intent
            if not page.has_more:
                break
            params["starting_after"] = page.data[-1].id
        return NotFound()

    async def _find_refund(self, refund: GatewayRefund) -> Outcome | NotFound:
        params: stripe.params.RefundListParams = {"payment_intent": refund.charge_reference, "limit": PAGE_SIZE}
        while True:
            page = await self._stripe().refunds.list_async(params)
            for found in page.data:
                if _metadata(found).get(KEY) == refund.key:
                    return _of_refund(found)
            if not page.has_more:
                return NotFound()
            params["starting_after"] = page.data[-1].id

    async def _cancel(self, intent: stripe.PaymentIntent) -> None:
        if intent.status != "canceled":
            await self._stripe().payment_intents.cancel_async(intent.id)

    def _stripe(self) -> stripe.V1Services:
        """The client, made at its first use because its session belongs to the running loop."""
        if self._client is None:
            # How many requests are under way is limited before they begin: one that waited here might be sent too late.
            self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
            self._client = stripe.StripeClient(
                self._secret_key,
                base_addresses={"api": self._api_base},
                stripe_version=API_VERSION,
                max_network_retries=0,
                http_client=stripe.AIOHTTPClient(timeout=self._timeout, session=self._session),
            )
        return self._client.v1


def minor_units(amount: Decimal, currency: str) -> int | None:
    """The amount as Stripe counts it, in units of the last decimal; None where it has more decimals than that."""
    units = amount.scaleb(_EXPONENTS.get(currency, currency_exponents()[currency]))
    return int(units) if units == units.to_integral_value() else None


def _charge_among(intents: list[stripe.PaymentIntent], key: str) -> stripe.PaymentIntent | None:
    for intent in intents:
        metadata = _metadata(intent)
        if metadata.get(KEY) == key and RULED_OUT not in metadata:
            return intent
    return None


def _metadata(told: Any) -> dict[str, str]:
    metadata = getattr(told, "metadata", None)
    return metadata.to_dict() if metadata else {}


def _of_object(told: object) -> Outcome | None:
    match told:
        case stripe.PaymentIntent():
            return _of_intent(told)
        case stripe.Refund():
            return _of_refund(told)
        case _:
            return None


def _of_intent(intent: stripe.PaymentIntent) -> Outcome:
    match intent.status:
        case "succeeded":
            return Approved(reference=intent.id, message="Approved by Stripe")
        case "canceled":
            return Declined(code="canceled", message="The payment was cancelled at Stripe.")
        case "requires_payment_method" if error := intent.last_payment_error:
            return Declined(
                code=getattr(error, "decline_code", None) or getattr(error, "code", None) or "declined",
                message=getattr(error, "message", None) or "The card was declined.",
            )
        case status:
            return Unknown(message=f"The payment is {status} at Stripe.", answered=True)


def _of_refund(refund: stripe.Refund) -> Outcome:
    match refund.status:
        case "succeeded":
            return Approved(reference=refund.id, message="Refunded by Stripe")
        case "failed" | "canceled" as status:
            return Declined(
                code=getattr(refund, "failure_reason", None) or status, message=f"The refund {status} at Stripe."
            )
        case status:
            return Unknown(message=f"The refund is {status} at Stripe.", answered=True)


def _declined(error: stripe.CardError) -> Declined:
    code = getattr(error.error, "decline_code", None) or error.code or "declined"
    return Declined(code=code, message=_words(error))


def _failed(error: stripe.StripeError) -> Outcome:
    """What an error means for the money. Only where Stripe says that it refused, it has not moved."""
    match error:
        case stripe.APIConnectionError() if isinstance(error.__cause__, _NOT_SENT):
            raise GatewayUnavailable(type(error.__cause__).__name__) from error
        case stripe.RateLimitError() | stripe.AuthenticationError() | stripe.PermissionError():
            raise GatewayUnavailable(_words(error)) from error
        case stripe.InvalidRequestError() if error.http_status in (400, 402, 404):
            # Its text may repeat what was sent, the card's token among it.
            return Declined(code=str(error.code or "invalid_request"), message="Stripe refuses such a request.")
        case stripe.IdempotencyError():
            return Unknown(message="Stripe has received another request under this key.", answered=True)
        case _:
            return Unknown(message=f"Stripe failed: {_words(error)}")


def _not_found_out(error: stripe.StripeError) -> Unknown:
    return Unknown(message=f"Stripe did not say: {_words(error)}")


def _words(error: stripe.StripeError) -> str:
    """For people. Stripe's own texts are made for them only where they are about a card: others may tell a part of
    the secret key, or repeat what was sent."""
    match error:
        case stripe.CardError():
            return str(error.user_message or error.code)
        case stripe.AuthenticationError() | stripe.PermissionError():
            return "the secret key was refused"
        case stripe.APIConnectionError():
            return f"no connection: {type(error.__cause__).__name__}"
        case _:
            return f"{type(error).__name__} {error.code or error.http_status or ''}".rstrip()
