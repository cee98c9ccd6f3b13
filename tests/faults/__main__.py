"""Storms, one after another: `python -m tests.faults --seeds 20 --seconds 30`.

Prints a line per seed and the sum; exits with 1 where a book disagrees, and keeps that storm's history.
"""

import argparse
import asyncio
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

from tests.faults.mortal import POINTS
from tests.faults.storm import Figures, Storm

VIOLATIONS_SHOWN_MAX = 20


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description="Storms; see tests/faults/storm.py")
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long each rages")
    parser.add_argument("--points", action="store_true", help="instead, let replicas die once at every point")
    return parser.parse_args()


async def main(chosen: argparse.Namespace) -> int:
    """Runs them; returns how many violations there were."""
    all_figures = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        directory = Path(tempfile.mkdtemp(prefix=f"eci-storm-{seed}-"))
        figures = await Storm(seed, directory, points=shuffled(seed) if chosen.points else None).run(chosen.seconds)
        print_line(figures)
        if figures.violations:
            print(*figures.violations[:VIOLATIONS_SHOWN_MAX], sep="\n")
            print(f"seed {seed}: the history and the replicas' log are in {directory}")
        all_figures.append(figures)
    print_sum(all_figures)
    return sum(len(figures.violations) for figures in all_figures)


def shuffled(seed: int) -> tuple[str, ...]:
    """Every point once, in an order of the seed."""
    points = list(POINTS)
    random.Random(seed).shuffle(points)
    return tuple(points)


def print_line(figures: Figures) -> None:
    """What one storm came to."""
    print(
        f"seed {figures.seed}: {figures.operations} operations, {figures.orders} orders, {figures.charged} charges and "
        f"{figures.refunded} refunds at the gateway, {figures.kills} kills, "
        f"{figures.disturbances.total()} disturbances, {figures.cuts} cuts, "
        f"settled in {figures.settle_seconds:.1f} s, {len(figures.violations)} violations",
        flush=True,
    )


def print_sum(all_figures: list[Figures]) -> None:
    """What all of them came to."""
    names = ("statuses", "deaths", "disturbances", "gateway_faults", "recovered")
    sums: dict[str, Counter[object]] = {name: Counter() for name in names}
    for figures in all_figures:
        for name in names:
            sums[name].update(getattr(figures, name))
    print(f"{len(all_figures)} seeds:")
    for what in ("operations", "orders", "charged", "refunded", "kills", "cuts"):
        print(f"  {what}: {sum(getattr(figures, what) for figures in all_figures)}")
    for name, counts in sums.items():
        print(f"  {name}: " + ", ".join(f"{key}: {number}" for key, number in counts.most_common()))
    print(f"  violations: {sum(len(figures.violations) for figures in all_figures)}")


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(main(options())) else 0)
