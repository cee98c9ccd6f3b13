"""The schema: the migrations and the models say the same, and the database guards the money by itself."""

import itertools
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import psycopg
import pytest
from sqlalchemy import create_engine
from sqlmodel import SQLModel

import eci_pay.models  # noqa: F401 - fills SQLModel.metadata
from eci_pay.database import create_database, drop_database
from tests.support import Books

TABLES = (
    "payments",
    "transactions",
    "idempotency_keys",
    "refunds",
    "outbox",
    "recoveries",
    "reconciliation_runs",
    "settlements_awaited",
    "settlement_lines_pending",
    "bulk_runs",
    "totals",
    "total_changes",
    "api_keys",
)

NAMED_INDEXES = {
    "idx_payments_order_id": ("payments", ["order_id"]),
    "idx_payments_user_id": ("payments", ["user_id"]),
    "idx_payments_status": ("payments", ["status", "payment_id"]),
    "idx_payments_transaction_id": ("payments", ["transaction_id"]),
    "idx_payments_reference": ("payments", ["reference"]),
    "idx_transactions_payment_id": ("transactions", ["payment_id"]),
    "idx_idempotency_key": ("idempotency_keys", ["idempotency_key", "caller"]),
    "idx_idempotency_expires": ("idempotency_keys", ["expires_at"]),
}
"""The names that operators and other tools rely on."""

_COLUMNS = """
    SELECT format('%%s.%%s %%s null:%%s default:%%s identity:%%s', a.attrelid::regclass, a.attname,
                  format_type(a.atttypid, a.atttypmod), NOT a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
                  a.attidentity)
    FROM pg_attribute a
    LEFT JOIN pg_attrdef d ON (d.adrelid, d.adnum) = (a.attrelid, a.attnum)
    WHERE a.attrelid = ANY (%(tables)s::text[]::regclass[]) AND a.attnum > 0 AND NOT a.attisdropped
"""
_CONSTRAINTS = """
    SELECT format('%%s: %%s %%s', conrelid::regclass, conname, pg_get_constraintdef(oid))
    FROM pg_constraint
    WHERE conrelid = ANY (%(tables)s::text[]::regclass[]) AND contype <> 'n'
"""
_INDEXES = """
    SELECT pg_get_indexdef(indexrelid) FROM pg_index
    WHERE indrelid = ANY (%(tables)s::text[]::regclass[]) AND indisvalid
"""
_TRIGGERS = """
    SELECT format('%%s %%s %%s', pg_get_triggerdef(oid), tgenabled, pg_get_functiondef(tgfoid))
    FROM pg_trigger
    WHERE tgrelid = ANY (%(tables)s::text[]::regclass[]) AND NOT tgisinternal
"""
_COMMENTS = """
    SELECT format('%%s.%%s: %%s', objoid::regclass, objsubid, description)
    FROM pg_description
    WHERE classoid = 'pg_class'::regclass AND objoid = ANY (%(tables)s::text[]::regclass[])
"""
MODELLED = {"columns": _COLUMNS, "constraints": _CONSTRAINTS, "indexes": _INDEXES}
EVERYTHING = {**MODELLED, "triggers": _TRIGGERS, "comments": _COMMENTS}

_numbers = itertools.count(1)


@asynccontextmanager
async def new_database(server_url: str) -> AsyncIterator[str]:
    """One more empty database, dropped at the end."""
    name = f"eci_pay_schema_{os.getpid()}_{next(_numbers)}"
    try:
        yield await create_database(server_url, name)
    finally:
        await drop_database(server_url, name)


async def schema_of(url: str, queries: dict[str, str], tables: tuple[str, ...]) -> dict[str, list[str]]:
    """What the catalog says of the tables, as sorted lines."""
    async with await psycopg.AsyncConnection.connect(url) as connection:
        found = {}
        for name, query in queries.items():
            cursor = await connection.execute(query.encode(), {"tables": list(tables)})
            found[name] = sorted(line for (line,) in await cursor.fetchall())
    return found


async def test_the_models_describe_exactly_what_the_migrations_make(database_url: str, server_url: str) -> None:
    async with new_database(server_url) as url:
        engine = create_engine("postgresql+psycopg://", creator=lambda: psycopg.connect(url))
        SQLModel.metadata.create_all(engine)
        engine.dispose()
        modelled = await schema_of(url, MODELLED, TABLES)
    migrated = await schema_of(database_url, MODELLED, TABLES)
    for part in MODELLED:
        assert modelled[part] == migrated[part]
    assert {table.name for table in SQLModel.metadata.sorted_tables} == set(TABLES)


async def test_every_index_that_others_rely_on_exists_once(books: Books) -> None:
    rows = await books.rows("""
        SELECT c.relname AS name, i.indrelid::regclass::text AS table_name,
               array_agg(a.attname::text ORDER BY k.n) AS columns
        FROM pg_index i
        JOIN pg_class c ON c.oid = i.indexrelid
        CROSS JOIN LATERAL unnest(i.indkey) WITH ORDINALITY AS k (attnum, n)
        JOIN pg_attribute a ON (a.attrelid, a.attnum) = (i.indrelid, k.attnum)
        GROUP BY 1, 2
    """)
    found = {row["name"]: (row["table_name"], row["columns"]) for row in rows}
    assert {name: found.get(name) for name in NAMED_INDEXES} == NAMED_INDEXES


async def test_no_two_indexes_of_a_table_cover_the_same_columns(books: Books) -> None:
    doubles = await books.rows(
        """
        SELECT array_agg(indexrelid::regclass::text) AS indexes
        FROM pg_index
        WHERE indrelid = ANY (%s::text[]::regclass[])
        GROUP BY indrelid, indkey::text, pg_get_expr(indpred, indrelid), pg_get_expr(indexprs, indrelid)
        HAVING count(*) > 1
    """,
        list(TABLES),
    )
    assert doubles == []


def payment(**columns: object) -> dict[str, object]:
    """A payment that the database accepts, with columns to differ in."""
    return {
        "order_id": 2,
        "user_id": 7,
        "amount": "100.00",
        "payment_method": "UPI",
        "transaction_id": "TXN2",
        **columns,
    }


def transaction(**columns: object) -> dict[str, object]:
    """An audit row that the database accepts."""
    return {"payment_id": 1, "transaction_type": "PAYMENT", "amount": "100.00", "status": "COMPLETED", **columns}


def refund(**columns: object) -> dict[str, object]:
    """A refund that the database accepts."""
    return {"payment_id": 1, "amount": "10.00", "reason": "Damaged", "status": "PROCESSING", **columns}


def key(**columns: object) -> dict[str, object]:
    """An idempotency key that the database accepts."""
    return {"idempotency_key": "other", "request_hash": "h", "expires_at": "2026-11-02T12:00Z", **columns}


def message(**columns: object) -> dict[str, object]:
    """A message that the database accepts."""
    return {"payment_id": 1, "sequence": 2, "destination": "order", "event": "COMPLETED", "payload": "{}", **columns}


ACCEPTED: list[tuple[str, dict[str, object]]] = [
    ("payments", payment()),
    ("payments", payment(status="COMPLETED", refunded_amount="100.00", refund_pending="100.00")),
    ("payments", payment(status="REFUNDED", refunded_amount="100.00")),
    ("transactions", transaction()),
    ("transactions", transaction(transaction_type="REFUND", status="REFUNDED")),
    ("refunds", refund()),
    ("idempotency_keys", key()),
    ("idempotency_keys", key(idempotency_key="taken", caller="somebody else")),
    ("idempotency_keys", key(status_code=202)),
    ("outbox", message()),
]

_CHECK, _UNIQUE, _FOREIGN = (
    psycopg.errors.CheckViolation,
    psycopg.errors.UniqueViolation,
    psycopg.errors.ForeignKeyViolation,
)

REFUSED: list[tuple[str, dict[str, object], type[psycopg.Error], str | None]] = [
    ("payments", payment(order_id=0), _CHECK, "payments_order_id_positive"),
    ("payments", payment(order_id=1), _UNIQUE, "idx_payments_order_id"),
    ("payments", payment(user_id=-1), _CHECK, "payments_user_id_positive"),
    ("payments", payment(amount="0.00"), _CHECK, "payments_amount_positive"),
    ("payments", payment(amount="0.004"), _CHECK, "payments_amount_positive"),
    ("payments", payment(amount="-1"), _CHECK, "payments_amount_positive"),
    ("payments", payment(amount="100000000"), psycopg.errors.NumericValueOutOfRange, None),
    ("payments", payment(amount="Infinity"), psycopg.errors.NumericValueOutOfRange, None),
    ("payments", payment(currency="INRX"), psycopg.errors.StringDataRightTruncation, None),
    ("payments", payment(payment_method="CASH"), _CHECK, "payments_method_known"),
    ("payments", payment(payment_method="upi"), _CHECK, "payments_method_known"),
    ("payments", payment(status="DONE"), _CHECK, "payments_status_known"),
    ("payments", payment(transaction_id="TXN1"), _UNIQUE, "idx_payments_transaction_id"),
    ("payments", payment(transaction_id=None), psycopg.errors.NotNullViolation, None),
    ("payments", payment(attempt=0), _CHECK, "payments_attempt_positive"),
    ("payments", payment(status="COMPLETED", refunded_amount="100.01"), _CHECK, "payments_refund_within_capture"),
    ("payments", payment(status="COMPLETED", refunded_amount="-0.01"), _CHECK, None),
    ("payments", payment(status="COMPLETED", refunded_amount="NaN"), _CHECK, "payments_refund_within_capture"),
    ("payments", payment(status="COMPLETED", refund_pending="0.01"), _CHECK, "payments_pending_within_refund"),
    ("payments", payment(status="COMPLETED", refund_pending="-0.01"), _CHECK, "payments_pending_within_refund"),
    ("payments", payment(status="PENDING", refunded_amount="1"), _CHECK, "payments_refund_of_completed"),
    ("payments", payment(status="PROCESSING", refunded_amount="1"), _CHECK, "payments_refund_of_completed"),
    ("payments", payment(status="FAILED", refunded_amount="1"), _CHECK, "payments_refund_of_completed"),
    ("payments", payment(status="CANCELLED", refunded_amount="1"), _CHECK, "payments_refund_of_completed"),
    ("payments", payment(status="REFUNDED"), _CHECK, "payments_refunded_in_full"),
    ("payments", payment(status="REFUNDED", refunded_amount="99.99"), _CHECK, "payments_refunded_in_full"),
    (
        "payments",
        payment(status="REFUNDED", refunded_amount="100", refund_pending="1"),
        _CHECK,
        "payments_refunded_in_full",
    ),
    ("payments", payment(payment_id=99), psycopg.errors.GeneratedAlways, None),
    ("transactions", transaction(transaction_type="CHARGE", status="PROCESSING"), _CHECK, "transactions_type_known"),
    ("transactions", transaction(amount=0), _CHECK, "transactions_amount_positive"),
    ("transactions", transaction(status="DONE"), _CHECK, "transactions_status_known"),
    ("transactions", transaction(transaction_type="REFUND"), _CHECK, "transactions_status_known"),
    ("transactions", transaction(payment_id=99), _FOREIGN, None),
    ("refunds", refund(amount=0), _CHECK, "refunds_amount_positive"),
    ("refunds", refund(status="REFUNDED"), _CHECK, "refunds_status_known"),
    ("refunds", refund(payment_id=99), _FOREIGN, None),
    ("idempotency_keys", key(idempotency_key="taken"), _UNIQUE, "idx_idempotency_key"),
    ("idempotency_keys", key(response_body="{}"), _CHECK, "idempotency_keys_response_has_status"),
    ("idempotency_keys", key(expires_at=None), psycopg.errors.NotNullViolation, None),
    ("idempotency_keys", key(payment_id=99), _FOREIGN, None),
    ("idempotency_keys", key(refund_id=99), _FOREIGN, None),
    ("outbox", message(sequence=0), _CHECK, "outbox_sequence_positive"),
    ("outbox", message(sequence=1), _UNIQUE, "idx_outbox_payment_sequence"),
    ("outbox", message(attempts=-1), _CHECK, "outbox_attempts_not_negative"),
    (
        "outbox",
        message(delivered_at="2026-11-01T12:00Z", dead_at="2026-11-01T12:00Z"),
        _CHECK,
        "outbox_delivered_or_dead",
    ),
    ("outbox", message(payment_id=99), _FOREIGN, None),
]

UPDATES_REFUSED = [
    "UPDATE payments SET status = 'FAILED', refunded_amount = 60",
    "UPDATE payments SET refunded_amount = 60.00 + 40.01",
    "UPDATE payments SET amount = 59.99, refunded_amount = 60",
    "UPDATE payments SET refund_pending = 60.01, refunded_amount = 60",
    "UPDATE payments SET status = 'REFUNDED', refunded_amount = 60",
    "UPDATE refunds SET amount = -amount",
    "UPDATE idempotency_keys SET status_code = NULL",
]


@pytest.fixture
async def one_of_each(books: Books) -> Books:
    """One row in every table, to collide with."""
    await _insert(books, "payments", payment(order_id=1, transaction_id="TXN1", status="COMPLETED"))
    await _insert(books, "transactions", transaction())
    await _insert(books, "refunds", refund())
    await _insert(books, "idempotency_keys", key(idempotency_key="taken", response_body="{}", status_code=201))
    await _insert(books, "outbox", message(sequence=1))
    return books


async def test_the_rows_of_the_service_are_accepted(one_of_each: Books) -> None:
    for table, columns in ACCEPTED:
        async with one_of_each.connection.transaction(force_rollback=True):
            await _insert(one_of_each, table, columns)


async def test_the_database_refuses_rows_that_would_falsify_the_books(one_of_each: Books) -> None:
    wrong = []
    for table, columns, refusal, constraint in REFUSED:
        expected = (refusal.__name__, constraint)
        told: tuple[str, str | None] = ("accepted", constraint)
        async with one_of_each.connection.transaction(force_rollback=True):
            try:
                async with one_of_each.connection.transaction():
                    await _insert(one_of_each, table, columns)
            except psycopg.Error as error:
                told = (type(error).__name__, constraint and error.diag.constraint_name)
        if told != expected:
            wrong.append((table, columns, told))
    assert wrong == []


@pytest.mark.parametrize("statement", UPDATES_REFUSED)
async def test_the_database_refuses_changes_that_would_falsify_the_books(one_of_each: Books, statement: str) -> None:
    with pytest.raises(psycopg.errors.CheckViolation):
        await one_of_each.rows(statement)


@pytest.mark.parametrize("table", ["payments", "transactions", "refunds"])
async def test_no_amount_is_not_a_number(one_of_each: Books, table: str) -> None:
    row = {"payments": payment, "transactions": transaction, "refunds": refund}[table](amount="NaN")
    with pytest.raises(_CHECK):
        await _insert(one_of_each, table, row)


async def _insert(books: Books, table: str, columns: dict[str, Any]) -> None:
    names, places = ", ".join(columns), ", ".join(["%s"] * len(columns))
    await books.rows(f"INSERT INTO {table} ({names}) VALUES ({places})", *columns.values())
