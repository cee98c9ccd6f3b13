"""Composes the SELECTs of lists from their filters, over the SQLModel tables."""

from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement
from sqlmodel import col, func, select
from sqlmodel.sql.expression import SelectOfScalar

from eci_pay.models import Payment
from eci_pay.requests import ListRequest

_DIALECT = PGDialect_psycopg()  # type: ignore[no-untyped-call]


def page_statement(request: ListRequest) -> SelectOfScalar[Payment]:
    """The rows of the page and one more, which tells whether there is a next page."""
    statement = _filtered(select(Payment), request)
    if request.cursor is not None:
        statement = statement.where(col(Payment.payment_id) < request.cursor)
    offset = ((request.page or 1) - 1) * request.page_size
    return statement.order_by(col(Payment.payment_id).desc()).offset(offset).limit(request.page_size + 1)


def count_statement(request: ListRequest, count_max: int) -> SelectOfScalar[int]:
    """The number of rows of all pages, counted no further than `count_max`."""
    counted = _filtered(select(Payment.payment_id), request).limit(count_max).subquery()
    return select(func.count().label("total")).select_from(counted)


def compiled(statement: ClauseElement) -> tuple[str, dict[str, Any]]:
    """The text and the parameters of a statement, as psycopg takes them."""
    result = statement.compile(dialect=_DIALECT)
    return str(result), dict(result.params)


def _filtered(statement: SelectOfScalar[Any], request: ListRequest) -> SelectOfScalar[Any]:
    if request.status is not None:
        statement = statement.where(col(Payment.status) == request.status.value)
    if request.payment_method is not None:
        statement = statement.where(col(Payment.payment_method) == request.payment_method.value)
    if request.user_id is not None:
        statement = statement.where(col(Payment.user_id) == request.user_id)
    if request.created_from is not None:
        statement = statement.where(col(Payment.created_at) >= request.created_from)
    if request.created_to is not None:
        statement = statement.where(col(Payment.created_at) < request.created_to)
    return statement
