"""What the role that serves may do: declared here, granted by `migrate`, examined by `doctor`.

Migrations run as the owner of the tables. Whoever serves needs none of that: it cannot change the schema, nor the audit
trail beyond appending to it.
"""

from dataclasses import dataclass

import psycopg
from psycopg import sql

from eci_pay.database import Connection, Params, fetch, first_line
from eci_pay.errors import MigrationError

NEEDED = {
    "api_keys": "SELECT, INSERT, UPDATE",
    "bulk_runs": "SELECT, INSERT, UPDATE",
    "idempotency_keys": "SELECT, INSERT, UPDATE, DELETE",
    "outbox": "SELECT, INSERT, UPDATE, DELETE",
    "payments": "SELECT, INSERT, UPDATE",
    "reconciliation_runs": "SELECT, INSERT, UPDATE",
    "recoveries": "SELECT, INSERT, UPDATE",
    "refunds": "SELECT, INSERT, UPDATE",
    "schema_migrations": "SELECT",
    "settlement_lines_pending": "SELECT, INSERT, UPDATE",
    "settlements_awaited": "SELECT, INSERT, UPDATE",
    "total_changes": "SELECT, INSERT, DELETE",
    "totals": "SELECT, INSERT, UPDATE",
    "transactions": "SELECT, INSERT",
    "transactions_transaction_log_id_seq": "USAGE",
}
"""All that some statement of ours needs: of the service and of every command but `migrate`. While the release before
still serves, it needs what it needed: a privilege is dropped one release after the last statement that needs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rights:
    """What a role may do on one object (a table, a sequence, the schema, the database), held against what it needs.

    `name` is quoted as SQL wants it; `is_public` tells of a table that PUBLIC may do something with.
    """

    kind: str
    name: str
    is_public: bool
    needed: str | None
    lacking: str | None
    excess: str | None


async def rights_of(connection: Connection, role: str) -> list[Rights]:
    """Where the role may do less or more than it needs."""
    return [Rights(**row) for row in await fetch(connection, "privileges", {**_declared(), "role": role})]


async def why_unbound(connection: Connection, role: str) -> str | None:
    """Why privileges do not bind the role, as a phrase about it; None where they do."""
    (found,) = await fetch(connection, "role", {"relations": list(NEEDED), "role": role})
    if found["is_superuser"]:
        return "is a superuser, or may act as one"
    if found["is_owner"]:
        return "owns the tables, or may act as the role that does"
    if found["makes_roles"]:
        return "may make roles, and so may act as others"
    # PostgreSQL's manual on predefined roles: with these a superuser's rights can be had.
    return "may replicate, or use the server's files and programs" if found["passes_by"] else None


async def check_bound(connection: Connection, role: str) -> None:
    """Raises MigrationError for a role that does not exist, and for one that privileges do not bind."""
    rows = await fetch(connection, "role", {"relations": list(NEEDED), "role": role})
    if not rows:
        raise MigrationError(
            f'there is no role "{role}": the administrator has to make it first, with CREATE ROLE ... LOGIN'
        )
    reason = await why_unbound(connection, role)
    if reason is None and rows[0]["may_act_as_us"]:
        reason = "may act as the role that migrates"
    if reason is not None:
        raise MigrationError(f'"{role}" {reason}: serve as a role of which privileges tell what it may do')


async def changes_for(connection: Connection, role: str) -> list[sql.Composed]:
    """The statements that give the role what it needs, and take from it what is too much; none where nothing is to be
    done. PUBLIC keeps nothing of a table; of the schema and the database, only what the role may have."""
    changes = []
    for rights in await rights_of(connection, role):
        is_table = rights.kind in ("TABLE", "SEQUENCE")
        taken, given = ("ALL", rights.needed) if is_table else (rights.excess, rights.lacking)
        names = {"object": sql.SQL(f"{rights.kind} {rights.name}"), "role": sql.Identifier(role)}
        if taken:
            changes.append(sql.SQL(f"REVOKE {taken} ON {{object}} FROM PUBLIC, {{role}}").format(**names))
        if given:
            changes.append(sql.SQL(f"GRANT {given} ON {{object}} TO {{role}}").format(**names))
    return changes


async def grant(connection: Connection, role: str) -> None:
    """Gives the role exactly what it needs. Raises MigrationError where some of that is not ours to give or to take."""
    async with connection.transaction():
        for change in await changes_for(connection, role):
            try:
                async with connection.transaction():
                    await connection.execute(change)
            except psycopg.errors.InsufficientPrivilege as error:
                reason = f"{first_line(error)}: somebody who may do that has to"
                raise MigrationError(f"{change.as_string()}: {reason}") from error
        for left in await rights_of(connection, role):
            what = f"still lacks {left.lacking}" if left.lacking else f"still may {left.excess or 'act as everybody'}"
            reason = "that is somebody else's to give and to take, or comes with another role"
            raise MigrationError(f'"{role}" {what} on {left.kind} {left.name}: {reason}')


def quoted(role: str) -> str:
    """Its name as SQL wants it."""
    return sql.Identifier(role).as_string()


def _declared() -> Params:
    return {"relations": list(NEEDED), "privileges": list(NEEDED.values())}
