"""Whether a worker's memory grows with the charges that it has served: `make bench BENCH=memory`."""

import argparse
import asyncio
from typing import Any

import psutil

from benchmarks.stage import Stage, Template, free_port, wait_for
from eci_pay.embedded import embedded_url
from eci_pay.settings import load_settings

CONNECTIONS = 128
SLICE_SECONDS = 20
MEGABYTE = 1_000_000


async def measure(server: str, charges: int) -> list[dict[str, Any]]:
    """The resident memory of one worker that relays too, after each slice of so many charges."""
    told: list[dict[str, Any]] = []
    async with Template(server) as template, template.copy() as url:
        stage, port, charged = Stage(url), free_port(), 0
        with stage.peer(), stage.running("serve", "--port", str(port), ECI_PAY_RELAY_IN_SERVE="true") as process:
            wait_for(port)
            while charged < charges:
                slice_ = stage.wrk(
                    f"http://127.0.0.1:{port}",
                    "charge.lua",
                    seconds=SLICE_SECONDS,
                    connections=CONNECTIONS,
                    FIRST_ORDER_ID=str(charged + len(told) * CONNECTIONS),
                )
                charged += slice_["requests"]
                resident = psutil.Process(process.pid).memory_info().rss // MEGABYTE
                told.append({"charges": charged, "megabytes": resident, "errors": slice_["errors"]})
                print(told[-1], flush=True)
    return told


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--charges", type=int, default=1_000_000)
    arguments = parser.parse_args()
    asyncio.run(measure(embedded_url(load_settings().embedded_data_dir()), arguments.charges))


if __name__ == "__main__":
    main()
