"""The command line: `python -m projectable --help`."""

import sys

import click

from projectable import reporting


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Small task-specific Transformers, projected in one shot from a large one."""


profile_option = click.option(
    "--profile", default="laptop", show_default=True, help=f"One of {', '.join(reporting.PROFILES)}."
)


@cli.command()
@profile_option
@click.option("--only", multiple=True, metavar="NAME", help="A notebook's number or name; may be repeated.")
def reproduce(profile: str, only: tuple[str, ...]) -> None:
    """Run the notebooks and write reports/index.html."""
    if reporting.reproduce(profile, only):
        sys.exit(1)


@cli.command()
@profile_option
def report(profile: str) -> None:
    """Render the pages and the index again from what was executed, without running anything."""
    count = reporting.report(profile)
    click.echo(f"{count} pages rendered: {reporting.reports_dir(profile) / 'index.html'}")


def main() -> None:
    """Run the command line; an error is one line, or a traceback with --debug."""
    try:
        cli()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        sys.exit(f"error: {str(error) or type(error).__name__}")


if __name__ == "__main__":
    main()
