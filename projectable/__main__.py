"""The command line: `python -m projectable --help`. Whatever is heavy is imported where it is used."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from projectable import pages, reporting

if TYPE_CHECKING:
    from projectable.config import RunConfig
    from projectable.experiment import Run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Small task-specific Transformers, projected in one shot from a large one."""


# -------------------------------------------------------------------------------------------------- notebooks

profile_option = click.option(
    "--profile", default="laptop", show_default=True, help=f"One of {', '.join(reporting.PROFILES)}."
)


executor_option = click.option(
    "--executor", type=click.Choice(["local", "slurm"]), help="Train as jobs of submitit, on this machine or on Slurm."
)


@cli.command()
@profile_option
@click.option("--only", multiple=True, metavar="NAME", help="A notebook's number or name, or 00-06; may be repeated.")
@click.option("-p", "parameters", nargs=2, multiple=True, metavar="NAME VALUE", help="A parameter of the notebooks.")
@executor_option
def reproduce(
    profile: str, only: tuple[str, ...], parameters: tuple[tuple[str, str], ...], executor: str | None
) -> None:
    """Run the notebooks and write reports/index.html.

    Example: projectable reproduce --only 15 -p folder /data/pets -p d_s 8

    With parameters of your own the pages lie in build/<profile>/own_report/, or where PROJECTABLE_REPORTS says: the
    reference stays.

    With an executor notebooks are jobs, and so is what they train. Ctrl-C ends it at once, with code 130.
    """
    if executor:
        os.environ["PROJECTABLE_EXECUTOR"] = executor  # the notebooks' kernels inherit it, and what comes next
    if parameters and not os.environ.get("PROJECTABLE_REPORTS"):
        os.environ["PROJECTABLE_REPORTS"] = str(reporting.build_dir(profile) / "own_report")
    given = dict(parameters)
    if given.get("folder") == "":
        raise reporting.ReportError("folder=''; allowed: a folder of class folders (without `-p folder`: the example)")
    if "folder" in given:  # named from where one stands; notebooks run elsewhere
        given["folder"] = os.path.abspath(os.path.expanduser(given["folder"]))
    try:
        failed = reporting.reproduce(profile, only, executor or "", given)
    except KeyboardInterrupt:
        click.echo("\nstopped: the same command goes on from what has been trained", err=True)
        sys.exit(130)
    sys.exit(1 if failed else 0)


@cli.command()
@profile_option
def report(profile: str) -> None:
    """Render the pages and the index again from what was executed, without running anything."""
    count = reporting.report(profile)
    click.echo(f"{count} pages rendered: {reporting.reports_dir(profile) / 'index.html'}")


@cli.command()
@click.argument("name")
@profile_option
def keep(name: str, profile: str) -> None:
    """Keep this run's claims under a NAME: the index sets later runs beside them.

    Example: projectable keep mine
    """
    click.echo(reporting.keep(name, profile))


@cli.command()
@click.argument("notebooks", nargs=-1, type=click.Path(path_type=Path))
def check(notebooks: tuple[Path, ...]) -> None:
    """Check that notebooks are fit to be stored.

    One cell tagged `parameters` with literals only, `profile` first; no outputs. All numbered ones if none is named.
    """
    failed = 0
    for path in notebooks or reporting.select_notebooks():
        try:
            pages.check_stored(path)
        except pages.ReportError as error:
            failed += 1
            click.echo(f"error: {error}", err=True)
    if failed:
        sys.exit(1)


# --------------------------------------------------------------------------------------------- runs and models


def find_run(name: str | Path) -> Run:
    """The finished run of that folder, or of that name in runs/. Raises ConfigError saying why there is none."""
    from projectable.config import ConfigError, read_config
    from projectable.experiment import MODELS, Run, runs_dir
    from projectable.storage import read_json

    folder = Path(name) if (Path(name) / "config.json").exists() else runs_dir() / name
    if not (folder / "config.json").exists():
        for place in (name, folder):
            if (Path(place) / "result.json").exists():
                raise ConfigError(f"{place} lost its config.json: `projectable train` with its config writes it again")
        raise ConfigError(f"no run {str(name)!r}; allowed: the folder of a run, or the name of one in {runs_dir()}")
    run = Run(read_config(folder, MODELS), folder)
    if run.has_diverged:
        remembered = folder / "diverged.json"
        raise ConfigError(f"{folder} diverged: {read_json(remembered)['error']}; delete {remembered} to try again")
    if not run.is_done():
        raise ConfigError(f"{folder} is not finished: `projectable train {folder / 'config.json'}` goes on with it")
    return run


def check_current(run: Run) -> Run:
    """The run itself. Raises ConfigError where it would be trained otherwise now, or its images are not there."""
    from projectable.config import ConfigError
    from projectable.experiment import folder_of
    from projectable.tasks import MAKERS
    from projectable.tasks.images import LOADERS, LOADERS_OF_PATHS, DataError

    dataset = run.config.data.dataset
    if not (dataset in LOADERS or dataset in MAKERS or dataset.partition(":")[0] in LOADERS_OF_PATHS):
        export = "`projectable.export.export` writes its models there"
        raise ConfigError(f"{run.folder}: images {dataset!r} were registered from Python: {export}")
    try:
        folder = folder_of(run.config)
    except DataError as error:
        again = f"where they were moved, `projectable train` with their new path finds {run.folder.name} again"
        raise ConfigError(f"{error}; {again}") from None
    if folder.name != run.folder.name:
        commit, again = run.result.get("commit"), f"`projectable train {run.folder / 'config.json'}` trains it anew"
        raise ConfigError(
            f"{run.folder} is not what would be trained now: since commit {commit} code, packages or images changed, "
            f"or the folder was renamed; {again}"
        )
    return run


def facts(run: Run) -> dict[str, str]:
    """What there is to know of a finished run, in words."""
    config, result = run.config, run.result
    options = ", ".join(f"{name}={value}" for name, value in config.options)
    losses = ", ".join(f"{member} {loss:.4f}" for member, loss in result["val"].items())
    unit = "nats per masked token" if config.model.startswith("masked_") else "nats per token"
    rates = ", ".join(f"{member} {rate:g}" for member, rate in config.rates().items() if rate or member != "source")
    images = f"up to {config.val_images}" if config.val_images else "all"
    return {
        "model": f"{config.model} ({options})" if options else config.model,
        "members": ", ".join(result["val"]),
        "source": f"width {config.d_source}, {config.n_layers} layers",
        "data": f"{config.data.dataset}, tasks: {config.data.tasks}, {config.data.vocab_size} codes",
        "steps": f"{run.history[-1]['step']:,} of {config.steps:,}, the best at {result['best_step']:,}",
        "learning rates": rates,
        "val loss": f"{losses} ({unit}, mean over tasks, {images} images each)",
        "parameters": f"{result['n_parameters']:,}, frozen ones included",
        "seconds": f"{result['seconds']:.0f} on {result['device']}",
        "seed, commit": f"{config.seed}, {result['commit']}",
        "starts from": _in_words(config.start) if config.start else "nothing",
    }


def _in_words(config: RunConfig) -> str:
    """A run by what it is, and the folder it would have now, where that is there: code or images may have changed."""
    from projectable.experiment import folder_of
    from projectable.tasks.images import DataError

    widths = ", ".join(map(str, config.sizes or (config.d_source,)))
    words = f"{config.model}, width {widths}, {config.steps:,} steps, seed {config.seed}"
    with contextlib.suppress(DataError):
        folder = folder_of(config)
        words += f": {folder}" if folder.exists() else ""
    return words


@cli.command()
@click.argument("config")
@executor_option
def train(config: str, executor: str | None) -> None:
    """Train a run, print its folder.

    CONFIG is a JSON file with the fields of a RunConfig, as every run's config.json. What the run starts from is
    trained first. A finished run is found again; one that was stopped goes on from its last checkpoint. Ctrl-C ends the
    step, writes a checkpoint and leaves with code 130. Several processes share a training under torchrun.

    \b
    Example: projectable train notebooks/digits.json
             torchrun --nproc-per-node 2 -m projectable train notebooks/digits.json
    """
    from projectable import experiment
    from projectable.config import read_config

    wanted = read_config(config, experiment.MODELS)
    if not executor:
        _train_here(wanted)
        return
    try:
        (finished,) = experiment.run_many([wanted], executor=executor)
    except KeyboardInterrupt:  # its jobs were ended
        click.echo("stopped: the same command goes on from the last checkpoint", err=True)
        sys.exit(128 + signal.SIGINT)
    _print_folder(finished)


def _train_here(wanted: RunConfig) -> None:
    """Train a run in this process, or with the others of torchrun: a bar for each part, the folder at the end."""
    from tqdm import tqdm

    from projectable import experiment, training

    with training.team() as team, training.Stop(team) as stop:
        said, trained = "", {}
        try:
            parts = [] if team.first(partial(experiment.is_done, wanted)) else experiment.chain(wanted)
            if parts and wanted.start is not None:
                team.first(partial(experiment.try_out, wanted))
            for part in parts:
                if team.first(partial(experiment.is_done, part)):
                    continue
                words = " ".join([part.model, *(f"d{size}" for size in part.sizes)])
                label = "sum of losses" if part.model.endswith("projectable") else "loss"
                with tqdm(total=part.steps, unit="step", desc=words, mininterval=1, disable=team.rank > 0) as bar:

                    def report(step: int, steps: int, loss: float, bar=bar, words=words, label=label) -> None:
                        nonlocal said
                        if not bar.n:
                            bar.n = bar.initial = step - 1  # where it goes on: the rate is that of the steps made now
                        bar.set_postfix({label: f"{loss:.3f}"}, refresh=False)
                        bar.update(step - bar.n)
                        said = f" after step {step:,} of {steps:,} of {words}"

                    trained[part] = experiment.run(part, report, stop, team)
                stop.end()
        except KeyboardInterrupt:
            if team.rank == 0:
                where = "there" if said and not stop.cut else "the last checkpoint"
                click.echo(f"stopped{said}: the same command goes on from {where}", err=True)
            sys.exit(128 + (stop.signal or signal.SIGINT))
        if team.rank == 0:
            _print_folder(trained.get(wanted) or experiment.run(wanted))
    if team.size > 1:  # all is written: threads of the process group may abort an interpreter that tidies up
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _print_folder(run: Run) -> None:
    """Print the folder of a finished run. Raises DamagedFile."""
    from projectable.experiment import folder_of
    from projectable.tasks.images import DataError

    click.echo(run.check().folder)
    with contextlib.suppress(DataError):
        if folder_of(run.config) == run.folder:
            return
    click.echo(f"images in {run.config.data.dataset} changed while this trained: run again to train on them", err=True)


@cli.command()
@click.argument("run")
@click.option("--task", required=True, help="The task's name or number.")
@click.option("--width", required=True, help="Width of the small model, or a member's name: d16, source.")
@click.option("-o", "--output", required=True, metavar="DIR", help="The folder to write.")
@click.option("--overwrite", is_flag=True, help="Replace a model that is there already.")
@click.option("--onnx", is_flag=True, help="Also write DIR/model.onnx (needs the extra `onnx`).")
def project(run: str, task: str, width: str, output: str, overwrite: bool, onnx: bool) -> None:
    """Write one task's small model as a folder.

    RUN is a run's folder, or its name in runs/. The folder stands alone: a copy of it is all that is needed elsewhere.

    \b
    Example: projectable project runs/projectable-0123456789ab --task coat --width 16 -o coat16
    """
    from projectable.export import export

    export(check_current(find_run(run)), width, task, output, overwrite, onnx)
    click.echo(output)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("-n", "n", type=int, default=64, show_default=True, help="How many images.")
@click.option("-o", "--output", required=True, metavar="FILE", help="The PNG file to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same images.")
@click.option("--temperature", type=float, default=1.0, show_default=True, help="Below 1: likelier images.")
def sample(folder: str, n: int, output: str, seed: int, temperature: float) -> None:
    """Draw new images from a model in DIR.

    \b
    Example: projectable sample coat16 -n 64 -o coats.png
    """
    from projectable.export import load, png_path, write_grid

    path = png_path(output)  # before anything is drawn
    write_grid(load(folder).sample(n, temperature, seed), path)
    click.echo(output)


@cli.command()
@click.argument("folder", metavar="DIR")
@click.option("--split", default="test", show_default=True, help="One of train, val, test.")
@click.option("--images", metavar="PATH", help="The folder of images, for a model of your own.")
def evaluate(folder: str, split: str, images: str | None) -> None:
    """Measure a model on its task's images.

    Loss of the model in DIR, computed now: nats per token and bits per pixel.

    \b
    Example: projectable evaluate coat16 --split val
    """
    from projectable.export import evaluate as measure
    from projectable.export import load

    model = load(folder)
    n_images, nats, bits = measure(model, split, images)
    where = f"{model.task} of {model.config['data_name']}, {n_images} {split} images"
    click.echo(f"{where}: {nats:.4f} nats per token, {bits:.4f} bits per pixel")


@cli.command()
@click.argument("what", metavar="RUN|DIR")
def info(what: str) -> None:
    """Tell what a run or a model is.

    Its sizes, losses, data, and where it comes from.

    \b
    Example: projectable info coat16
    """
    from projectable import export

    folder = Path(what)
    if export.looks_like_model(folder):
        rows = export.facts(export.load(folder).config)
    else:
        rows = facts(find_run(what))
    for name, value in rows.items():
        click.echo(f"{name + ':':15} {value}")


def main() -> None:
    """Run the command line; an error is one line, or a traceback with --debug."""
    try:
        cli()
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        words = str(error).partition("\nException raised from")[0]  # and a trace of C++, of torch's own errors
        sys.exit(f"error: {words or type(error).__name__}")


if __name__ == "__main__":
    main()
