"""The audit trail is append-only, by whatever way it is tried to change it."""

import psycopg
import pytest

from tests.support import Books

AS_REPLICA = "SET session_replication_role = replica; "
WITH_CASCADE = """
    ALTER TABLE transactions DROP CONSTRAINT transactions_payment_id_fkey;
    ALTER TABLE transactions ADD FOREIGN KEY (payment_id) REFERENCES payments ON {action};
"""

CHANGES = {
    "update": "UPDATE transactions SET status = 'FAILED'",
    "update of no row": "UPDATE transactions SET status = 'FAILED' WHERE false",
    "delete": "DELETE FROM transactions",
    "truncate": "TRUNCATE transactions",
    "truncate of payments, cascading": "TRUNCATE payments CASCADE",
    "update in a WITH": "WITH changed AS (UPDATE transactions SET amount = 1 RETURNING 1) SELECT count(*) FROM changed",
    "upsert": """
        INSERT INTO transactions (transaction_log_id, payment_id, transaction_type, amount, status)
        OVERRIDING SYSTEM VALUE
        SELECT transaction_log_id, payment_id, 'PAYMENT', 1, 'FAILED' FROM transactions
        ON CONFLICT (transaction_log_id) DO UPDATE SET status = EXCLUDED.status
    """,
    "merge that updates": """
        MERGE INTO transactions t USING payments p ON t.payment_id = p.payment_id
        WHEN MATCHED THEN UPDATE SET amount = 1
    """,
    "merge that deletes": """
        MERGE INTO transactions t USING payments p ON t.payment_id = p.payment_id WHEN MATCHED THEN DELETE
    """,
    "change through a view": "CREATE VIEW v AS SELECT * FROM transactions; UPDATE v SET amount = 1",
    "cascading delete": WITH_CASCADE.format(action="DELETE CASCADE") + "DELETE FROM payments",
    "cascading null": """
        ALTER TABLE transactions ALTER COLUMN payment_id DROP NOT NULL;
    """
    + WITH_CASCADE.format(action="DELETE SET NULL")
    + "DELETE FROM payments",
}

NEEDS_POSTGRES_15 = ("merge that updates", "merge that deletes")
AS_REPLICA_TOO = [way for way in CHANGES if not way.startswith("cascading")]
"""A replica session runs no cascades; what it can do instead is tested by itself."""


@pytest.fixture
async def trail(books: Books) -> Books:
    """A payment with two audit rows."""
    payment_id = await books.value(
        "INSERT INTO payments (order_id, user_id, amount, payment_method, status, transaction_id)"
        " VALUES (1, 7, 100, 'UPI', 'COMPLETED', 'TXN1') RETURNING payment_id"
    )
    for status in ("PROCESSING", "COMPLETED"):
        await books.rows(
            "INSERT INTO transactions (payment_id, transaction_type, amount, status) VALUES (%s, 'PAYMENT', 100, %s)",
            payment_id,
            status,
        )
    return books


@pytest.mark.parametrize(
    ("way", "prelude"), [*((way, "") for way in CHANGES), *((way, AS_REPLICA) for way in AS_REPLICA_TOO)]
)
async def test_no_statement_changes_the_trail(trail: Books, way: str, prelude: str) -> None:
    if way in NEEDS_POSTGRES_15 and trail.connection.info.server_version < 150000:
        pytest.skip("MERGE came with PostgreSQL 15")
    before = await _rows(trail)
    with pytest.raises(psycopg.errors.RestrictViolation, match="append-only"):
        await trail.rows(prelude + CHANGES[way])
    assert await _rows(trail) == before


async def test_a_payment_with_a_history_cannot_be_deleted(trail: Books) -> None:
    before = await _rows(trail)
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        await trail.rows("DELETE FROM payments")
    with pytest.raises(psycopg.errors.FeatureNotSupported, match="transactions"):
        await trail.rows("TRUNCATE payments")
    assert await _rows(trail) == before
    assert await trail.value("SELECT count(*) FROM payments") == 1


async def test_a_replica_session_that_deletes_a_payment_leaves_its_history(trail: Books) -> None:
    before = await _rows(trail)
    await trail.rows(WITH_CASCADE.format(action="DELETE CASCADE"))
    await trail.rows(AS_REPLICA + "DELETE FROM payments")
    assert await _rows(trail) == before


async def test_the_trail_is_appended_to_as_before(trail: Books) -> None:
    await trail.rows(
        "INSERT INTO transactions (payment_id, transaction_type, amount, status)"
        " SELECT payment_id, 'REFUND', 100, 'PROCESSING' FROM payments"
    )
    assert await trail.value("SELECT count(*) FROM transactions") == 3


async def _rows(books: Books) -> list[dict[str, object]]:
    return await books.rows("SELECT * FROM transactions ORDER BY transaction_log_id")
