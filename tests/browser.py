"""A headless Chromium, driven over its DevTools protocol."""

import asyncio
import base64
import contextlib
import itertools
import json
import re
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from websockets.asyncio.client import ClientConnection, connect

CHROMIUM = shutil.which("chromium")
TIMEOUT_SECONDS = 60
MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""A screenshot is one message."""


@dataclass
class Page:
    """A tab. `complaints` are what its console calls errors and what the browser has refused."""

    connection: ClientConnection
    complaints: list[str] = field(default_factory=list)
    _answers: dict[int, asyncio.Future[dict[str, Any]]] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    async def listen(self) -> None:
        """Takes what the browser sends, until it is gone."""
        async for message in self.connection:
            told = json.loads(message)
            match told:
                case {"id": number}:
                    self._answers.pop(number).set_result(told)
                case {"method": "Runtime.exceptionThrown"} | {
                    "method": "Audits.issueAdded",
                    "params": {"issue": {"code": "ContentSecurityPolicyIssue"}},
                }:
                    self.complaints.append(json.dumps(told["params"]))
                case {"method": "Log.entryAdded", "params": {"entry": {"level": "error" | "warning"}}}:
                    self.complaints.append(json.dumps(told["params"]))
                case {"method": "Runtime.consoleAPICalled", "params": {"type": "error" | "warning"}}:
                    self.complaints.append(json.dumps(told["params"]))

    async def call(self, method: str, **params: object) -> dict[str, Any]:
        """Calls a method of the protocol."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self.connection.send(json.dumps({"id": number, "method": method, "params": params}))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            answer = await self._answers[number]
        assert "error" not in answer, answer
        return dict(answer["result"])

    async def open(self, url: str) -> None:
        """Goes to an address, listening to all that it complains of."""
        for domain in ("Page", "Runtime", "Log", "Audits"):
            await self.call(f"{domain}.enable")
        await self.call("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """The value of an expression in the page; of a promise, what it comes to."""
        answer = await self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def wait_for(self, script: str) -> Any:
        """Waits until an expression is true, and returns it."""
        async with asyncio.timeout(TIMEOUT_SECONDS):
            while not (value := await self.run(script)):  # noqa: ASYNC110 - the page has no event for it
                await asyncio.sleep(0.05)
        return value

    async def resize(self, width: int, height: int) -> None:
        """Makes the window as large as this."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    async def screenshot(self, path: Path) -> None:
        """Writes what is seen to a PNG."""
        answer = await self.call("Page.captureScreenshot")
        await asyncio.to_thread(path.write_bytes, base64.b64decode(answer["data"]))


@asynccontextmanager
async def browsing(profile: Path) -> AsyncIterator[Page]:
    """An empty tab of a browser of its own, whose profile is in a new directory."""
    assert CHROMIUM is not None
    process = await asyncio.create_subprocess_exec(
        CHROMIUM,
        *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"),
        *("--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"),
        stderr=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    try:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            port = await _port_of(process)
        async with httpx.AsyncClient() as client:
            tabs = (await client.get(f"http://127.0.0.1:{port}/json/list")).json()
        address = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
        async with connect(address, max_size=MESSAGE_BYTES_MAX) as connection:
            page = Page(connection)
            listening = asyncio.create_task(page.listen())
            yield page
        await listening
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.communicate()


async def _port_of(process: asyncio.subprocess.Process) -> int:
    assert process.stderr is not None
    async for line in process.stderr:
        if found := re.search(rb"DevTools listening on ws://127\.0\.0\.1:(\d+)/", line):
            return int(found[1])
    raise AssertionError("the browser did not start")
