"""Settings: the environment, validated once into one frozen object."""

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from eci_pay.errors import SettingsInvalid
from eci_pay.logs import LogFormat

_DRIVER_SCHEME = "postgresql+psycopg://"


def _database_url(secret: SecretStr) -> SecretStr:
    """A connection string of libpq, a URL as a rule; SQLAlchemy's spelling of the same is accepted too."""
    url = secret.get_secret_value()
    if url.startswith(_DRIVER_SCHEME):
        url = "postgresql://" + url.removeprefix(_DRIVER_SCHEME)
    try:
        conninfo_to_dict(url)
    except ProgrammingError:
        # libpq's own words would repeat the string, password and all.
        raise ValueError("must be a connection string such as postgresql://user@host:5432/name") from None
    return SecretStr(url)


def _service_url(text: str) -> str:
    """The base URL of a service, without its trailing slash."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and "@" not in parts.netloc
    except ValueError:  # brackets that do not match, a port that is no number
        usable = False
    if not usable or not text.isascii() or not text.isprintable() or any(character in text for character in " ?#"):
        # The text itself is not repeated: a password may stand in it.
        raise ValueError("must be a base URL such as http://orders:8080, without user, query or fragment")
    return text.rstrip("/")


def _origins(text: object) -> object:
    """Origins as browsers send them: `*` would let every page in the world call."""
    if not isinstance(text, str):
        return text
    origins = tuple(part.strip() for part in text.split(","))
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ValueError("must be origins such as https://shop.example, in lower case, separated by commas")
    return origins


def _content_of_file(path: object) -> SecretStr:
    """A secret that is kept in a file, as orchestrators mount them."""
    try:
        content = Path(str(path)).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ValueError(f"the file cannot be read: {reason}") from None
    if not content:
        raise ValueError("the file is empty")
    return SecretStr(content)


def _printable(secret: SecretStr) -> SecretStr:
    """A secret that goes into a header."""
    if not secret.get_secret_value().isascii() or not secret.get_secret_value().isprintable():
        raise ValueError("must be printable ASCII")
    return secret


_ORIGIN = re.compile(r"https?://[a-z0-9](?:[a-z0-9.-]*[a-z0-9])?(?::(?!0)[0-9]{1,5})?")

SECONDS_MAX = 86_400.0

Seconds = Annotated[float, Field(gt=0, le=SECONDS_MAX)]
SecondsOrZero = Annotated[float, Field(ge=0, le=SECONDS_MAX)]
Secret = Annotated[SecretStr, AfterValidator(_printable)]
SecretFile = Annotated[SecretStr, BeforeValidator(_content_of_file), AfterValidator(_printable)]
ServiceUrl = Annotated[str, AfterValidator(_service_url)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_origins)]
LogLevel = Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]


class Settings(BaseSettings):
    """Everything that the environment decides. Field names are the variables' names in lower case."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    database_url: Annotated[SecretStr, AfterValidator(_database_url)] | None = None
    """Where the books are; unset means the embedded PostgreSQL."""
    log_level: Annotated[LogLevel, BeforeValidator(lambda value: str(value).upper())] = "INFO"
    eci_pay_log_format: LogFormat = "auto"
    """`auto` means lines for people on a terminal, JSON elsewhere."""
    service_name: str = "payment-service"

    order_service_url: ServiceUrl | None = None
    """Who is told of payments; a service whose URL is unset is told nothing."""
    inventory_service_url: ServiceUrl | None = None
    notification_service_url: ServiceUrl | None = None

    eci_pay_data_dir: Path | None = None
    """Where the embedded PostgreSQL keeps its data; unset means the user's data directory."""
    eci_pay_gateway: Literal["simulated", "stripe"] = "simulated"

    eci_pay_stripe_api_base: ServiceUrl = "https://api.stripe.com"
    eci_pay_stripe_secret_key: Secret | None = None
    eci_pay_stripe_secret_key_file: SecretFile | None = None
    """The name of a file that holds it; this is what it holds."""
    eci_pay_stripe_webhook_secret: Secret | None = None
    """Signs the events that Stripe sends; without it they are refused."""
    eci_pay_stripe_webhook_secret_file: SecretFile | None = None
    """As above."""

    eci_pay_database_pool_size: int = Field(default=10, ge=1, le=200)
    """Connections of one process."""
    eci_pay_database_pool_timeout_seconds: Seconds = 5.0
    """The longest wait for a free connection, and for a new one to be made."""
    eci_pay_database_queue_max: int = Field(default=1000, ge=1)
    """The most requests of one process that wait for a connection; the next is refused at once."""
    eci_pay_prepare_statements: bool = True
    """Whether statements are prepared; older PgBouncers cannot carry them in transaction mode."""
    eci_pay_lock_timeout_seconds: SecondsOrZero = 5.0
    """The longest wait for a row lock; 0 sends no such option (a pooler may refuse it) and leaves it to the role."""
    eci_pay_statement_timeout_seconds: SecondsOrZero = 30.0
    """The longest a statement may run; 0 as above."""
    eci_pay_service_role: str | None = None
    """The role to which `migrate` grants what the service needs; unset, it grants nothing."""

    eci_pay_group_commit_lanes: int = Field(default=2, ge=1, le=16)
    """How many batches of a kind one process writes at a time: of charges that begin, of charges that settle..."""
    eci_pay_group_commit_batch_max: int = Field(default=64, ge=1, le=1000)
    """The most rows of a batch."""
    eci_pay_group_commit_queue_max: int = Field(default=2000, ge=1)
    """The most requests of a kind that wait for a batch; the next is refused."""
    eci_pay_group_commit_wait_seconds: Seconds = 5.0
    """How long a request waits for a batch before it is refused."""

    eci_pay_send_deadline_seconds: Seconds = 30.0
    """After begin, how late a request may still be sent to the gateway."""
    eci_pay_gateway_timeout_seconds: Seconds = 30.0
    """How long the gateway's answer is waited for; then the outcome is unknown."""
    eci_pay_gateway_concurrency: int = Field(default=256, ge=1, le=10_000)
    """Charges and refunds of one process that are between their begin and the gateway's answer."""
    eci_pay_gateway_wait_seconds: Seconds = 5.0
    """How long a charge or refund waits to be one of them; then it is refused, and nothing is recorded."""
    eci_pay_gateway_queue_max: int = Field(default=1000, ge=0)
    """How many wait; the next is refused at once."""
    eci_pay_settle_retry_seconds: Seconds = 10.0
    """How long settle is tried again while the database is away; then the caller is told 202."""

    eci_pay_recovery_interval_seconds: Seconds = 2.0
    """How often `serve` looks for outcomes that are unknown."""
    eci_pay_recovery_first_look_seconds: Seconds = 5.0
    """How long something may be PROCESSING before the gateway is asked what became of it."""
    eci_pay_recovery_look_max_seconds: Seconds = 300.0
    """The longest distance between two looks; it doubles each time."""
    eci_pay_recovery_grace_seconds: Seconds = 150.0
    """How long the gateway's not having heard of a request means nothing: it may still be on its way."""
    eci_pay_recovery_watch_seconds: Annotated[float, Field(gt=0, le=30 * SECONDS_MAX)] = 3600.0
    """For how long what was booked as never happened is looked at again, in case the gateway acts late."""
    eci_pay_recovery_alert_seconds: Annotated[float, Field(gt=0, le=30 * SECONDS_MAX)] = 900.0
    """How long something may be unknown before the operator is told."""

    eci_pay_auth: Literal["on", "off"] | None = None
    """Whether requests need API keys; unset, `serve` asks for none on loopback, and refuses every other address."""
    eci_pay_api_key_pepper: Secret | None = None
    """Goes into the hashes of API keys, so that a copy of the table does not suffice to make one: every process that
    makes or takes keys needs the same."""
    eci_pay_api_key_pepper_file: SecretFile | None = None
    """The name of a file that holds it; this is what it holds."""
    eci_pay_api_key_remember_seconds: SecondsOrZero = 10.0
    """How long a process remembers an API key; one that is revoked may be taken for as long."""

    eci_pay_caller_requests_per_second: Annotated[float, Field(ge=0, le=1_000_000)] = 1000.0
    """How many requests one process takes of one caller, by the name of its API key; 0 is no limit. Where access is not
    controlled, callers cannot be told apart."""

    eci_pay_body_max_bytes: int = Field(default=65_536, ge=1024)
    """The largest request body."""
    eci_pay_headers_max_bytes: int = Field(default=16_384, ge=1024, le=1_048_576)
    """The largest head of a request: its first line and its headers."""
    eci_pay_read_timeout_seconds: Seconds = 10.0
    """How long a request's head, and then its body, may take to arrive, and how long an answer may lie unread."""
    eci_pay_keep_alive_seconds: int = Field(default=75, ge=1, le=3600)
    """How long a connection is kept without a request: longer than a proxy in front keeps it, or requests get lost."""
    eci_pay_connections_max: int = Field(default=2500, ge=1, le=100_000)
    """The most connections of clients to one process; requests on the next are refused."""
    eci_pay_requests_max: int = Field(default=2000, ge=1, le=100_000)
    """The most requests of one process that are in progress; the next is refused, and nothing is recorded."""
    eci_pay_cors_origins: Origins = ()
    """From which pages browsers may call, separated by commas; none unless it is set."""
    eci_pay_shutdown_timeout_seconds: int = Field(default=30, ge=1)
    """How long a stopping server waits for the requests that have begun."""
    eci_pay_expire_keys_interval_seconds: Seconds = 3600.0
    """How often `serve` deletes expired idempotency keys."""

    eci_pay_relay_in_serve: bool = True
    """Whether `serve` delivers messages itself; else `eci-pay relay` must run."""
    eci_pay_relay_concurrency: int = Field(default=16, ge=1, le=256)
    """Requests of one process that are under way to one service."""
    eci_pay_relay_messages_per_second_max: int = Field(default=1000, ge=1, le=1_000_000)
    """How fast one process drains a backlog to one service: neither that service nor our charges should suffer."""
    eci_pay_relay_poll_seconds: Annotated[float, Field(gt=0, le=60)] = 0.5
    """How often an idle relay looks for new messages."""
    eci_pay_relay_timeout_seconds: Annotated[float, Field(gt=0, le=60)] = 5.0
    """How long one try of a delivery may take, and at most how long the next one is waited for."""
    eci_pay_relay_retry_seconds: Seconds = 5.0
    """When a delivery that failed is repeated first; the distance doubles each time."""
    eci_pay_relay_retry_max_seconds: Seconds = 3600.0
    """The longest that distance gets."""
    eci_pay_relay_give_up_hours: Annotated[float, Field(gt=0, le=24 * 365)] = 72.0
    """How long after its first delivery failed a message is dead."""
    eci_pay_outbox_retention_days: Annotated[float, Field(gt=0, le=3650)] = 7.0
    """How long delivered messages are kept."""
    eci_pay_outbox_purge_interval_seconds: Seconds = 60.0
    """How often `serve` and `relay` delete those that are older."""

    eci_pay_simulated_latency_seconds: SecondsOrZero = 0.0
    """How long the simulated gateway takes to answer."""
    eci_pay_simulated_slow_seconds: SecondsOrZero = 2.0
    """How long it takes for the amount that is slow, and before it gives up on those that time out."""

    @model_validator(mode="after")
    def _grace_outlasts_every_request(self) -> "Settings":
        on_its_way = self.eci_pay_send_deadline_seconds + self.eci_pay_gateway_timeout_seconds
        if self.eci_pay_recovery_grace_seconds <= max(2 * self.eci_pay_send_deadline_seconds, on_its_way):
            raise ValueError(
                "ECI_PAY_RECOVERY_GRACE_SECONDS: must be more than twice ECI_PAY_SEND_DEADLINE_SECONDS, and more than "
                "that and ECI_PAY_GATEWAY_TIMEOUT_SECONDS together"
            )
        return self

    @model_validator(mode="after")
    def _secrets_are_given_once(self) -> "Settings":
        for name in ("eci_pay_api_key_pepper", "eci_pay_stripe_secret_key", "eci_pay_stripe_webhook_secret"):
            if getattr(self, name) is not None and getattr(self, f"{name}_file") is not None:
                raise ValueError(f"{name.upper()}: is given, and so is {name.upper()}_FILE")
        return self

    @model_validator(mode="after")
    def _stripe_has_its_secrets(self) -> "Settings":
        if self.eci_pay_gateway == "stripe" and self.stripe_secret_key is None:
            raise ValueError("ECI_PAY_STRIPE_SECRET_KEY: ECI_PAY_GATEWAY=stripe needs it, or ..._FILE")
        return self

    @property
    def stripe_secret_key(self) -> SecretStr | None:
        """From the environment or the file."""
        return self.eci_pay_stripe_secret_key or self.eci_pay_stripe_secret_key_file

    @property
    def stripe_webhook_secret(self) -> SecretStr | None:
        """From the environment or the file."""
        return self.eci_pay_stripe_webhook_secret or self.eci_pay_stripe_webhook_secret_file

    @property
    def api_key_pepper(self) -> str:
        """From the environment or the file; empty where there is none."""
        pepper = self.eci_pay_api_key_pepper or self.eci_pay_api_key_pepper_file
        return pepper.get_secret_value() if pepper else ""

    def embedded_data_dir(self) -> Path:
        """The directory of the embedded PostgreSQL.

        Root keeps it under /var/lib, because the embedded server's set-up makes every parent folder of its
        data readable for everyone, which must not happen to a home folder.
        """
        if self.eci_pay_data_dir is not None:
            return self.eci_pay_data_dir
        if sys.platform != "win32" and os.geteuid() == 0:
            return Path("/var/lib/eci-pay")
        import platformdirs

        return platformdirs.user_data_path("eci-pay", appauthor=False)


def load_settings() -> Settings:
    """The settings of this process; raises SettingsInvalid with one line per fault."""
    if os.environ.get("DATABASE_URL") == "":
        # A secret that did not arrive must not end in a private embedded ledger.
        raise SettingsInvalid(("DATABASE_URL: is set but empty: unset it to use the embedded PostgreSQL",))
    try:
        return Settings()
    except ValidationError as error:
        faults = tuple(
            ": ".join([*(str(name).upper() for name in fault["loc"][:1]), _words(fault["msg"])])
            for fault in error.errors(include_input=False, include_url=False)
        )
        raise SettingsInvalid(faults) from None


def _words(message: str) -> str:
    return message.removeprefix("Value error, ").replace("Input should be", "must be")
