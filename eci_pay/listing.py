"""Composes the SELECTs of lists over the SQLModel tables: one text for each set of filters, made once."""

from enum import Enum
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, bindparam, case, literal_column
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement, ColumnElement
from sqlmodel import col, func, select

from eci_pay.models import Payment
from eci_pay.requests import ID_MAX, ListRequest

DATED_MAX = 100_000
"""Of how many payments of a time the first and the last number are looked for: some 10 ms."""

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]

_DATES = {
    "created_from": col(Payment.created_at) >= bindparam("created_from"),
    "created_to": col(Payment.created_at) < bindparam("created_to"),
}
_CONDITIONS = {
    "status": col(Payment.status) == bindparam("status"),
    "payment_method": col(Payment.payment_method) == bindparam("payment_method"),
    "user_id": col(Payment.user_id) == bindparam("user_id"),
    **_DATES,
    "cursor": col(Payment.payment_id) < bindparam("cursor"),
}
"""By the field of a request that asks for it."""


def page_statement(request: ListRequest) -> tuple[str, dict[str, Any]]:
    """The rows of the page and one more, which tells whether there is a next page; with its parameters."""
    params = _params(request, *_CONDITIONS)
    limits = {"row_offset": ((request.page or 1) - 1) * request.page_size, "row_limit": request.page_size + 1}
    return _page_text(frozenset(params)), {**params, **limits}


def count_statement(request: ListRequest, count_max: int) -> tuple[str, dict[str, Any]]:
    """The number of rows of all pages, counted no further than `count_max`; with its parameters."""
    params = _params(request, *(name for name in _CONDITIONS if name != "cursor"))
    return _count_text(frozenset(params)), {**params, "row_limit": count_max}


def _params(request: ListRequest, *names: str) -> dict[str, Any]:
    given = request.model_dump(mode="python", include=set(names), exclude_none=True)
    return {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}


@cache
def _page_text(conditions: frozenset[str]) -> str:
    where = _where(conditions)
    if conditions >= _DATES.keys():
        where.append(_among_the_dated())
    newest_first = select(Payment).where(*where).order_by(col(Payment.payment_id).desc())
    return _compiled(newest_first.offset(_parameter("row_offset")).limit(_parameter("row_limit")))


@cache
def _count_text(conditions: frozenset[str]) -> str:
    where = _where(conditions)
    if conditions > _DATES.keys():  # the dates alone are counted off their index
        where.append(_among_the_dated())
    counted = select(Payment.payment_id).where(*where).limit(_parameter("row_limit")).subquery()
    return _compiled(select(func.count().label("total")).select_from(counted))


def _where(conditions: frozenset[str]) -> list[Any]:
    return [condition for name, condition in _CONDITIONS.items() if name in conditions]


def _among_the_dated() -> ColumnElement[bool]:
    """Between the first and the last payment of the dates, read off their index: so that a page of them is found by
    its number, like any other; unless they are too many for that. To walk there from the newest payment takes a second
    where there are ten million, and the planner would make that very walk of a plain min() or max()."""
    number = (col(Payment.payment_id) + literal_column("0")).label("number")
    numbers = select(number).where(*_DATES.values()).limit(literal_column(str(DATED_MAX + 1))).subquery("numbers")
    are_many = func.count() > literal_column(str(DATED_MAX))
    dated = (
        select(
            case((are_many, literal_column("0")), else_=func.min(numbers.c.number)).label("first"),
            case((are_many, literal_column(str(ID_MAX))), else_=func.max(numbers.c.number)).label("last"),
        )
        .select_from(numbers)
        .cte("dated")
    )
    return col(Payment.payment_id).between(
        select(dated.c.first).scalar_subquery(), select(dated.c.last).scalar_subquery()
    )


def _parameter(name: str) -> Any:
    return bindparam(name, type_=BigInteger)


def _compiled(statement: ClauseElement) -> str:
    return str(statement.compile(dialect=_DIALECT))
