"""The container image: linted, its steps run here without an engine, and what they make run as in a container."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import fasteners
import httpx
import psutil
import pytest

from tests.conftest import SHARED_DIR
from tests.dockerfile import DOCKERFILE, ROOT, Image, build, stages
from tests.door import Door
from tests.support import until
from tests.test_serving import SLOW_AMOUNT, SLOW_SECONDS, begun_over_http, charge

TIMEOUT_SECONDS = 15
SOON_SECONDS = 3
TERMINATED = 128 + signal.SIGTERM
ENTER = (
    "mount -t tmpfs tmpfs /tmp && mount -o remount,bind,ro / &&"
    ' exec setpriv --reuid="$1" --regid="$1" --clear-groups --bounding-set=-all --no-new-privs -- "${@:2}"'
)
"""What becomes of a process that an engine starts in a container of the image, read-only but for /tmp."""


@pytest.fixture(scope="module")
def image(testrun_uid: str) -> Iterator[Image]:
    """The image, built once for all workers, where other users may look; the last who uses it removes it."""
    root = Path("/var/tmp") / f"eci-pay-image-{testrun_uid}"
    used = root / f"used-by-{os.getpid()}"
    SHARED_DIR.mkdir(parents=True, exist_ok=True)
    lock = fasteners.InterProcessLock(SHARED_DIR / "image.lock")
    with lock:
        if not root.exists():
            root.mkdir()
            root.chmod(0o755)
            try:
                build(root)
            except BaseException:
                shutil.rmtree(root)
                raise
        used.touch()
    yield Image(root, stages()[-1])
    with lock:
        used.unlink()
        if not list(root.glob("used-by-*")):
            shutil.rmtree(root)


@pytest.fixture(scope="module")
def isolation() -> tuple[str, ...]:
    """How to become the first process of a container; skips where this machine does not allow it."""
    command = ("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc")
    if shutil.which(command[0]) is None:
        pytest.skip("there is no unshare, of util-linux, to make a namespace with")
    tried = subprocess.run([*command, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"nobody may make namespaces here: {tried.stderr}")
    user = stages()[-1].one("USER").partition(":")[0]
    return (*command, "bash", "-c", ENTER, "enter", user)


@pytest.fixture
def free_port() -> int:
    """A port on which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


@asynccontextmanager
async def running(
    image: Image, *arguments: str, prefix: tuple[str, ...] = (), **environment: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Runs it with the image's environment; kills what is left of it in the end."""
    process = await asyncio.create_subprocess_exec(
        *prefix,
        *arguments,
        cwd=image.root,
        env={**image.environment, **environment},
    )
    try:
        yield process
    finally:
        # To become another user lets --kill-child be forgotten.
        with suppress(psutil.NoSuchProcess):
            for inside in psutil.Process(process.pid).children(recursive=True):
                inside.kill()
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def healthy(image: Image, port: int) -> bool:
    """Whether the image's own health check says so, in an environment with a proxy, which answers nobody."""
    command = image.health_check(port=port)
    async with running(image, *command, http_proxy="http://127.0.0.1:1") as check, asyncio.timeout(TIMEOUT_SECONDS):
        return await check.wait() == 0


async def stop(process: asyncio.subprocess.Process) -> None:
    """SIGTERM to the first process of the container, which is a child of what has made it."""
    (inside,) = psutil.Process(process.pid).children()
    inside.send_signal(signal.SIGTERM)


def test_hadolint_has_nothing_to_say() -> None:
    command = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([command, "--no-color", DOCKERFILE], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_build_is_sent_what_it_copies_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    copied = {source for copy in stages()[0].all("COPY") for source in copy.split()[:-1]}
    assert patterns[0] == "*"
    assert {pattern[1:] for pattern in patterns if pattern.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_a_container_needs_neither_root_nor_a_shell_nor_what_built_it() -> None:
    final = stages()[-1]
    assert final.all("RUN") == []
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", final.one("USER"))
    for name in ("ENTRYPOINT", "CMD"):
        assert final.one(name).startswith("[")
    assert " CMD [" in final.one("HEALTHCHECK")


def test_a_release_is_told_by_labels() -> None:
    final = stages()[-1]
    labels = dict(re.findall(r'(\S+)="([^"]*)"', final.one("LABEL")))
    arguments = {text.partition("=")[0] for text in final.all("ARG")}
    for label in ("version", "revision", "created"):
        assert labels[f"org.opencontainers.image.{label}"] == f"${{{label.upper()}}}"
        assert label.upper() in arguments


def test_the_image_has_the_very_versions_that_are_tested() -> None:
    assert pinned("requirements.txt") <= pinned("constraints.txt")


def test_the_image_has_all_that_it_needs_and_no_tools_to_build_or_install(image: Image) -> None:
    python = image.root / "opt" / "eci-pay" / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python)]
    checked = subprocess.run([*command, "check"], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    listed = subprocess.run([*command, "list", "--format=freeze"], check=True, capture_output=True, text=True).stdout
    installed = {line.partition("==")[0] for line in listed.splitlines()}
    assert {"eci-pay", "stripe"} <= installed
    assert not installed & {"pip", "setuptools", "wheel", "pytest"}


async def test_a_container_is_healthy_while_it_serves(image: Image, door: Door, free_port: int) -> None:
    assert not await healthy(image, free_port)
    async with (
        door.opened() as url,
        running(image, *image.started_by(port=free_port), DATABASE_URL=url, ECI_PAY_AUTH="off"),
    ):
        await until(lambda: healthy(image, free_port))


async def test_a_container_that_is_stopped_finishes_the_charge_that_has_begun(
    image: Image, isolation: tuple[str, ...], door: Door, free_port: int
) -> None:
    arguments = image.started_by(port=free_port)
    slow = {"ECI_PAY_SIMULATED_SLOW_SECONDS": str(SLOW_SECONDS), "ECI_PAY_AUTH": "off"}
    async with (
        door.opened() as url,
        running(image, *arguments, prefix=isolation, DATABASE_URL=url, **slow) as container,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port}", timeout=TIMEOUT_SECONDS) as client,
    ):
        await until(lambda: healthy(image, free_port))
        charging = asyncio.create_task(charge(client, amount=SLOW_AMOUNT))
        await begun_over_http(client)
        await stop(container)
        assert (await charging).status_code == 201
        async with asyncio.timeout(TIMEOUT_SECONDS):
            assert await container.wait() == 0


async def test_several_workers_measure_together_on_a_root_file_system_that_is_read_only(
    image: Image, isolation: tuple[str, ...], door: Door, free_port: int
) -> None:
    arguments = [*image.started_by(port=free_port), "--workers", "2"]
    async with (
        door.opened() as url,
        running(image, *arguments, prefix=isolation, DATABASE_URL=url, ECI_PAY_AUTH="off"),
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{free_port}", timeout=TIMEOUT_SECONDS) as client,
    ):
        await until(lambda: healthy(image, free_port))
        assert (await charge(client)).status_code == 201

        async def measured() -> bool:
            """One worker has charged, and every one tells of it."""
            scraped = [(await client.get("/metrics")).text for _ in range(5)]
            return all('route="/v1/payments/charge"' in text for text in scraped)

        await until(measured)


async def test_a_migration_that_waits_is_stopped_at_once(
    image: Image, isolation: tuple[str, ...], free_port: int
) -> None:
    asked = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.set()
        await reader.read()
        writer.close()

    silent = await asyncio.start_server(say_nothing, "127.0.0.1", free_port)
    url = f"postgresql://nobody@127.0.0.1:{free_port}/payments"
    arguments = image.started_by("migrate", port=free_port)
    async with silent, running(image, *arguments, prefix=isolation, DATABASE_URL=url) as container:
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await asked.wait()
        await stop(container)
        async with asyncio.timeout(SOON_SECONDS):
            assert await container.wait() == TERMINATED


def pinned(file: str) -> set[str]:
    """The packages of a file of requirements, with versions and hashes, wherever they are wanted."""
    found = re.split(r"\n(?=\S)", (ROOT / file).read_text(encoding="utf-8"))
    return {re.sub(r" ;[^\\]*|\s", "", requirement) for requirement in found}
