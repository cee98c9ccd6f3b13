"""The relay: delivers the messages of the outbox, beside any number of other relays.

Each destination has a lane of its own, so that one that is down or slow costs the others nothing.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from eci_pay.lanes import Lane, Tally
from eci_pay.messages import Destination
from eci_pay.outbox import Outbox
from eci_pay.peers import Peer, connected_peers
from eci_pay.settings import Settings

RESTART_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Relay:
    """The lanes of one process."""

    def __init__(self, outbox: Outbox, peers: Mapping[Destination, Peer], settings: Settings) -> None:
        self._outbox = outbox
        self._peers = peers
        self._settings = settings
        self._running: set[Lane] = set()
        self._stopped = asyncio.Event()

    async def run_until(self, stopped: asyncio.Event) -> None:
        """Delivers until it is stopped; then it ends the tries that are under way and books them."""
        running = [asyncio.create_task(self._serve(peer)) for peer in self._peers.values()]
        await stopped.wait()
        self.stop()
        await asyncio.gather(*running)

    def stop(self) -> None:
        """Lets every lane end soon."""
        self._stopped.set()
        for lane in self._running:
            lane.stop()

    async def drain(self) -> dict[Destination, Tally]:
        """Delivers all that is due, and ends; raises Unavailable where the database cannot be reached."""
        ended = await asyncio.gather(
            *(self._run(peer, until_empty=True) for peer in self._peers.values()), return_exceptions=True
        )
        for tally in ended:
            if isinstance(tally, BaseException):
                raise tally
        return dict(zip(self._peers, [tally for tally in ended if isinstance(tally, Tally)], strict=True))

    async def _serve(self, peer: Peer) -> None:
        """Runs a lane, and another one should it fail: a peer must not be forgotten because of a defect of ours."""
        while not self._stopped.is_set():
            try:
                await self._run(peer)
            except Exception:
                _log.exception("the lane to %s failed and begins anew", peer.destination)
                with suppress(TimeoutError):
                    async with asyncio.timeout(RESTART_SECONDS):
                        await self._stopped.wait()

    async def _run(self, peer: Peer, *, until_empty: bool = False) -> Tally:
        lane = Lane(self._outbox, peer, self._settings)
        self._running.add(lane)
        try:
            await lane.run(until_empty=until_empty)
        finally:
            self._running.discard(lane)
        return lane.tally


@asynccontextmanager
async def connected_relay(settings: Settings, outbox: Outbox) -> AsyncIterator[Relay]:
    """A relay to the services that are configured."""
    async with connected_peers(settings) as peers:
        yield Relay(outbox, peers, settings)
