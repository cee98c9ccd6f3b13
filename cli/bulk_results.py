"""The file that tells of each row of a batch what became of it.

While a run is under way it is a journal: a row is written when it begins and again when it has ended, so that a run
that is killed leaves what it knows. The last line of a row counts, and a row without one was not begun. At the end it
is written anew, with one line for each row, in the order of the rows.
"""

import csv
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cli.files import STANDARD_STREAM
from eci_pay.errors import InvalidRequest

if TYPE_CHECKING:
    from eci_pay.bulk_plans import Plan
    from eci_pay.bulk_runs import Report, Result

COLUMNS = (
    *("line", "payment_id", "order_id", "amount", "currency", "outcome", "refund_id", "transaction_id"),
    *("detail", "idempotency_key"),
)


def results_path(batch: str, given: str | None) -> Path:
    """Where the results go; raises InvalidRequest for what cannot be written."""
    if given is None and batch == STANDARD_STREAM:
        raise InvalidRequest("--batch - wants --results FILE")
    path = Path(f"{batch}.results.csv" if given is None else given)
    if batch != STANDARD_STREAM and path.exists() and Path(batch).exists() and path.samefile(batch):
        raise InvalidRequest(f"{path}: the results would replace the batch itself")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise InvalidRequest(f"{path}: cannot be written")
    return path


class ResultsFile:
    """Raises OSError where it cannot be written any more."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal: TextIO | None = None

    @contextmanager
    def opened(self, plan: "Plan") -> Iterator[None]:
        """While the rows are done. It begins with what earlier runs have begun, whose results it replaces."""
        from eci_pay.bulk_runs import Outcome, Result

        self._replace(Result.of(task, Outcome.BEGUN, "by an earlier run") for task in plan.tasks if task.was_begun)
        with self.path.open("a", encoding="utf-8", newline="") as self._journal:
            yield

    def add(self, result: "Result") -> None:
        """Told to the operating system at once, so that it outlives the process."""
        assert self._journal is not None
        csv.writer(self._journal).writerow(_row(result))
        self._journal.flush()

    def complete(self, report: "Report") -> None:
        """One line for each row, in the order of the rows."""
        self._replace(report.results)

    def _replace(self, results: Iterable["Result"]) -> None:
        """Whole or not at all."""
        new = self.path.with_name(f"{self.path.name}.{os.getpid()}.new")
        with new.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(COLUMNS)
            writer.writerows(_row(result) for result in results)
        new.replace(self.path)


def _row(result: "Result") -> tuple[object, ...]:
    task = result.task
    return (
        *(task.line, result.payment_id, task.order_id, result.amount, task.currency, result.outcome.value),
        *(result.refund_id, result.transaction_id, result.detail, task.key),
    )
