"""The Dockerfile, taken apart; and what it makes without an engine: its own steps, run into a directory."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "Dockerfile"
PORT = "8006"
STEP_SECONDS_MAX = 300


@dataclass
class Stage:
    """What stands between a FROM and the next."""

    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        """What each of them says."""
        return [text for name, text in self.instructions if name == instruction]

    def one(self, instruction: str) -> str:
        """What the only one says."""
        (text,) = self.all(instruction)
        return text


def stages() -> list[Stage]:
    """The stages in order, without what stands before the first."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: list[Stage] = []
    for line in filter(None, re.sub(r"\\\n\s*", "", text).splitlines()):
        name, said = line.split(maxsplit=1)
        if name == "FROM":
            found.append(Stage())
        elif found:
            found[-1].instructions.append((name, said))
    return found


@dataclass(frozen=True)
class Image:
    """How the last stage is run, over what the steps have left under `root`."""

    root: Path
    final: Stage

    @property
    def environment(self) -> dict[str, str]:
        """What ENV sets."""
        set_there = dict(re.findall(r"(\w+)=(\S+)", " ".join(self.final.all("ENV"))))
        return {name: under(self.root, text.replace("${PATH}", os.defpath)) for name, text in set_there.items()}

    def started_by(self, *command: str, port: int) -> list[str]:
        """What is executed for this command, or else for the image's own, on another port than in the image."""
        executed = json.loads(self.final.one("ENTRYPOINT")) + (list(command) or json.loads(self.final.one("CMD")))
        return [self._program(executed[0]), *(part.replace(PORT, str(port)) for part in executed[1:])]

    def health_check(self, *, port: int) -> list[str]:
        """What is executed to ask whether a container is healthy."""
        executed = json.loads(self.final.one("HEALTHCHECK").partition("CMD ")[2])
        return [self._program(executed[0]), *(part.replace(PORT, str(port)) for part in executed[1:])]

    def _program(self, name: str) -> str:
        found = shutil.which(name, path=self.environment["PATH"])
        assert found is not None, name
        assert found.startswith(str(self.root)), found
        return found


def under(root: Path, text: str) -> str:
    """The text, with the directory that the image is about under another root."""
    return text.replace("/opt/", f"{root}/opt/")


def build(root: Path) -> None:
    """Runs the first stage, step by step, and leaves what the last one copies. The base image is this machine."""
    building, final = stages()
    directory = root
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for name, said in building.instructions:
        match name:
            case "WORKDIR":
                directory = root / said.lstrip("/")
                directory.mkdir()
            case "COPY":
                *sources, target = said.split()
                for source in sources:
                    _copy(ROOT / source, directory / target)
            case "RUN":
                subprocess.run(
                    under(root, said),
                    shell=True,
                    check=True,
                    cwd=directory,
                    env=environment,
                    timeout=STEP_SECONDS_MAX,
                    capture_output=True,
                )
            case _:
                raise AssertionError(f"{name} is not known here")
    shutil.rmtree(directory)
    # A virtual environment knows its place: it is the same in both stages, and so there is nothing to copy.
    assert final.one("COPY").removeprefix("--from=build ").split() == ["/opt/eci-pay", "/opt/eci-pay"]


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)
