"""Amounts of money: exact decimals, banker's rounding, limits and ISO 4217 exponents."""

from decimal import ROUND_HALF_EVEN, Decimal
from functools import cache

AMOUNT_MAX = Decimal("100000.00")
"""The largest amount of one charge or refund, in major units of its currency."""

CENT = Decimal("0.01")
DIGITS_MAX = 60
"""The most characters of an amount given as text."""

DEFAULT_CURRENCY = "INR"

# ISO 4217 list one, active codes of circulating money, by the exponent of the minor unit.
_EXPONENT_0 = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_EXPONENT_2 = (
    "AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP "
    "CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS "
    "INR IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN "
    "MYR MZN NAD NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE "
    "SOS SRD SSP STN SVC SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR "
    "ZMW ZWG"
)
_EXPONENT_3 = "BHD IQD JOD KWD LYD OMR TND"


@cache
def currency_exponents() -> dict[str, int]:
    """The number of decimals of each currency's minor unit (ISO 4217)."""
    groups = {0: _EXPONENT_0, 2: _EXPONENT_2, 3: _EXPONENT_3}
    return {code: exponent for exponent, codes in groups.items() for code in codes.split()}


@cache
def whole_amount_currencies() -> tuple[str, ...]:
    """The currencies without a minor unit, whose amounts are whole."""
    return tuple(code for code, exponent in currency_exponents().items() if exponent == 0)


def parse_currency(text: str) -> str:
    """An ISO 4217 code in upper case; raises ValueError for an unknown one."""
    code = text.upper()
    if not text.isascii() or code not in currency_exponents():
        raise ValueError("is not an ISO 4217 currency code")
    return code


def parse_amount(value: object) -> Decimal:
    """The amount that a JSON number or a plain decimal string denotes, in major units.

    Rounded half to even (banker's rounding) to two decimals on the digits as sent. Raises ValueError for
    anything else and for amounts that, once rounded, are not above zero or above `AMOUNT_MAX`.
    """
    amount = _exact(value)
    # Compared before it is rounded: quantize() has no room for a number of any size.
    if not amount.is_finite() or amount > AMOUNT_MAX + 1:
        raise ValueError(f"must not exceed {AMOUNT_MAX}")
    if amount < 0:
        raise ValueError("must be greater than 0")
    rounded = amount.quantize(CENT, rounding=ROUND_HALF_EVEN)
    if rounded <= 0:
        raise ValueError("must be greater than 0 after rounding to two decimals")
    if rounded > AMOUNT_MAX:
        raise ValueError(f"must not exceed {AMOUNT_MAX}")
    return rounded


def plain(amount: Decimal, currency: str) -> str:
    """The amount for a reader: ungrouped digits, with decimals where the currency has any."""
    return f"{amount:.0f}" if currency in whole_amount_currencies() else f"{amount:.2f}"


def check_minor_unit(amount: Decimal, currency: str) -> None:
    """Raises ValueError where the currency has no minor unit and the amount is not whole."""
    if currency in whole_amount_currencies() and amount != amount.to_integral_value():
        raise ValueError(f"must be a whole amount, for {currency} has no minor unit")


def _exact(value: object) -> Decimal:
    if isinstance(value, Decimal):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return Decimal(value)
    if isinstance(value, str):
        return _plain_decimal(value)
    raise ValueError("must be a number or a plain decimal string")


def _plain_decimal(text: str) -> Decimal:
    """ASCII digits with an optional point: no sign, exponent, grouping, space or other script's digits."""
    if len(text) > DIGITS_MAX:
        raise ValueError(f"has more than {DIGITS_MAX} characters")
    whole, _, fraction = text.partition(".")
    digits = whole + fraction
    if not (text.isascii() and digits.isdigit() and whole):
        raise ValueError("must be a number or a plain decimal string")
    return Decimal(text)
