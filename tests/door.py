"""A proxy in front of PostgreSQL, for connections that a test can break."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from psycopg.conninfo import conninfo_to_dict, make_conninfo

READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"


def _fatal(code: str, message: str) -> bytes:
    """An error of the server's protocol after which it hangs up."""
    fields = f"SFATAL\0VFATAL\0C{code}\0M{message}\0\0".encode()
    return b"E" + (len(fields) + 4).to_bytes(4, "big") + fields


CRASHED = _fatal("57P02", "terminating connection because of crash") + _fatal("08P01", "server conn crashed?")
"""What a pooler tells a client whose server has died: the server's last words, and its own."""


class Door:
    """A proxy in front of PostgreSQL that can lose answers, cut connections, and stay shut."""

    def __init__(self, database_url: str) -> None:
        self._target = conninfo_to_dict(database_url)
        self._clients: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._loses_answer_to = b""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[str]:
        """Serves; yields the URL of the database behind it."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1")
        port = self._server.sockets[0].getsockname()[1]
        place = {"host": "127.0.0.1", "port": port, "sslmode": "disable", "gssencmode": "disable"}
        yield make_conninfo("", **{**self._target, **place})
        self.shut()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def lose_answer_to(self, part: str) -> None:
        """Cuts off the next client whose statement has this part, once PostgreSQL has done it."""
        self._loses_answer_to = part.encode()

    @property
    def has_lost(self) -> bool:
        """Whether that has happened."""
        return not self._loses_answer_to

    def shut(self) -> None:
        """Lets nobody in any more, and cuts everybody off."""
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Cuts every connection off; what PostgreSQL was sent, it still does."""
        for client in self._clients:
            client.transport.abort()
        self._clients.clear()

    async def crash(self) -> None:
        """Tells every client that its server has died, and hangs up."""
        for client in self._clients:
            client.write(CRASHED)
            client.close()
            await client.wait_closed()
        self._clients.clear()

    async def _serve(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        host, port = str(self._target.get("host") or "localhost"), self._target.get("port") or 5432
        if host.startswith("/"):
            from_server, to_server = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            from_server, to_server = await asyncio.open_connection(host, int(port))
        self._clients.add(to_client)
        losing = asyncio.Event()
        for work in (self._ask(from_client, to_server, losing), self._answer(from_server, to_client, losing)):
            task = asyncio.create_task(work)
            self._tasks.add(task)

    async def _ask(self, client: asyncio.StreamReader, server: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        """Passes on what the client asks. The server's side stays open until the end: it notices nothing."""
        said = b""
        while chunk := await _read(client):
            said = said[-1000:] + chunk
            if self._loses_answer_to and self._loses_answer_to in said:
                self._loses_answer_to = b""
                losing.set()
            server.write(chunk)

    async def _answer(self, server: asyncio.StreamReader, client: asyncio.StreamWriter, losing: asyncio.Event) -> None:
        """Passes on what the server answers; what is to be lost, it waits for, and then cuts the client off."""
        heard = b""
        while chunk := await _read(server):
            if not losing.is_set():
                client.write(chunk)
                continue
            heard = heard[-len(READY_FOR_QUERY) :] + chunk
            if heard.endswith(READY_FOR_QUERY):
                client.transport.abort()


async def _read(stream: asyncio.StreamReader) -> bytes:
    try:
        return await stream.read(65536)
    except OSError:
        return b""
