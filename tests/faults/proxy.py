"""A TCP proxy that breaks connections: it cuts, refuses, delays and stalls them, whatever they carry."""

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

HOST = "127.0.0.1"
CHUNK_BYTES = 65536
PORTS = range(20000, 32000)
"""Below the ports that Linux gives to clients: while a server is down, none of its clients is given its port."""

_NO_LINGER = struct.pack("ii", 1, 0)


def free_port() -> int:
    """A port to serve on that stays ours while we are down."""
    for _ in range(len(PORTS)):
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return port
    raise RuntimeError(f"no port of {PORTS} is free")


def reset(transport: asyncio.BaseTransport) -> None:
    """Ends a connection with a TCP reset; what is not sent yet is lost."""
    if isinstance(transport, asyncio.WriteTransport) and transport.get_extra_info("socket") is not None:
        with suppress(OSError):
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        transport.abort()


@dataclass(eq=False)
class _Link:
    """A client's connection and its counterpart at the target. `left` is what the client may still receive."""

    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    left: int | None
    task: asyncio.Task[None]

    def cut(self) -> None:
        reset(self.client.transport)
        reset(self.server.transport)
        self.task.cancel()


class Proxy:
    """Passes bytes on to `target`, which may be changed for connections to come."""

    def __init__(self, target_host: str, target_port: int) -> None:
        self.target = (target_host, target_port)
        self.delay_seconds = 0.0
        """How long every chunk is held, in each direction."""
        self.cuts = 0
        """How many connections were cut, by `cut` or `cut_after_bytes`."""
        self.port = 0
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._next_may_receive: int | None = None
        self._server: asyncio.Server | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        """Serves on `port`, which stays the same."""
        self.port = free_port()
        await self._open()
        try:
            yield self
        finally:
            self._shut()
            for link in list(self._links):
                link.cut()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._links)

    def cut(self) -> None:
        """Resets every open connection, on both sides."""
        for link in list(self._links):
            self.cuts += 1
            self._links.discard(link)
            link.cut()

    def cut_after_bytes(self, number: int) -> None:
        """Resets the next connection once its client has so many bytes of the answer; 0 loses all of it."""
        self._next_may_receive = number

    def stall(self) -> None:
        """Moves no byte until `resume`; connections stay open, and new ones are accepted."""
        self._flowing.clear()

    def resume(self) -> None:
        """Moves bytes again, those first that were held."""
        self._flowing.set()

    @asynccontextmanager
    async def refusing(self) -> AsyncIterator[None]:
        """Refuses new connections while inside; those that are open stay so."""
        self._shut()
        try:
            yield
        finally:
            await self._open()

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, self.port, backlog=1024)

    def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Connects through and passes on, in a task of its own that `cut` can cancel."""
        task = asyncio.create_task(self._pass_on(from_client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _pass_on(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        may_receive, self._next_may_receive = self._next_may_receive, None
        try:
            from_server, to_server = await asyncio.open_connection(*self.target)
        except (OSError, asyncio.CancelledError):
            reset(to_client.transport)
            return
        task = asyncio.current_task()
        assert task is not None
        link = _Link(to_client, to_server, may_receive, task)
        self._links.add(link)
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._ask(from_client, link))
                directions.create_task(self._answer(from_server, link))
        except* OSError:
            reset(to_client.transport)
            reset(to_server.transport)
        finally:
            self._links.discard(link)
            to_client.close()
            to_server.close()

    async def _ask(self, client: asyncio.StreamReader, link: _Link) -> None:
        while chunk := await client.read(CHUNK_BYTES):
            await self._hold()
            link.server.write(chunk)
            await link.server.drain()
        await self._end(link.server)

    async def _answer(self, server: asyncio.StreamReader, link: _Link) -> None:
        while chunk := await server.read(CHUNK_BYTES):
            await self._hold()
            if link.left is None:
                link.client.write(chunk)
                await link.client.drain()
                continue
            link.client.write(chunk[: link.left])
            await link.client.drain()
            link.left -= min(link.left, len(chunk))
            if not link.left:
                self.cuts += 1
                raise ConnectionResetError("cut after so many bytes")
        await self._end(link.client)

    async def _end(self, writer: asyncio.StreamWriter) -> None:
        """Tells the other side that nothing more comes; it may still send."""
        await self._hold()
        if writer.can_write_eof():
            writer.write_eof()

    async def _hold(self) -> None:
        """Waits as long as a chunk is to be held."""
        if self.delay_seconds:
            await asyncio.sleep(self.delay_seconds)
        await self._flowing.wait()
