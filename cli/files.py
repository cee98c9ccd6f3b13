"""Files that commands read and write."""

import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from eci_pay import errors

STANDARD_STREAM = "-"


@contextmanager
def opened(file: str) -> Iterator[BinaryIO]:
    """A file to read, or standard input. Raises InvalidRequest."""
    if file == STANDARD_STREAM:
        yield sys.stdin.buffer
        return
    try:
        stream = open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise errors.InvalidRequest(f"{file}: {error.strerror}") from None
    with stream:
        yield stream


@contextmanager
def written(file: str) -> Iterator[Callable[[str], object]]:
    """Writes text to a file, which is replaced at the end or stays as it was, or to standard output. Raises
    InvalidRequest where the file cannot be made."""
    if file == STANDARD_STREAM:
        yield lambda text: sys.stdout.buffer.write(text.encode())
        return
    with part_of(replaceable(file)) as part:
        yield part.stream.write
        part.replace()


def replaceable(file: str) -> Path:
    """The file that is meant, links followed. Raises InvalidRequest for what is there and is no file, or may not be
    written."""
    try:
        path = Path(file).resolve()
        if path.exists() and not path.is_file():
            raise errors.InvalidRequest(f"{file}: is no file")
        if path.exists() and not os.access(path, os.W_OK):
            raise errors.InvalidRequest(f"{file}: may not be written")
    except (OSError, RuntimeError) as error:  # a name that is too long; links that go round
        raise errors.InvalidRequest(f"{file}: cannot be written: {error}") from None
    return path


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What will be a file, as long as it is written: nobody sees half of it."""

    path: Path
    stream: TextIO
    private: Path

    def replace(self) -> None:
        """Takes the place of the file, and is closed. It is on the disk by then: after a power failure there is the old
        one or the whole new one."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self.private.replace(self.path)


@contextmanager
def part_of(path: Path) -> Iterator[Part]:
    """A new file beside that one, which is gone at the end unless it has replaced it. Raises InvalidRequest where it
    cannot be made."""
    private = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        stream = private.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise errors.InvalidRequest(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield Part(path=path, stream=stream, private=private)
    finally:
        with suppress(OSError):  # what is thrown away need not fit on the disk
            stream.close()
        private.unlink(missing_ok=True)
