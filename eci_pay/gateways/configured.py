"""The gateway that the settings name. An adapter is loaded only where it is used."""

from eci_pay.errors import SettingsInvalid
from eci_pay.gateways import Gateway
from eci_pay.settings import Settings


def configured_gateway(settings: Settings) -> Gateway:
    """The gateway of this process; raises SettingsInvalid where its package is not installed."""
    if settings.eci_pay_gateway == "stripe":
        return _stripe(settings)
    from eci_pay.gateways.simulated import SimulatedGateway

    return SimulatedGateway(
        latency_seconds=settings.eci_pay_simulated_latency_seconds,
        slow_seconds=settings.eci_pay_simulated_slow_seconds,
    )


def _stripe(settings: Settings) -> Gateway:
    try:
        from eci_pay.gateways.stripe import StripeGateway
    except ImportError:
        fault = "ECI_PAY_GATEWAY: stripe needs a package more: run `pip install 'eci-pay[stripe]'`"
        raise SettingsInvalid((fault,)) from None
    secret_key, webhook_secret = settings.stripe_secret_key, settings.stripe_webhook_secret
    assert secret_key is not None, "the settings ask for it"
    return StripeGateway(
        secret_key=secret_key.get_secret_value(),
        webhook_secret=webhook_secret.get_secret_value() if webhook_secret else None,
        api_base=settings.eci_pay_stripe_api_base,
        timeout_seconds=settings.eci_pay_gateway_timeout_seconds,
    )
