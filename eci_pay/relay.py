"""The relay: delivers the messages of the outbox, beside any number of other relays.

Each destination has a lane of its own, so that one that is down or slow costs the others nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from eci_pay.lanes import Lane, Tally
from eci_pay.messages import Destination
from eci_pay.outbox import Outbox
from eci_pay.peers import Peer, connected_peers
from eci_pay.settings import Settings


class Relay:
    """The lanes of one process."""

    def __init__(self, outbox: Outbox, peers: Mapping[Destination, Peer], settings: Settings) -> None:
        self._lanes = {destination: Lane(outbox, peer, settings) for destination, peer in peers.items()}

    async def run_until(self, stopped: asyncio.Event) -> None:
        """Delivers until it is stopped; then it ends the tries that are under way and books them."""
        running = [asyncio.create_task(lane.run()) for lane in self._lanes.values()]
        await stopped.wait()
        self.stop()
        await asyncio.gather(*running)

    def stop(self) -> None:
        """Lets every lane end soon."""
        for lane in self._lanes.values():
            lane.stop()

    async def drain(self) -> dict[Destination, Tally]:
        """Delivers all that is due, and ends; raises Unavailable where the database cannot be reached."""
        lanes = self._lanes.values()
        for ended in await asyncio.gather(*(lane.run(until_empty=True) for lane in lanes), return_exceptions=True):
            if isinstance(ended, BaseException):
                raise ended
        return {destination: lane.tally for destination, lane in self._lanes.items()}


@asynccontextmanager
async def connected_relay(settings: Settings, outbox: Outbox) -> AsyncIterator[Relay]:
    """A relay to the services that are configured."""
    async with connected_peers(settings) as peers:
        yield Relay(outbox, peers, settings)
