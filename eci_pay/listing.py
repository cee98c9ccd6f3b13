"""Composes the SELECTs of lists from their filters, over the SQLModel tables."""

from typing import Any

from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.sql import ClauseElement
from sqlmodel import col, func, select
from sqlmodel.sql.expression import SelectOfScalar

from eci_pay.models import Payment
from eci_pay.requests import ListRequest

_DIALECT = PGDialect_psycopg()


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
    conditions = {
        "status": request.status and col(Payment.status) == request.status.value,
        "payment_method": request.payment_method
        and col(Payment.payment_method) == request.payment_method.value,
        "user_id": request.user_id and col(Payment.user_id) == request.user_id,
        "created_from": request.created_from and col(Payment.created_at) >= request.created_from,
        "created_to": request.created_to and col(Payment.created_at) < request.created_to,
    }
    return statement.where(*(condition for condition in conditions.values() if condition is not None))
