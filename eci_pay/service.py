"""The composition root: one PaymentService per process, built once from the settings."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from eci_pay.access import ApiKeys
from eci_pay.book_checks import BookChecks
from eci_pay.charge_records import ChargeBegin, ChargeSettlement, begin_charges, record_pending, settle_charges
from eci_pay.charge_settling import ChargeSettling
from eci_pay.charges import Charges
from eci_pay.database import Database
from eci_pay.embedded import embedded_url
from eci_pay.gateway_calls import GatewayCalls, Limits
from eci_pay.gateway_events import GatewayEvents
from eci_pay.gateways import Gateway
from eci_pay.gateways.configured import configured_gateway
from eci_pay.group_commit import Aside, GroupCommit, Result, Row, Write
from eci_pay.idempotency import KeyExpiry
from eci_pay.looks import Looks, Schedule
from eci_pay.messages import Destination, Messages, service_urls
from eci_pay.migrations import bundled_migrations, check_schema, migrate
from eci_pay.outbox import Outbox
from eci_pay.payments import Payments, read_payments
from eci_pay.phases import Phases
from eci_pay.reconciliation import Reconciliation
from eci_pay.recovery import Recovery
from eci_pay.refund_records import RefundBegin, RefundSettlement, begin_refunds, settle_refunds
from eci_pay.refund_settling import RefundSettling
from eci_pay.refunds import Refunds
from eci_pay.settings import Settings
from eci_pay.settlement_export import SettlementExport
from eci_pay.status_changes import StatusChanges
from eci_pay.totals import Totals

if TYPE_CHECKING:
    from eci_pay.bulk import Bulk
    from eci_pay.stats import Stats

Clock = Callable[[], datetime]

_log = logging.getLogger(__name__)


def system_clock() -> datetime:
    """Now, in UTC."""
    return datetime.now(UTC)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaymentService:
    """The use cases, by resource, over one pool and one gateway."""

    charges: Charges
    refunds: Refunds
    status_changes: StatusChanges
    payments: Payments
    keys: KeyExpiry
    messages: Messages
    outbox: Outbox
    recovery: Recovery
    reconciliation: Reconciliation
    totals: Totals
    api_keys: ApiKeys
    gateway_events: GatewayEvents
    settlements: SettlementExport
    groups: "_Groups"
    database: Database
    clock: Clock

    @property
    def bulk(self) -> "Bulk":
        """Files of refunds and charges."""
        from eci_pay.bulk import Bulk

        return Bulk(database=self.database, charges=self.charges, refunds=self.refunds, clock=self.clock)

    def measure(self) -> None:
        """Notes what this process's instruments are told only now and then."""
        self.database.measure()
        self.groups.measure()

    @property
    def stats(self) -> "Stats":
        """What became of the payments of late."""
        from eci_pay.stats import Stats

        return Stats(database=self.database, outbox=self.outbox, recovery=self.recovery, clock=self.clock)

    async def check_ready(self) -> None:
        """Raises Unavailable where the database does not answer, or takes no writes."""
        await self.database.ping()

    async def warn_of_untold(self) -> None:
        """Logs which services other processes tell of payments while this one does not; raises Unavailable."""
        unset = set(Destination) - self.messages.destinations
        told = await self.outbox.lately_told() if unset else frozenset()
        for destination in sorted(unset & told):
            _log.warning(
                "%s_SERVICE_URL is not set here, though others tell that service of payments: "
                "it is told nothing of what this process changes",
                destination.upper(),
            )


async def open_database(settings: Settings) -> str:
    """The URL of the books, with a schema that this release can work on.

    The embedded database is migrated here, because nobody else does; a database of the operator's is only checked.
    Raises Unavailable, SchemaOutdated among it, and MigrationError.
    """
    url = await database_url(settings)
    migrations = bundled_migrations()
    if settings.database_url is None:
        await migrate(url, migrations)
    for newer in await check_schema(url, migrations):
        _log.warning("%s: the schema is newer than this release", newer)
    return url


async def database_url(settings: Settings) -> str:
    """DATABASE_URL, or the URL of the embedded server, which is started."""
    if settings.database_url is not None:
        return settings.database_url.get_secret_value()
    return await asyncio.to_thread(embedded_url, settings.embedded_data_dir())


@asynccontextmanager
async def payment_service(
    settings: Settings, url: str, *, gateway: Gateway | None = None, clock: Clock = system_clock
) -> AsyncIterator[PaymentService]:
    """The service over the database at `url`; at its end, it waits for what has begun."""
    database = Database(url, settings)
    groups = _Groups(settings)
    payments = Payments(database, groups.new("read", partial(read_payments, database)))
    calls = GatewayCalls(gateway or configured_gateway(settings), Limits.of(settings), clock)
    phases = Phases(database=database, settle_retry_seconds=settings.eci_pay_settle_retry_seconds)
    messages = Messages(frozenset(service_urls(settings)))
    outbox = Outbox(
        database,
        give_up_after=timedelta(hours=settings.eci_pay_relay_give_up_hours),
        retention=timedelta(days=settings.eci_pay_outbox_retention_days),
    )
    charge_settling = ChargeSettling(
        database=database,
        settle_charge=groups.new(
            "charge_settle", partial(settle_charges, database), claims=_payment_of, has_begun=True
        ),
        payments=payments,
        phases=phases,
        messages=messages,
        clock=clock,
    )
    refund_settling = RefundSettling(
        database=database,
        settle_refund=groups.new(
            "refund_settle", partial(settle_refunds, database), claims=_payment_of, has_begun=True
        ),
        payments=payments,
        phases=phases,
        messages=messages,
        clock=clock,
    )
    schedule = Schedule.of(settings)
    looks = Looks(gateway=calls, charges=charge_settling, refunds=refund_settling, schedule=schedule)
    recovery = Recovery(database=database, looks=looks, clock=clock, schedule=schedule)
    await database.open()
    try:
        yield PaymentService(
            charges=Charges(
                database=database,
                begin_charge=groups.new("charge_begin", partial(begin_charges, database), claims=ChargeBegin.claims),
                record_pending=groups.new("charge_cash", partial(record_pending, database), claims=ChargeBegin.claims),
                record_created=groups.new("create", partial(record_pending, database), claims=ChargeBegin.claims),
                gateway=calls,
                payments=payments,
                phases=phases,
                settling=charge_settling,
                recovery=recovery,
                clock=clock,
            ),
            refunds=Refunds(
                database=database,
                begin_refund=groups.new("refund_begin", partial(begin_refunds, database), claims=RefundBegin.claims),
                gateway=calls,
                payments=payments,
                phases=phases,
                settling=refund_settling,
                recovery=recovery,
                clock=clock,
            ),
            status_changes=StatusChanges(database=database, messages=messages, recovery=recovery, clock=clock),
            payments=payments,
            keys=KeyExpiry(database, clock),
            messages=messages,
            outbox=outbox,
            recovery=recovery,
            reconciliation=Reconciliation(
                database=database,
                checks=BookChecks(database=database, clock=clock),
                looks=looks,
                outbox=outbox,
                schedule=schedule,
                clock=clock,
            ),
            totals=Totals(database=database),
            api_keys=ApiKeys(
                database,
                pepper=settings.api_key_pepper,
                remember_seconds=settings.eci_pay_api_key_remember_seconds,
                clock=clock,
            ),
            gateway_events=GatewayEvents(
                database=database,
                gateway=calls,
                charges=charge_settling,
                refunds=refund_settling,
                payments=payments,
            ),
            groups=groups,
            settlements=SettlementExport(database=database, gateway=calls, gateway_name=settings.eci_pay_gateway),
            database=database,
            clock=clock,
        )
    finally:
        await phases.drain()
        await recovery.drain()
        await calls.close()
        await database.close()


class _Groups:
    """Makes what coalesces requests, one for each kind, and measures them all."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._aside = Aside(settings.eci_pay_database_pool_size)
        self._made: list[GroupCommit[Any, Any]] = []

    def new(
        self,
        kind: str,
        write: Write[Row, Result],
        *,
        claims: Callable[[Row], tuple[Hashable, ...]] = lambda _: (),
        has_begun: bool = False,
    ) -> GroupCommit[Row, Result]:
        """Of what has begun none is refused: the gateway was asked."""
        settings = self._settings
        group = GroupCommit(
            write,
            kind=kind,
            lanes=settings.eci_pay_group_commit_lanes,
            batch_max=settings.eci_pay_group_commit_batch_max,
            aside=self._aside,
            claims=claims,
            queue_max=None if has_begun else settings.eci_pay_group_commit_queue_max,
            wait_seconds=None if has_begun else settings.eci_pay_group_commit_wait_seconds,
        )
        self._made.append(group)
        return group

    def measure(self) -> None:
        """Notes how many wait."""
        for group in self._made:
            group.measure()


def _payment_of(settlement: ChargeSettlement | RefundSettlement) -> tuple[Hashable, ...]:
    return (settlement.payment_id,)
