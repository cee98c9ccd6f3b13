"""The Order, Inventory and Notification services as tests see them: real HTTP servers that can be made to misbehave.

They count for themselves what came twice, what was worked on twice at the same time, and what came out of order.
"""

import asyncio
import itertools
import json
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from eci_pay.messages import Destination

HANG_SECONDS = 60.0


@dataclass
class Taken:
    """A request that a peer was sent. `ended` and `status` are missing where it never answered."""

    destination: Destination
    method: str
    path: str
    headers: dict[str, str]
    body: Any
    started: float
    ended: float | None = None
    status: int | None = None

    @property
    def message_id(self) -> int:
        """Which message it was."""
        return int(self.headers["idempotency-key"])


@dataclass(frozen=True)
class Reply:
    """How a request is answered."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: str = "{}"
    after_seconds: float = 0.0


RESET = Reply(status=-1)
"""No answer: the connection is reset."""
HANG = Reply(status=-2)
"""No answer: the connection stays open."""

Behaviour = Callable[[Taken], Reply]


def well(_: Taken) -> Reply:
    """Everything is taken."""
    return Reply()


@dataclass
class Peers:
    """The three services. `behaviour` of a destination decides each of its answers."""

    behaviour: dict[Destination, Behaviour] = field(default_factory=lambda: dict.fromkeys(Destination, well))
    taken: list[Taken] = field(default_factory=list)
    urls: dict[Destination, str] = field(default_factory=dict)
    _servers: dict[Destination, asyncio.Server] = field(default_factory=dict)
    _open: dict[Destination, set[asyncio.StreamWriter]] = field(default_factory=lambda: defaultdict(set))

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Peers"]:
        """Serves all three, on ports that stay theirs."""
        for destination in Destination:
            await self.start(destination)
        yield self
        for destination in Destination:
            await self.shut(destination)

    async def start(self, destination: Destination) -> None:
        """Serves a destination, after `shut` again on the same port."""
        port = int(self.urls[destination].rsplit(":", 1)[1]) if destination in self.urls else 0

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._open[destination].add(writer)
            with suppress(OSError, asyncio.IncompleteReadError):
                while await self._answer(destination, reader, writer):
                    pass
            self._open[destination].discard(writer)
            writer.close()

        self._servers[destination] = await asyncio.start_server(serve, "127.0.0.1", port)
        self.urls[destination] = f"http://127.0.0.1:{self._servers[destination].sockets[0].getsockname()[1]}"

    async def shut(self, destination: Destination) -> None:
        """Refuses connections from now on, and cuts those that are open."""
        self._servers[destination].close()
        for writer in self._open[destination]:
            writer.transport.abort()
        self._open[destination].clear()

    def environment(self) -> dict[str, str]:
        """The variables that name them."""
        return {f"{destination.upper()}_SERVICE_URL": url for destination, url in self.urls.items()}

    def settings(self) -> dict[str, str]:
        """The same as fields of the settings."""
        return {name.lower(): url for name, url in self.environment().items()}

    def accepted(self, destination: Destination | None = None) -> list[Taken]:
        """What was answered with 2xx, in the order of the answers."""
        found = [one for one in self.taken if one.status is not None and 200 <= one.status < 300]
        found = [one for one in found if destination in (None, one.destination)]
        return sorted(found, key=lambda one: one.ended or 0.0)

    def tries(self, message_id: int) -> list[Taken]:
        """Every request with a message."""
        return [one for one in self.taken if one.message_id == message_id]

    def repeated(self) -> dict[int, int]:
        """How often messages were accepted that were accepted more than once."""
        times = Counter(one.message_id for one in self.accepted())
        return {message_id: count for message_id, count in times.items() if count > 1}

    def worked_on_at_once(self) -> list[int]:
        """The messages of which two requests overlapped in time."""
        by_message: dict[int, list[Taken]] = defaultdict(list)
        for one in self.taken:
            by_message[one.message_id].append(one)
        return [
            message_id
            for message_id, requests in by_message.items()
            for first, second in itertools.pairwise(requests)
            if first.ended is None or second.started < first.ended
        ]

    async def _answer(
        self, destination: Destination, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Answers one request; tells whether the connection stays open."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        headers = {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers.get("content-length", "0"))) or "null")
        one = Taken(destination, method, path, headers, body, started=time.monotonic())
        self.taken.append(one)
        reply = self.behaviour[destination](one)
        if reply.after_seconds:
            await asyncio.sleep(reply.after_seconds)
        if reply is HANG:
            await asyncio.wait_for(reader.read(1), HANG_SECONDS)
            return False
        if reply is RESET:
            writer.transport.abort()
            return False
        content = reply.body.encode()
        lines = [f"HTTP/1.1 {reply.status} Because", f"Content-Length: {len(content)}"]
        lines += [f"{name}: {value}" for name, value in reply.headers.items()]
        one.status, one.ended = reply.status, time.monotonic()
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        await writer.drain()
        return True
