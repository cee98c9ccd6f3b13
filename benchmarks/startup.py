"""How soon commands answer: `python -m benchmarks.startup`.

Interleaved, so that what else the machine does falls on all of them alike: an interpreter that does nothing is the
reference, one that imports Typer and ends is what help cannot go below; then help, and a payment shown from a database
of its own, on the server of DATABASE_URL or the embedded one.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.stage import COMMAND
from eci_pay.database import create_database, drop_database
from eci_pay.migrations import bundled_migrations, load_sample_data, migrate
from eci_pay.service import database_url
from eci_pay.settings import load_settings

DATABASE = "eci_pay_benchmark_startup"
REFERENCE = "python -c pass"
COMMANDS = {
    REFERENCE: [sys.executable, "-c", "pass"],
    "python -c 'import typer'": [sys.executable, "-c", "import typer"],
    "eci-pay --help": [COMMAND, "--help"],
    "eci-pay charge --help": [COMMAND, "charge", "--help"],
    "eci-pay show 1": [COMMAND, "show", "1"],
}


async def measure(server: str, *, rounds: int = 30) -> dict[str, dict[str, float]]:
    """The median of each command in ms, and its ratio to the reference."""
    url = await create_database(server, DATABASE)
    try:
        await migrate(url, bundled_migrations())
        await load_sample_data(url)
        took_ms = run_interleaved({**os.environ, "DATABASE_URL": url}, rounds)
    finally:
        await drop_database(server, DATABASE)
    medians = {name: median(times) for name, times in took_ms.items()}
    return {
        name: {"median_ms": round(took, 2), "ratio": round(took / medians[REFERENCE], 2)}
        for name, took in medians.items()
    }


def run_interleaved(environment: Mapping[str, str], rounds: int) -> dict[str, list[float]]:
    """How many ms each command takes, each time. The first round does not count: it fills the caches."""
    took_ms: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for number in range(rounds + 1):
        for name, command in COMMANDS.items():
            begun = time.perf_counter()
            subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
            if number:
                took_ms[name].append((time.perf_counter() - begun) * 1000)
    return took_ms


def report(result: dict[str, Any]) -> None:
    """The medians as a table."""
    print(f"{'':28}{'ms':>8}{'ratio':>8}")
    for name, figures in result.items():
        print(f"{name:28}{figures['median_ms']:8.1f}{figures['ratio']:8.2f}")


async def _measure_by_itself(rounds: int) -> dict[str, dict[str, float]]:
    return await measure(await database_url(load_settings()), rounds=rounds)


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    result = asyncio.run(_measure_by_itself(arguments.rounds))
    report(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
