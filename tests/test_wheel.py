"""The built wheel, installed outside the checkout, does the main job."""

import asyncio
import shutil
import sys
import venv
from pathlib import Path

import psycopg_pool
import pytest

from tests.support import CommandLine

CHECKOUT = Path(__file__).parent.parent
TIMEOUT_SECONDS = 300


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What a release is built from: the checkout without its tests and leftovers."""
    copy = tmp_path / "source"
    shutil.copytree(CHECKOUT, copy, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "tests", "__pycache__"))
    return copy


async def run(*arguments: str | Path, environment: dict[str, str], directory: Path) -> str:
    process = await asyncio.create_subprocess_exec(
        *arguments,
        cwd=directory,
        env=environment,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(TIMEOUT_SECONDS):
        printed, _ = await process.communicate()
    assert process.returncode == 0, printed.decode()
    return printed.decode()


async def test_the_wheel_serves_a_charge_from_outside_the_checkout(
    command_line: CommandLine, source: Path, tmp_path: Path
) -> None:
    environment = command_line.full_environment()
    pip = (sys.executable, "-m", "pip", "--quiet")
    built = tmp_path / "built"
    await run(
        *pip,
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        built,
        source,
        environment=environment,
        directory=built.parent,
    )
    home = tmp_path / "venv"
    venv.create(home)
    (wheel,) = [built / name for name in await asyncio.to_thread(lambda: [file.name for file in built.iterdir()])]
    await run(
        *pip,
        "--python",
        home / "bin" / "python",
        "install",
        "--no-deps",
        wheel,
        environment=environment,
        directory=tmp_path,
    )
    # The dependencies are those of this environment, which holds the package itself only as a link that
    # PYTHONPATH does not follow.
    environment["PYTHONPATH"] = str(Path(psycopg_pool.__file__).parent.parent)
    environment["PATH"] = f"{home / 'bin'}:{environment['PATH']}"
    where = await run(
        "python",
        "-c",
        "import eci_pay, cli, server.docs; server.docs.html(); print(eci_pay.__file__)",
        environment=environment,
        directory=tmp_path,
    )
    assert where.startswith(str(home))
    script = CHECKOUT / "sample_requests" / "through_server.sh"
    printed = await run(script, "charge_payment.sh", environment=environment, directory=tmp_path)
    assert "PASS  the payment is completed" in printed
