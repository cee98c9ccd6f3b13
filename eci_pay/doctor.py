"""Examines what this service needs and talks to, without changing anything and without moving money: each check by
itself, what is wrong and how to mend it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Set
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

import aiohttp

from eci_pay import privileges
from eci_pay.access import ApiKey
from eci_pay.database import Connection, connect, connection_info, fetch
from eci_pay.errors import PayError, SettingsInvalid
from eci_pay.gateways.configured import configured_gateway
from eci_pay.gateways.simulated import SimulatedGateway
from eci_pay.messages import Destination, service_urls
from eci_pay.migrations import bundled_migrations, migration_states
from eci_pay.privileges import Rights, quoted
from eci_pay.recovery import Summary
from eci_pay.service import PaymentService, database_url, payment_service, system_clock
from eci_pay.settings import Settings

PROBE_SECONDS_MAX = 2.0
"""How long a peer or the gateway may take to answer."""
DATABASE_SECONDS_MAX = 8.0
"""How long all checks of the database may take, its connections included."""
MAJOR_VERSIONS = range(14, 19)
SKEW_WARNING_SECONDS, SKEW_FAULT_SECONDS = 1.0, 60.0
EXPIRED_KEYS_MAX = 1000
"""How many keys may have outlived two intervals of their deletion."""
PENDING_SECONDS_MAX = 3600.0
"""How old a message may be before it should have been delivered."""

KEY_ENDS_SOON = timedelta(days=7)

_REACH = "see that PostgreSQL runs and that DATABASE_URL names its host, port, database, user and password"


class Verdict(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check has found, and where it is not well, how to mend it."""

    check: str
    verdict: Verdict
    message: str
    remedy: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """All findings, in the order of the checks. `database_reached` is None where that was not tried."""

    findings: tuple[Finding, ...]
    database_reached: bool | None = None

    @property
    def has_fault(self) -> bool:
        """Whether something has to be mended."""
        return any(finding.verdict is Verdict.FAULT for finding in self.findings)


def of_invalid_settings(error: SettingsInvalid) -> Diagnosis:
    """What is known where the settings are wrong: nothing else can be examined."""
    remedy = "correct the environment; the README has a table of settings"
    findings = tuple(_fault("settings", fault, remedy) for fault in error.faults)
    return Diagnosis(findings=findings)


async def diagnose(settings: Settings, clock: Callable[[], datetime] = system_clock) -> Diagnosis:
    """Runs all checks, at the same time where they have nothing to do with each other."""
    database = _DatabaseChecks(settings, clock)
    groups: list[Coroutine[Any, Any, list[Finding]]] = [
        database.run(),
        *(_peer(destination, url) for destination, url in service_urls(settings).items()),
        _gateway(settings),
    ]
    of_groups = await asyncio.gather(*groups)
    findings = (_ok("settings", "all are valid"), *(finding for found in of_groups for finding in found))
    return Diagnosis(findings=findings, database_reached=database.reached)


class _DatabaseChecks:
    """The checks of the database, one after another."""

    def __init__(self, settings: Settings, clock: Callable[[], datetime]) -> None:
        self._settings = settings
        self._clock = clock
        self.reached = False

    async def run(self) -> list[Finding]:
        """What was found until the end, or until the database let us down."""
        found: list[Finding] = []
        try:
            async with asyncio.timeout(DATABASE_SECONDS_MAX):
                async for finding in self._findings():
                    found.append(finding)
        except TimeoutError:
            found.append(_fault("database", f"it did not answer within {DATABASE_SECONDS_MAX:g} s", _REACH))
        except PayError as error:
            found.append(_fault("database", str(error), None if self.reached else _REACH))
        return found

    async def _findings(self) -> AsyncIterator[Finding]:
        url = await database_url(self._settings)
        async with await connect(connection_info(url, self._settings)) as connection:
            self.reached = True
            for finding in await self._of_session(connection):
                yield finding
        schema = [finding async for finding in _schema(url)]
        for finding in schema:
            yield finding
        if any(finding.verdict is Verdict.FAULT for finding in schema):
            return
        # Nothing is asked of a gateway here.
        nobody = SimulatedGateway(latency_seconds=0, slow_seconds=0)
        async with payment_service(self._settings, url, gateway=nobody, clock=self._clock) as service:
            for finding in await self._backlog(service):
                yield finding

    async def _of_session(self, connection: Connection) -> list[Finding]:
        asked_at = self._clock()
        (server,) = await fetch(connection, "doctor_server")
        answered_at = self._clock()
        role = server["role"]
        rights = await privileges.rights_of(connection, role)
        unbound = await privileges.why_unbound(connection, role)
        has_pooler = server["backend_pid"] != connection.info.backend_pid
        return [
            _version(server["major"], server["version"]),
            _clock_skew(asked_at, server["now"], answered_at),
            *_rights(role, rights, server["is_read_only"]),
            *([] if self._settings.database_url is None else _powers(role, rights, unbound)),
            *_durability(server["has_fsync"], server["has_synchronous_commit"]),
            _prepared(has_pooler, self._settings.eci_pay_prepare_statements),
        ]

    async def _backlog(self, service: PaymentService) -> list[Finding]:
        interval = timedelta(seconds=self._settings.eci_pay_expire_keys_interval_seconds)
        overdue_keys = {"before": self._clock() - 2 * interval, "count_max": EXPIRED_KEYS_MAX + 1}
        [keys], stats, outcomes, told, api_keys = await asyncio.gather(
            service.database.read("doctor_keys", overdue_keys),
            service.outbox.stats(),
            service.recovery.summary(),
            service.outbox.lately_told(),
            service.api_keys.list(),
        )
        return [
            *_access(self._settings.eci_pay_auth, api_keys, self._clock()),
            _keys(keys["expired"]),
            *_messages(sum(each.dead for each in stats), max(each.oldest_pending_seconds or 0 for each in stats)),
            _outcomes(outcomes),
            *_unset_peers(set(Destination) - service.messages.destinations, told),
        ]


def _version(major: int, version: str) -> Finding:
    supported = f"{MAJOR_VERSIONS.start} to {MAJOR_VERSIONS.stop - 1}"
    if major < MAJOR_VERSIONS.start:
        return _fault("database", f"PostgreSQL {version} is too old", f"use PostgreSQL {supported}")
    if major not in MAJOR_VERSIONS:
        return _warning("database", f"nobody has tried PostgreSQL {version}", f"use PostgreSQL {supported}")
    return _ok("database", f"PostgreSQL {version}")


async def _schema(url: str) -> AsyncIterator[Finding]:
    states = await migration_states(url, bundled_migrations())
    missing = [state.name for state in states if state.applied_at is None]
    if missing:
        yield _fault("schema", f"it lacks {', '.join(missing)}", "run `eci-pay migrate` as the tables' owner")
    for state in states:
        if state.fault and state.is_unknown:
            yield _warning("schema", state.fault, "run the newer release")
        elif state.fault:
            yield _fault("schema", state.fault, "restore that file as it was, or the database from a backup")
    if not missing and not any(state.fault for state in states):
        yield _ok("schema", f"at version {states[-1].version}")


def _clock_skew(asked_at: datetime, told: datetime, answered_at: datetime) -> Finding:
    """The time that the question and its answer took leaves open so much."""
    apart = max(asked_at - told, told - answered_at, timedelta()).total_seconds()
    message = f"this machine's is {apart:,.1f} s {'ahead of' if asked_at > told else 'behind'} the database's"
    if apart > SKEW_FAULT_SECONDS:
        return _fault("clocks", message, "synchronize both with a time server")
    if apart > SKEW_WARNING_SECONDS:
        return _warning("clocks", message, "synchronize both with a time server")
    return _ok("clocks", "this machine and the database agree")


def _rights(role: str, rights: list[Rights], is_read_only: bool) -> Iterator[Finding]:
    lacking = [each for each in rights if each.lacking]
    if is_read_only:
        yield _fault("rights", "the database takes no writes: a standby, or read-only", "connect to the primary")
    for each in lacking:
        remedy = f"GRANT {each.lacking} ON {each.kind} {each.name} TO {quoted(role)}"
        yield _fault("rights", f"{role} lacks {each.lacking} on {each.name}", remedy)
    if not lacking and not is_read_only:
        yield _ok("rights", f"{role} may do all that is needed")


def _powers(role: str, rights: list[Rights], unbound: str | None) -> Iterator[Finding]:
    """What it may do beyond that. The embedded server has one role alone, which owns it."""
    if unbound:
        remedy = "serve as a role of its own, to which `eci-pay migrate --service-role` grants what is needed"
        yield _warning("powers", f"{role} {unbound}: whoever has its password can change the audit trail", remedy)
        return
    beyond = [each for each in rights if each.excess or each.is_public]
    for each in beyond:
        remedy = f"run `eci-pay migrate --service-role {role}` as the tables' owner"
        what = f"{role} may {each.excess} on {each.name}, which nothing needs"
        yield _warning("powers", what if each.excess else f"everybody has privileges on {each.name}", remedy)
    if not beyond:
        yield _ok("powers", f"{role} may do nothing else")


def _durability(has_fsync: bool, has_synchronous_commit: bool) -> Iterator[Finding]:
    if not has_fsync:
        yield _warning("durability", "fsync is off: a crash of its machine may destroy the books", "set fsync = on")
    if not has_synchronous_commit:
        message = "synchronous_commit is off: a crash may lose the last commits, of which callers were told"
        yield _warning("durability", message, "set synchronous_commit = on")
    if has_fsync and has_synchronous_commit:
        yield _ok("durability", "a commit is on disk")


def _prepared(has_pooler: bool, prepares: bool) -> Finding:
    """A pooler invents the process id that a connection is told at its start; PostgreSQL itself tells its own."""
    if not has_pooler:
        return _ok("pooler", "none that shows")
    if not prepares:
        return _ok("pooler", "one stands between, and statements are not prepared")
    return _warning(
        "pooler",
        "one stands between, and statements are prepared, which not every pooler can carry",
        "use PgBouncer 1.21 or newer with max_prepared_statements, or set ECI_PAY_PREPARE_STATEMENTS=false",
    )


def _access(auth: str | None, keys: tuple[ApiKey, ...], now: datetime) -> Iterator[Finding]:
    if auth == "off":
        message = "nobody needs an API key (ECI_PAY_AUTH=off): whoever reaches a server may charge and refund"
        yield _warning("access", message, "set ECI_PAY_AUTH=on, and make keys with `eci-pay api-key create`")
        return
    if auth is None:
        yield _ok("access", "nobody needs an API key, and only loopback is served (ECI_PAY_AUTH is not set)")
        return
    active = [key for key in keys if key.state(now) == "active"]
    if not active:
        yield _fault("access", "requests need an API key, and there is none", "make one: `eci-pay api-key create`")
        return
    ending = {key.name for key in active if key.expires_at and key.expires_at - now < KEY_ENDS_SOON}
    lasting = {key.name for key in active if not key.expires_at or key.expires_at - now >= KEY_ENDS_SOON}
    for name in sorted(ending - lasting):
        message = f"the last API key of {name} expires within {KEY_ENDS_SOON.days} days"
        yield _warning("access", message, f"make another: `eci-pay api-key create {name}`, and hand it over")
    if ending <= lasting:
        yield _ok("access", f"{len(active):,} API {'key' if len(active) == 1 else 'keys'} may be used")


def _keys(expired: int) -> Finding:
    if expired > EXPIRED_KEYS_MAX:
        message = f"more than {EXPIRED_KEYS_MAX:,} expired keys wait to be deleted"
        return _warning("keys", message, "keep `eci-pay serve` running, or run `eci-pay expire-keys`")
    return _ok("keys", "expired keys are deleted in time")


def _messages(dead: int, oldest_seconds: float) -> Iterator[Finding]:
    if dead:
        yield _warning("messages", f"{dead:,} are dead", "`eci-pay outbox list --dead` shows them, `retry` sends them")
    if oldest_seconds > PENDING_SECONDS_MAX:
        message = f"the oldest has waited for {oldest_seconds:,.0f} s"
        yield _warning("messages", message, "see that `eci-pay serve` or `relay` runs, and its service answers")
    if not dead and oldest_seconds <= PENDING_SECONDS_MAX:
        yield _ok("messages", "none is dead or late")


def _outcomes(summary: Summary) -> Finding:
    if summary.overdue:
        message = f"{summary.overdue:,} are unknown for too long, the oldest for {summary.oldest_seconds:,.0f} s"
        return _warning("outcomes", message, "`eci-pay recover --dry-run` shows them")
    return _ok("outcomes", f"{summary.open + summary.late:,} are unknown, none for too long")


def _unset_peers(unset: Set[Destination], told: Set[Destination]) -> Iterator[Finding]:
    for destination in sorted(unset):
        check, name = f"peer {destination}", f"{destination.upper()}_SERVICE_URL"
        if destination in told:
            message = f"{name} is not set here, though others tell that service of payments"
            yield _warning(check, message, f"set {name} as `eci-pay serve` has it")
        else:
            yield _ok(check, f"is told nothing: {name} is not set")


async def _peer(destination: Destination, url: str) -> list[Finding]:
    name = f"peer {destination}"
    fault = await _unanswered(url)
    if fault is None:
        return [_ok(name, f"{url} answers")]
    return [_fault(name, f"{url}: {fault}", f"see that it runs and that {destination.upper()}_SERVICE_URL is right")]


async def _gateway(settings: Settings) -> list[Finding]:
    if settings.eci_pay_gateway == "simulated":
        return [_warning("gateway", "simulated: no money moves", "set ECI_PAY_GATEWAY=stripe where it should")]
    try:
        await configured_gateway(settings).close()
    except SettingsInvalid as error:
        return [_fault("gateway", fault, None) for fault in error.faults]
    base, key = settings.eci_pay_stripe_api_base, settings.stripe_secret_key
    found = []
    if fault := await _unanswered(base):
        found.append(_fault("gateway", f"{base}: {fault}", "see that this machine may reach it"))
    else:
        found.append(_ok("gateway", f"stripe: a key is set, and {base} answers"))
    if key is not None and "_test_" in key.get_secret_value():
        found.append(_warning("gateway", "the key is one for tests: no money moves", "set a live key where it should"))
    if settings.stripe_webhook_secret is None:
        remedy = "set ECI_PAY_STRIPE_WEBHOOK_SECRET or ..._FILE"
        found.append(_warning("gateway", "no webhook secret is set: what Stripe tells is refused", remedy))
    return found


async def _unanswered(url: str) -> str | None:
    """Why nobody answers at this URL; None where somebody does, whatever they say. No credentials are sent."""
    timeout = aiohttp.ClientTimeout(total=PROBE_SECONDS_MAX)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout, trust_env=False) as session,
            session.get(url, allow_redirects=False),
        ):
            return None
    except TimeoutError:
        return f"no answer within {PROBE_SECONDS_MAX:g} s"
    except (aiohttp.ClientError, OSError, ValueError) as error:
        return f"{type(error).__name__}: {error}"


def _ok(check: str, message: str) -> Finding:
    return Finding(check=check, verdict=Verdict.OK, message=message)


def _warning(check: str, message: str, remedy: str) -> Finding:
    return Finding(check=check, verdict=Verdict.WARNING, message=message, remedy=remedy)


def _fault(check: str, message: str, remedy: str | None) -> Finding:
    return Finding(check=check, verdict=Verdict.FAULT, message=message, remedy=remedy)
