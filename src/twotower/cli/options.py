"""Arguments and options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from twotower.system.filesystem import named_path

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Data = Annotated[str, typer.Argument(metavar="DATA", help="A file, a folder, or the name of a data set.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with settings.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one setting, e.g. training.seed=1.")
]
Items = Annotated[str | None, typer.Option("--items", metavar="FILE", help="File with item features and titles.")]
MovedData = Annotated[
    str | None, typer.Option("--data", metavar="DATA", help="Current location of the data, if it has moved.")
]
Run = Annotated[Path, typer.Argument(metavar="DIR", help="Run folder written by `twotower train`.")]


#: Metavars of options and arguments that name a file, a folder or a data set.
PATHS = ("FILE", "DIR", "DIR...", "DATA")


class Command(TyperCommand):
    """A command that rejects an empty or blank path, which pathlib would read as the current folder."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments.

        Raises:
            InputError: an option or argument with a metavar of `PATHS` is blank.
        """
        given, _, _ = self.make_parser(ctx).parse_args(list(args))
        for param in self.get_params(ctx):
            texts = given.get(str(param.name))
            name = str(param.metavar) if param.param_type_name == "argument" else str(param.opts[0])
            for text in texts if isinstance(texts, list | tuple) else [texts]:
                if param.metavar in PATHS and isinstance(text, str):
                    named_path(text, name)
        return super().parse_args(ctx, args)


def overrides(given: list[str] | None, items: str | None) -> list[str]:
    """Return the overrides given by --set and --items."""
    return [*(given or []), *([] if items is None else [f"data.items={json.dumps(items)}"])]
