"""Identifiers that eci-pay makes up: unguessable, unique, and in time order where an index keeps them."""

import secrets
import string
import uuid
from datetime import datetime

from ulid import ULID

REFERENCE_ALPHABET = string.ascii_uppercase + string.digits
REFERENCE_LENGTH = 12


def transaction_id(at: datetime) -> str:
    """`TXN` and a ULID of the instant `at`: 48 bits of time, 80 random bits."""
    return f"TXN{ULID.from_datetime(at)}"


def refund_begin_id(at: datetime) -> str:
    """`RFN` and a ULID of the instant `at`: tells the refunds of one payment apart before they have an id."""
    return f"RFN{ULID.from_datetime(at)}"


def reference() -> str:
    """`REF` and 12 characters of A-Z0-9, for a charge whose client gave none."""
    number = secrets.randbelow(len(REFERENCE_ALPHABET) ** REFERENCE_LENGTH)  # one draw, for each asks the system
    characters = []
    for _ in range(REFERENCE_LENGTH):
        number, place = divmod(number, len(REFERENCE_ALPHABET))
        characters.append(REFERENCE_ALPHABET[place])
    return "REF" + "".join(characters)


def idempotency_key() -> str:
    """A key for an operator who gave none."""
    return f"cli-{uuid.uuid4()}"
