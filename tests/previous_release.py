"""The release before this one, from its wheel in `tests/releases`: its migrations and its command."""

import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from eci_pay.migrations import Migration, bundled_migrations
from tests.support import CommandLine

RELEASES = Path(__file__).parent / "releases"
_START = "from cli.main import main; main()"


@dataclass(frozen=True)
class PreviousRelease:
    """The wheel, and where it was unpacked: outside the checkout."""

    wheel: Path
    directory: Path

    @property
    def version(self) -> str:
        """As the wheel is named."""
        return self.wheel.name.split("-")[1]

    def migrations(self) -> list[Migration]:
        """Those that it brings along."""
        return bundled_migrations(self.directory / "eci_pay" / "sql" / "migrations")

    def command_line(self, environment: Mapping[str, str], directory: Path) -> CommandLine:
        """Its `eci-pay`, with the dependencies of this environment."""
        first = {"PYTHONPATH": str(self.directory)}
        return CommandLine({**environment, **first}, directory, command=(sys.executable, "-c", _START))


def unpacked(directory: Path) -> PreviousRelease:
    """The only wheel there is."""
    (wheel,) = RELEASES.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory)
    return PreviousRelease(wheel, directory)
