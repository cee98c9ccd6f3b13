"""The file that tells of each row of a batch what became of it.

While a run is under way it is a journal: a row is written when it begins and again when it has ended, so that a run
that is killed leaves what it knows. The last line of a row counts, and a row without one was not begun by any run with
this file. At the end it is written anew, with one line for each row, in the order of the rows.

Each line is handed to the operating system at once: it outlives the process, but a power failure may take the last ones
of a journal. What has taken the file's place, at a run's start and at its end, is on the disk.
"""

import csv
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from cli.files import STANDARD_STREAM, Part, part_of, replaceable
from eci_pay.errors import InvalidRequest, OutputLost

if TYPE_CHECKING:
    from eci_pay.bulk_files import BulkFile
    from eci_pay.bulk_plans import Task
    from eci_pay.bulk_runs import Report, Result

COLUMNS = (
    *("line", "payment_id", "order_id", "amount", "currency", "outcome", "refund_id", "transaction_id"),
    *("detail", "idempotency_key"),
)
_LINE, _OUTCOME, _KEY = (COLUMNS.index(name) for name in ("line", "outcome", "idempotency_key"))
_ENDED = ("done", "replayed", "declined")
"""After these, a row's being begun is no news."""


def results_path(batch: str, given: str | None) -> Path:
    """Where the results go; raises InvalidRequest for what cannot be written."""
    if given is None and batch == STANDARD_STREAM:
        raise InvalidRequest("--batch - wants --results FILE")
    if given == STANDARD_STREAM:
        raise InvalidRequest("--results wants a file: a run that is killed leaves its journal there")
    path = replaceable(f"{batch}.results.csv" if given is None else given)
    if batch != STANDARD_STREAM and path.exists() and os.path.exists(batch) and path.samefile(batch):
        raise InvalidRequest(f"{path}: the results would replace the batch itself")
    if not os.access(path.parent, os.W_OK):
        raise InvalidRequest(f"{path}: cannot be written")
    return path


@contextmanager
def results_of(file: "BulkFile", path: Path) -> Iterator["ResultsFile"]:
    """The results of one run, which no other run writes meanwhile. Raises InvalidRequest where another does, where the
    file holds something else, and where it cannot be written: all before the first row."""
    with _locked(path), part_of(path) as part:
        _check_earlier(path, file)
        try:
            csv.writer(part.stream).writerow(COLUMNS)
            part.stream.flush()
        except OSError as error:
            raise InvalidRequest(f"{path}: cannot be written: {error.strerror}") from None
        results = ResultsFile(part)
        try:
            yield results
        finally:
            results.close()


class ResultsFile:
    """Raises OutputLost where it cannot be written any more."""

    def __init__(self, part: Part) -> None:
        self.path = part.path
        self._start = part
        self._journal: TextIO | None = None

    def begin(self, begun: "Sequence[Task]") -> None:
        """Starts the journal with what earlier runs have told here, and the rows that were `begun` without a word."""
        from eci_pay.bulk_runs import Outcome, Result

        with self._told("no row was begun"):
            ended = self._keep_earlier()
            unheard = [task for task in begun if str(task.line) not in ended]
            csv.writer(self._start.stream).writerows(
                _row(Result.of(task, Outcome.BEGUN, "by an earlier run")) for task in unheard
            )
            self._start.replace()
            self._journal = self.path.open("a", encoding="utf-8", newline="")

    def add(self, result: "Result") -> None:
        """Told to the operating system at once, so that it outlives the process."""
        assert self._journal is not None
        with self._told():
            csv.writer(self._journal).writerow(_row(result))
            self._journal.flush()

    def complete(self, report: "Report") -> None:
        """One line for each row, in the order of the rows; the whole file or, where it fails, the journal."""
        with self._told():
            self.close()
            with part_of(self.path) as part:
                writer = csv.writer(part.stream)
                writer.writerow(COLUMNS)
                writer.writerows(_row(result) for result in report.results)
                part.replace()

    def close(self) -> None:
        """Leaves the journal, on the disk if that is to be had."""
        if self._journal is not None and not self._journal.closed:
            with suppress(OSError), self._journal as journal:
                os.fsync(journal.fileno())

    def _keep_earlier(self) -> set[str]:
        """Copies the lines of earlier runs; returns the rows of whose end they tell."""
        writer = csv.writer(self._start.stream)
        ended: set[str] = set()
        for row in _earlier_rows(self.path):
            writer.writerow(row)
            if row[_OUTCOME] in _ENDED:
                ended.add(row[_LINE])
        return ended

    @contextmanager
    def _told(
        self, so_far: str = "rows were begun, and a run of the same file tells what became of them"
    ) -> Iterator[None]:
        try:
            yield
        except (OSError, InvalidRequest) as error:
            words = error.strerror if isinstance(error, OSError) else error
            raise OutputLost(f"{self.path}: {words}; {so_far}") from error


def _check_earlier(path: Path, file: "BulkFile") -> None:
    """Refuses to replace what is not the same file's results: rows that are not done may be told nowhere else."""
    try:
        with path.open(encoding="utf-8", errors="replace", newline="") as stream:
            header = next(csv.reader(stream), list(COLUMNS))
    except FileNotFoundError:
        return
    except (OSError, csv.Error) as error:
        raise InvalidRequest(f"{path}: cannot be read: {error}") from None
    if tuple(header) != COLUMNS:
        raise InvalidRequest(f"{path}: is there and holds no results: give another --results")
    first = next(_earlier_rows(path), None)
    if first is not None and not first[_KEY].startswith(file.key_prefix):
        raise InvalidRequest(f"{path}: holds the results of another file: give another --results, or move it away")


def _earlier_rows(path: Path) -> Iterator[list[str]]:
    """The lines of a file of results, but for one that a power failure has cut off."""
    with suppress(FileNotFoundError), path.open(encoding="utf-8", errors="replace", newline="") as stream:
        yield from (row for row in csv.reader(stream) if len(row) == len(COLUMNS) and row[_LINE].isdigit())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Refuses the file while another run of this machine writes it, even where that was begun in another folder. There
    is no such lock on Windows."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    lock = path.with_name(f".{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise InvalidRequest(f"{path}: cannot be locked: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = lock.exists() and os.path.samestat(os.fstat(descriptor), lock.stat())
        except OSError:
            is_ours = False
        if not is_ours:  # or it was, until just now, another's, who has removed it
            raise InvalidRequest(f"{path}: another run is writing it")
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _row(result: "Result") -> tuple[object, ...]:
    task = result.task
    return (
        *(task.line, result.payment_id, task.order_id, result.amount, task.currency, result.outcome.value),
        *(result.refund_id, result.transaction_id, result.detail, task.key),
    )
