"""Files that commands read and write."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

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
    path = Path(file).resolve()
    if path.exists() and not path.is_file():
        raise errors.InvalidRequest(f"{file}: is no file")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        stream = part.open("x", encoding="utf-8", newline="")
    except OSError as error:
        raise errors.InvalidRequest(f"{file}: cannot be written: {error.strerror}") from None
    try:
        with stream:
            yield stream.write
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
