"""Commands that are imported when they are needed, and groups that need no pydantic to read their own options."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption
from typer.main import get_group


class DeferredCommand(TyperCommand):
    """Stands in for a command until that is run, completed or asked for its own help."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self._name = name
        self._module = module

    def load(self) -> Any:
        """The command itself."""
        group = typer.Typer(rich_markup_mode=None)
        import_module(self._module).register(group)
        return get_group(group).commands[self._name]

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Where Typer begins with a command: from here on it has to do with the one itself."""
        return self.load().make_context(*arguments, **settings)


class QuickGroup(TyperGroup):
    """A group whose flags are False where they are not given. Typer's own, `--help` among them, would be None: that
    Typer has pydantic make a bool, and its import takes longer than all else that help needs."""

    def get_params(self, *arguments: Any) -> Any:
        """The options of the group itself."""
        params = super().get_params(*arguments)
        for option in params:
            if isinstance(option, TyperOption) and option.is_flag and option.default is None:
                option.default = False
        return params
