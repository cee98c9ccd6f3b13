"""Makes valid what schemathesis takes for valid data: rules that its document has no words for."""

import itertools
from typing import Any

from schemathesis import Case, HookContext, hook

from eci_pay.idempotency import KEY_LENGTH_MAX
from eci_pay.requests import LIST_DEPTH_MAX, PAGE_SIZE_DEFAULT

_numbers = itertools.count(1)


@hook
def before_call(_context: HookContext, case: Case[Any], _kwargs: dict[str, Any]) -> None:
    """Mends a case before it is sent."""
    if case.meta is None or not case.meta.generation.mode.is_positive:
        return
    _give_a_key_of_its_own(case)
    _name_one_page(case)
    _write_whole_numbers_whole(case)


def _give_a_key_of_its_own(case: Case[Any]) -> None:
    """Two requests with the same key are two different requests, of which the second is refused."""
    key = case.headers.get("Idempotency-Key")
    if key is not None:
        number = str(next(_numbers))
        case.headers["Idempotency-Key"] = f"{key[:-1][: KEY_LENGTH_MAX - len(number) - 1]}{number}{key[-1]}"


def _name_one_page(case: Case[Any]) -> None:
    """A page or a cursor, and no page beyond the limit of depth."""
    if "page" not in case.query:
        return
    size = int(case.query.get("page_size", PAGE_SIZE_DEFAULT))
    if "cursor" in case.query or int(case.query["page"]) * size > LIST_DEPTH_MAX:
        del case.query["page"]


def _write_whole_numbers_whole(case: Case[Any]) -> None:
    """To JSON Schema 7.0 is an integer; the server takes digits alone."""
    if isinstance(case.body, dict):
        for name in ("order_id", "user_id"):
            if isinstance(whole := case.body.get(name), float):
                case.body[name] = int(whole)
