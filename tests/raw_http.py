"""HTTP by hand, for what no client would send."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT_SECONDS = 30
HOST = b"Host: payments\r\n"


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


@dataclass
class RawClient:
    """A connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        """Sends all of it, as far as the server takes it."""
        self.writer.write(data)
        with suppress(ConnectionError):
            await self.writer.drain()

    async def answer(self, *, to_head: bool = False) -> RawAnswer:
        """The next one."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            head = await self.reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode("latin-1").rstrip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            size = 0 if to_head else int(headers.get("content-length", 0))
            return RawAnswer(int(first.split()[1]), headers, await self.reader.readexactly(size))

    async def is_closed(self) -> bool:
        """Waits for the server to end the connection; whether it said nothing more before."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            try:
                return await self.reader.read(1) == b""
            except ConnectionError:
                return True


@asynccontextmanager
async def connected(api: httpx.AsyncClient) -> AsyncIterator[RawClient]:
    """A connection to the server of a client."""
    reader, writer = await asyncio.open_connection(api.base_url.host, api.base_url.port, limit=2**20)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


async def answer_to(api: httpx.AsyncClient, data: bytes) -> RawAnswer:
    """What a connection of its own is answered."""
    async with connected(api) as client:
        await client.send(data)
        return await client.answer()


def charging(body: bytes, *headers: bytes, key: bytes = b"k") -> bytes:
    """A charge, whose body's length is announced."""
    return b"".join(
        [
            b"POST /v1/payments/charge HTTP/1.1\r\n",
            HOST,
            *(header + b"\r\n" for header in headers),
            b"Content-Type: application/json\r\nIdempotency-Key: " + key,
            b"\r\nContent-Length: %d\r\n\r\n" % len(body),
            body,
        ]
    )
