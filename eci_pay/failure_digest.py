"""Tells the log of a lane's failures in few lines, however many messages fail."""

import logging
import math
import time

from eci_pay.errors import Unavailable
from eci_pay.messages import Destination
from eci_pay.outbox import Marked

LOG_INTERVAL_SECONDS = 10.0
"""How often a lane tells of failed messages at most."""
MESSAGE_IDS_MAX = 10

_log = logging.getLogger(__name__)


class FailureDigest:
    """What one lane could not deliver since it last told of it."""

    def __init__(self, destination: Destination) -> None:
        self._destination = destination
        self._failed = 0
        self._dead: list[int] = []
        self._error = ""
        self._told_at = -math.inf
        self._database_fails = False

    def add(self, marked: Marked) -> None:
        """Takes note of a delivery."""
        if marked.dead:
            self._dead.append(marked.message_id)
        elif marked.failed:
            self._failed += 1
        else:
            return
        self._error = f"the latest, message {marked.message_id}: {marked.error}"

    def tell(self, *, at_once: bool = False) -> None:
        """Logs what was noted, unless that was done lately."""
        if not (self._dead or self._failed) or (
            not at_once and time.monotonic() - self._told_at < LOG_INTERVAL_SECONDS
        ):
            return
        if self._dead:
            first = ", ".join(str(message_id) for message_id in self._dead[:MESSAGE_IDS_MAX])
            more = ", ..." if len(self._dead) > MESSAGE_IDS_MAX else ""
            _log.error(
                "%d messages to %s are dead (%s%s); %s", len(self._dead), self._destination, first, more, self._error
            )
        if self._failed:
            _log.warning(
                "%d deliveries to %s failed and will be repeated; %s", self._failed, self._destination, self._error
            )
        self._failed, self._dead, self._told_at = 0, [], time.monotonic()

    def database_failed(self, error: Exception) -> None:
        """Logs that no messages can be leased, once until that works again."""
        if self._database_fails:
            return
        self._database_fails = True
        if isinstance(error, Unavailable):
            _log.warning("messages to %s wait: %s", self._destination, error)
        else:
            _log.error("messages to %s cannot be leased", self._destination, exc_info=error)

    def database_worked(self) -> None:
        """Logs that messages can be leased again."""
        if self._database_fails:
            _log.info("messages to %s are delivered again", self._destination)
        self._database_fails = False
