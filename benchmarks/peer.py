"""A peer that takes every message as fast as it can: `python -m benchmarks.peer PORT...`.

It knows no more of HTTP than the relay sends, so that what is measured is the relay. SIGTERM ends it; then it prints
how many requests it took, and how many different Idempotency-Keys they had.
"""

import asyncio
import signal
import sys
from typing import cast

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


class Peer(asyncio.Protocol):
    """One connection."""

    requests = 0
    keys: set[bytes] = set()  # noqa: RUF012 - of the whole process

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remembers where to answer."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        self._buffer = b""

    def data_received(self, data: bytes) -> None:
        """Answers every request that has arrived whole."""
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            whole = end + 4 + int(_header(head, b"content-length"))
            if len(self._buffer) < whole:
                return
            self._buffer = self._buffer[whole:]
            Peer.requests += 1
            Peer.keys.add(_header(head, b"idempotency-key"))
            self._transport.write(ANSWER)


def _header(head: bytes, name: bytes) -> bytes:
    return head.split(b"\r\n" + name + b":", 1)[1].split(b"\r\n", 1)[0].strip()


async def serve(ports: list[int]) -> None:
    """Serves until SIGTERM."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopped.set)
    servers = [await loop.create_server(Peer, "127.0.0.1", port) for port in ports]
    print("ready", flush=True)
    await stopped.wait()
    for server in servers:
        server.close()
    print(Peer.requests, len(Peer.keys), flush=True)


if __name__ == "__main__":
    import uvloop

    uvloop.run(serve([int(port) for port in sys.argv[1:]]))
