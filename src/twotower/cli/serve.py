"""The command that serves models over HTTP: `twotower serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from twotower.cli.console import messages, print_line
from twotower.cli.options import Command

commands = typer.Typer()


@commands.command(cls=Command)
def serve(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="Run folders; the web page can compare two side by side.")
    ],
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port to listen on; 0 for any free port.")
    ] = 8000,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; default: this machine only.")
    ] = "127.0.0.1",
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", metavar="FILE", help="File with the token that requests must carry."),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="Additional host name that requests may use."),
    ] = None,
    queue: Annotated[int, typer.Option("--queue", min=1, help="Maximum requests in the queue.")] = 512,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Maximum requests searched together.")] = 128,
    connections: Annotated[int, typer.Option("--connections", min=1, help="Maximum open connections.")] = 512,
    watch: Annotated[
        float,
        typer.Option(
            "--watch", min=0.0, metavar="SECONDS", help="Interval between checks for a new model; 0 for never."
        ),
    ] = 1.0,
    threads: Annotated[
        int | None, typer.Option("--threads", min=1, help="Threads per search; default: torch's choice.")
    ] = None,
    log_level: Annotated[str, typer.Option("--log-level", help="debug, info, warning or error.")] = "info",
) -> None:
    """Serve models over HTTP, with a web page at /. The token can also be set in TWOTOWER_TOKEN."""
    from twotower.errors import InputError  # noqa: PLC0415
    from twotower.serving.http import app  # noqa: PLC0415
    from twotower.serving.http.settings import allowed_hosts, read_token  # noqa: PLC0415

    if log_level not in ("debug", "info", "warning", "error"):
        raise InputError(f"--log-level: expected debug, info, warning or error, found {log_level!r}")
    if threads is not None:
        import torch  # noqa: PLC0415

        torch.set_num_threads(threads)
    settings = app.ServiceSettings(
        token=read_token(token_file, os.environ.get("TWOTOWER_TOKEN")),
        hosts=allowed_hosts(host, tuple(allow_host or ())),
        queue=queue,
        largest_batch=batch,
        connections=connections,
        watch_seconds=watch,
    )
    app.serve(
        directories,
        host=host,
        port=port,
        settings=settings,
        log_level=log_level,
        opened=lambda address: print_line(f"The page is at {address}", to=messages),
    )
