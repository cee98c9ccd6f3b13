"""Masks secrets and personal data in what is logged: card numbers, credentials, e-mail addresses and phone numbers.

Whatever cannot be told from a number of ours by its looks, such as ten digits that may be an order or a telephone, is
masked only under a name that says what it is.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Any
from urllib.parse import unquote

MASK = "***"
CARD_DIGITS_MIN, CARD_DIGITS_MAX = 13, 19
GROUP_DIGITS_MIN = 3
"""Shorter groups of digits are no part of a card number, but for its last and for single digits."""
TEXT_LENGTH_MAX = 20_000
"""Of a longer text the middle is left out: to search it takes its time, in which nobody is served."""
DECODINGS_MAX = 3
"""How often a text may be percent-encoded."""
_LONG_NUMBER = 10 ** (CARD_DIGITS_MIN - 1)

_NAMES_OF_SECRETS = (
    "password|passwd|passphrase|pwd|secret|token|authorization|credential|cookie|signature"
    "|api[-_ ]?key|access[-_ ]?key|private[-_ ]?key|cvv2?|cvc2?|cvn|security[-_ ]?code"
    "|card[-_ ]?(?:number|no)|e?[-_ ]?mail|phone|mobile|msisdn|telephone"
)
_SECRET_NAME = re.compile(f"{_NAMES_OF_SECRETS}|^(?:card|pan|tel|pin)$", re.IGNORECASE)
_PUBLIC_NAMES = {"authorization_code"}
"""The gateway's reference of a payment."""

# In a card number: what people put there, and where lines are broken; a text that is shown as Python or JSON writes it
# has a backslash there.
_BETWEEN_DIGITS = r"(?:[ \t\u00a0\u2007\u2010-\u2015\u202f-]|[ \t]{0,20}(?:\r?\n|\\{1,4}[nrt])[ \t]{0,20})?"
# Between groups of a card's own sizes it may be nearly anything. A comma is not: then it is a list of ids.
_BETWEEN_GROUPS = r"(?:[^0-9A-Za-z,:]{1,3}|\\{1,4}xa0)"
_IN_GROUPS = "[0-9]{4}" + _BETWEEN_GROUPS + "(?:[0-9]{4}" + _BETWEEN_GROUPS + "[0-9]{4}|[0-9]{6})" + _BETWEEN_GROUPS
_SIZES_OF_GROUPS = {(4,), (4, 4), (4, 4, 4), (4, 4, 4, 4), (4, 6)}
"""Of those before the last one."""
_USUAL = re.compile(_BETWEEN_DIGITS)

_SUSPICIOUS = re.compile(
    "pass|pwd|secret|whsec_|ecipay_|token|tok_|pm_|auth|bearer|basic|credential|cookie|signature|key|k_live|k_test|cvv|cvc|cvn"
    "|security|card|pan|pin|tel|[@+]|mail|phone|mobile|msisdn|eyj"
    rf"|[0-9](?:{_BETWEEN_DIGITS}[0-9]){{12}}|{_IN_GROUPS}[0-9]|%[0-9a-f]{{2}}"
    r"|[0-9]{3}\)? ?[-.]?[0-9]{3}[ .-][0-9]{4}|[0-9]{5}[ -][0-9]{5}"
)
"""Finds something in whatever the patterns below do, in lower case."""
PLAIN_LENGTH_MAX = 200
"""Longer texts are not remembered to be plain."""
_is_ours = re.compile("[0-9a-f]{32}|/v1/payments/(?:order/)?[0-9]{1,12}(?:/(?:refund|status))?").fullmatch
"""The id of a request, the path of a payment: what is new with each line, and not worth remembering."""

_QUOTED = r"""\\*"(?:[^"\\]|\\[^"]|\\"(?!\s*[,:}\])]))*(?:\\*"|$)|'(?:[^'\\]|\\.)*(?:'|$)"""
_NAMED = re.compile(
    rf"""(?P<name>\b(?!authorization_code)[\w.-]{{0,40}}?(?:{_NAMES_OF_SECRETS})[\w-]*+|\b(?:pan|pin|tel)\b)"""
    rf"""(?P<between>\\*+["']?\]?\s*+\)?\s*+(?:=>|[=:]|(?<=["']),)\s*+(?:b(?=["']))?)"""
    rf"""(?P<value>(?:{_QUOTED})[^\s,;}})\]"']*|(?:(?:bearer|basic)\s+)?\S+(?:(?<=[=:])\s+\S+)*)""",
    re.IGNORECASE,
)
_CVV = re.compile(r"\b(cvv2?|cvc2?|cvn|security code)\b(\W{0,3}(?:is |was )?\W{0,3})[0-9]{3,4}\b", re.IGNORECASE)
_SCHEME = re.compile(r"\b(bearer|basic)(\s+)[^\s\"',;]+", re.IGNORECASE)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:sk|rk|pk)_(?:live|test)_\w+|whsec_[\w+/=-]+|(?:pm|tok)_\w+|\b\w{1,100}?_secret_\w+"
    r"|ecipay_[0-9a-z]+_[\w-]+|eyJ[\w-]++\.[\w-]++\.[\w-]*)"
)
_URL_PASSWORD = re.compile(r"(?<=://)([^\s:/@]*):\S{0,2000}@")
_EMAIL = re.compile(r"(?<!//)(?<![\w.+%'-])[\w.+%'-]+@(?:[\w-]+\.)*[\w-]+")
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9][0-9]{0,3}(?:[ ().-]{0,2}[0-9]){6,13}(?![0-9])"
    r"|(?<![\w.+-])(?:\([0-9]{3}\) ?|[0-9]{3}[ .-])[0-9]{3}[ .-][0-9]{4}(?![\w-])"
    r"|(?<![\w.+-])0?[6-9][0-9]{4}[ -][0-9]{5}(?![\w-])"
)
_KNOWN = re.compile(
    # What holds long numbers and is none: our ids, the gateway's, UUIDs, hashes, instants, ids by their name.
    r"\b(?:TXN[0-9A-Z]{26}|(?:REF|AUTH)[0-9A-Z]{6,12})\b|\b(?:pi|ch|re|evt|req|py|txn)_\w+"
    r"|\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b"
    r"|\b(?=[0-9]{0,40}[A-Fa-f][0-9]{0,40}[A-Fa-f])[0-9A-Fa-f]{16,}\b"
    r"|\b(?:19|20)[0-9]{2}-[01][0-9]-[0-3][0-9]\b(?:[ T][0-9]{2}:[0-9]{2}(?::[0-9]{2}(?:\.[0-9]+)?)?)?"
    r"|_id\\*[\"']?\)?\s*[=:]\s*\(?[\"']?[0-9]+(?![ -]?[0-9])"
)
_NUMBERS = re.compile(rf"(?<![0-9])[0-9](?:(?:{_BETWEEN_DIGITS}|{_BETWEEN_GROUPS})[0-9]){{12,}}")
_GROUP = re.compile(r"(?<!\\xa)[0-9]+")


def is_plain(event: Mapping[str, Any]) -> bool:
    """Whether there is nothing to mask, for sure. Nearly every line is, and its texts are the same again and again."""
    for name, value in event.items():
        if isinstance(value, str):
            if len(value) > PLAIN_LENGTH_MAX or not (_is_ours(value) or _is_plain(value)):
                return False
        elif isinstance(value, int | float):
            if value >= _LONG_NUMBER and not name.endswith("_id"):
                return False
        elif value is not None:
            return False
    return _are_plain_names(tuple(event))


@lru_cache(4096)
def _is_plain(text: str) -> bool:
    if _SUSPICIOUS.search(text.lower()) is None:
        return True
    return masked_text(text) == text  # a caller may be named mobile-app, and its lines should not cost more than others


@lru_cache(256)
def _are_plain_names(names: tuple[str, ...]) -> bool:
    return not any(_is_secret(name) for name in names)


def _is_secret(name: str) -> bool:
    return name not in _PUBLIC_NAMES and _SECRET_NAME.search(name) is not None


def masked_line(line: str, known: Iterable[int] = ()) -> str:
    """A JSON object in which everything is masked that must not be read; `known` are numbers that are ids of ours."""
    return json.dumps(masked(json.loads(line), frozenset(map(str, known))), separators=(",", ":"))


def masked(value: Any, known: Collection[str] = (), name: str = "") -> Any:  # noqa: PLR0911 - one for each kind
    """A JSON value without what must not be read."""
    match value:
        case None | bool():
            return value
        case _ if _is_secret(name):
            return MASK
        case dict():
            return {masked_text(key, known): masked(inner, known, key) for key, inner in value.items()}
        case list():
            if len(value) == 2 and isinstance(value[0], str):  # noqa: PLR2004 - a header, for instance
                return [masked(value[0], known), masked(value[1], known, value[0])]
            return [masked(inner, known, name) for inner in value]
        case str():
            return masked_text(value, known)
        case int() | float() if not name.endswith(("_id", "_ids")):
            text = str(value) if isinstance(value, int) else f"{value:.0f}"
            return value if masked_text(text, known) == text else MASK
        case _:
            return value


def masked_text(text: str, known: Collection[str] = ()) -> str:
    """A text without what must not be read. Where that is percent-encoded, the text is decoded."""
    if len(text) > TEXT_LENGTH_MAX:
        text = _shortened(text)
    told = _masked_as_it_is(text, known)
    decoded = _decoded(told)
    if decoded != told and (masked_decoded := _masked_as_it_is(decoded, known)) != decoded:
        return masked_decoded
    return told


def _shortened(text: str) -> str:
    """Without its middle, and without the words that are cut through."""
    half = TEXT_LENGTH_MAX // 2
    head, tail = re.sub(r"\S*$", "", text[:half]), re.sub(r"^\S*", "", text[-half:])
    return f"{head}[{len(text) - len(head) - len(tail)} characters left out]{tail}"


def _decoded(text: str) -> str:
    for _ in range(DECODINGS_MAX):
        if "%" not in text or (decoded := unquote(text)) == text:
            break
        text = decoded
    return text


def _masked_as_it_is(text: str, known: Collection[str]) -> str:
    text = _URL_PASSWORD.sub(rf"\1:{MASK}@", text)
    text = _NAMED.sub(_value_masked, text)
    text = _CVV.sub(rf"\1\g<2>{MASK}", text)
    text = _SCHEME.sub(rf"\1\g<2>{MASK}", text)
    text = _TOKEN.sub(MASK, text)
    text = _EMAIL.sub(MASK, text)
    text = _PHONE.sub(MASK, text)
    return _without_cards(text, known)


def _value_masked(found: re.Match[str]) -> str:
    return f"{found['name']}{found['between']}{MASK}"


def _without_cards(text: str, known: Collection[str]) -> str:
    """What is known is left out of the search: a number may stand beside it, and they would look like one."""
    mask = _cards_masked(known)
    told, at = [], 0
    for found in _KNOWN.finditer(text):
        told += [_NUMBERS.sub(mask, text[at : found.start()]), found[0]]
        at = found.end()
    return "".join(told) + _NUMBERS.sub(mask, text[at:])


def _cards_masked(known: Collection[str]) -> Callable[[re.Match[str]], str]:
    """Masks each card number in a row of digits and separators, in which other numbers may stand beside it."""

    def replace(found: re.Match[str]) -> str:
        text = found[0]
        if text in known:
            return text
        groups = list(_GROUP.finditer(text))
        usual = [True, *(_USUAL.fullmatch(text, a.end(), b.start()) is not None for a, b in pairwise(groups))]
        told, at, first = [], 0, 0
        while first < len(groups):
            within = slice(first, first + CARD_DIGITS_MAX)
            count = _groups_of_card([group[0] for group in groups[within]], usual[within], known)
            if count:
                told += [text[at : groups[first].start()], MASK]
                at = groups[first + count - 1].end()
            first += count or 1
        return "".join(told) + text[at:]

    return replace


def _groups_of_card(groups: list[str], usual: list[bool], known: Collection[str]) -> int:
    """How many groups of digits make a card number from the first one on; `usual` says of each whether what stands
    before it is."""
    digits, is_usual = "", True
    sizes: tuple[int, ...] = ()
    for group, is_usual_here in zip(groups, usual, strict=True):
        if sizes:
            is_usual = is_usual and is_usual_here
            fits = is_usual and (min(sizes) >= GROUP_DIGITS_MIN or max(sizes) == 1)
            if not fits and sizes not in _SIZES_OF_GROUPS:
                return 0
        digits, sizes = digits + group, (*sizes, len(group))
        if len(digits) > CARD_DIGITS_MAX:
            return 0
        if len(digits) >= CARD_DIGITS_MIN and digits not in known and _is_luhn_valid(digits):
            return len(sizes)
    return 0


def _is_luhn_valid(digits: str) -> bool:
    """By the check digit that ends a card number (ISO/IEC 7812-1)."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0
