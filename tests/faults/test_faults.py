"""Short storms: replicas die at every named point, and everything around them fails; the three books agree."""

from pathlib import Path

from tests.faults.__main__ import shuffled
from tests.faults.mortal import POINTS
from tests.faults.storm import Storm

SECONDS = 12.0
OFTEN_PASSED = {
    "before charge_begin",
    "after charge_begin",
    "before gateway.charge",
    "after gateway.charge",
    "before charge_settle",
    "after charge_settle",
    "before the answer",
}
"""Points that every replica passes that lives long enough."""


async def test_the_books_agree_whatever_point_a_replica_dies_at(tmp_path: Path) -> None:
    storm = Storm(1, tmp_path, points=shuffled(1))
    figures = await storm.run(seconds=0)
    assert figures.violations == [], f"seed {figures.seed}: see {tmp_path}/history.json and replicas.log"
    assert figures.kills == len(POINTS)
    assert set(figures.deaths) >= OFTEN_PASSED
    assert figures.charged > 0
    assert figures.refunded > 0


async def test_the_books_agree_after_a_storm(tmp_path: Path) -> None:
    figures = await Storm(2, tmp_path).run(SECONDS)
    assert figures.violations == [], f"seed {figures.seed}: see {tmp_path}/history.json and replicas.log"
    assert figures.kills > 0
    assert figures.disturbances.total() > 0
    assert figures.recovered.total() > 0
