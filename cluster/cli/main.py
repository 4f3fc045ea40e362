"""``moestro``: the command line. Each command lives in a file of its own and imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.markup import escape

from moestro import __version__
from moestro.cluster.cli import bench, config, experts, generate, incidents, rollout, serve, status, verify
from moestro.protos.errors import MoestroError

app = typer.Typer(
    help="Moestro: a distributed Mixture-of-Experts serving cluster.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command()(serve.serve)
app.command()(rollout.scale)
app.command()(rollout.update)
app.command()(generate.generate)
app.command()(generate.chat)
app.command()(status.status)
app.command()(incidents.incidents)
app.add_typer(experts.app, name="experts")
app.command()(bench.bench)
app.command()(verify.verify)
app.command()(config.config)


@app.command()
def version() -> None:
    """Prints the version."""
    typer.echo(__version__)


def main() -> None:
    """The entry point: errors raised on purpose become one line and exit code 1."""
    try:
        app()
    except (MoestroError, TimeoutError) as error:
        console = Console(stderr=True)
        console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
