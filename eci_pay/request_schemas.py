"""What the validators of requests take, in the words of JSON Schema, where pydantic cannot tell by itself."""

from typing import Any

from eci_pay import money

_SPACE = r"\t-\r \u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""White space as Unicode has it, which is what is trimmed: `\\s` means less or more from one engine to the next."""

STORABLE = r"^[^\u0000]*$"

AMOUNT: dict[str, Any] = {
    "description": (
        "In major units; rounded half to even (banker's rounding) to two decimals on the digits as sent, and then "
        f"above 0 and at most {money.AMOUNT_MAX:.0f}. A string is plain digits with an optional point."
    ),
    "anyOf": [
        # What rounds to 0.00 is too little, what rounds to 100000.00 is not too much.
        {"type": "number", "exclusiveMinimum": 0.005, "maximum": 100000.005},
        {
            "type": "string",
            "maxLength": money.DIGITS_MAX,
            "pattern": (
                r"^0*(?:[1-9][0-9]{0,4}(?:\.[0-9]*)?|100000(?:\.(?:00?|00[0-4][0-9]*|0050*)?)?)$"
                r"|^0+\.(?:0?[1-9]|00[6-9]|0050*[1-9])[0-9]*$"
            ),
        },
    ],
    "examples": [1499.00, "1499.00"],
}

REASON: dict[str, Any] = {
    "type": "string",
    "description": "5 to 400 characters, not counting white space around them, which is trimmed.",
    "pattern": rf"^[{_SPACE}]*[^{_SPACE}\u0000][^\u0000]{{3,398}}[^{_SPACE}\u0000][{_SPACE}]*$",
    "examples": ["Damaged in transit"],
}

INSTANT: dict[str, Any] = {
    "description": "An ISO 8601 instant with its zone, or a date, which means its midnight UTC.",
    "anyOf": [{"type": "string", "format": "date-time"}, {"type": "string", "format": "date"}],
}


def describe_currency(schema: dict[str, Any]) -> None:
    """Lists the currencies."""
    schema["description"] = "ISO 4217; lower case is taken too."
    schema["enum"] = sorted(money.currency_exponents())


def describe_creation(schema: dict[str, Any]) -> None:
    """Says of a charge or creation what no field of it says alone."""
    whole = list(money.whole_amount_currencies())
    schema["if"] = {"properties": {"currency": {"enum": whole}}, "required": ["currency"]}
    schema["then"] = {
        "description": "Whole amounts for a currency that has no minor unit.",
        "properties": {
            "amount": {
                "anyOf": [{"type": "number", "multipleOf": 1}, {"type": "string", "pattern": r"^[0-9]+(?:\.0*)?$"}]
            }
        },
    }
