"""``medveil-coordinator``: train surrogates on public data and sign the bundle that the hospitals run."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import Progress, TaskID

from medveil.coordinator import campaign_cli
from medveil.models.bundle import (
    Manifest,
    default_key_path,
    fingerprint,
    load_or_create_key,
    open_bundle,
    save_public_key,
)
from medveil.models.cli import describe, print_summary
from medveil.models.cli_support import (
    FormatOption,
    OutputFormat,
    VersionOption,
    new_app,
    open_progress,
    print_json,
    run_command,
    stderr_console,
)
from medveil.models.errors import ConfigurationError, ExitCode

__all__ = ["main"]

app = new_app(
    "Trains surrogates on public images, signs the bundles that hospitals run, and follows campaigns."
)


@app.callback()
def _options(version: VersionOption = False) -> None:
    """Take the options that belong to no command."""


@app.command("train")
def _train(
    data: Annotated[
        Path,
        typer.Argument(
            metavar="DATA",
            help="NPZ, folder per class, or images and labels.csv; for segmentation images/ and masks/ (or labels/).",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="The bundle to write.")],
    task: Annotated[Literal["classification", "segmentation"], typer.Option("--task")] = "classification",
    method: Annotated[
        Literal[
            "umed", "umed-plus", "umed-targeted", "voxshield", "grating", "grating-coarse", "grating-volume"
        ]
        | None,
        typer.Option(
            "--method",
            help="Of a segmentation bundle; umed-targeted for images, grating-volume for volumes if not given.",
        ),
    ] = None,
    generator: Annotated[
        bool,
        typer.Option(
            "--generator",
            help="Distil a noise generator for classification, too; takes time beyond --minutes.",
        ),
    ] = False,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, help="Time for all of it; default: what the plan takes."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Everything random follows from it.")] = 0,
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads.")] = 1,
    size: Annotated[
        int | None, typer.Option("--size", min=16, help="Rows and columns of what nets are trained on.")
    ] = None,
    classes: Annotated[
        str | None, typer.Option("--classes", help="Class names, comma-separated, by ascending label value.")
    ] = None,
    name: Annotated[str, typer.Option("--name", help="Name of the data, for the manifest.")] = "",
    source_statement: Annotated[
        str, typer.Option("--source-statement", help="Where the data comes from, under which licence.")
    ] = "",
    key: Annotated[
        Path | None,
        typer.Option("--key", help="Signing key (PEM); made on first use. Default: in your settings."),
    ] = None,
    output: FormatOption = OutputFormat.TABLE,
) -> ExitCode:
    """Train surrogates or noise generators on public images and write a signed bundle.

    Killed at any moment, the same command continues. It says so when the noise was not shown to protect.
    """
    try:
        from medveil.coordinator import train as training
        from medveil.coordinator import train_segmentation as training_segmentation
        from medveil.models.training.generator import GeneratorSettings
    except ModuleNotFoundError as exc:
        if exc.name not in {"torch", "onnxscript"}:
            raise
        raise ConfigurationError(
            "torch-missing", "Training needs torch: install medveil with the extra [train]."
        ) from exc
    if generator and task == "segmentation":
        raise ConfigurationError("generator-task", "--generator is for classification; leave it out.")
    key_path = key or default_key_path()
    signing_key, new = load_or_create_key(key_path)
    notices = stderr_console()
    if new:
        public_path = key_path.with_suffix(".pub")
        save_public_key(public_path, signing_key.public_key())
        notices.print(
            f"New signing key: {key_path}. Back it up; give {public_path} to the sites.", soft_wrap=True
        )
    created = datetime.now(UTC).replace(microsecond=0)
    class_names = None if classes is None else tuple(c.strip() for c in classes.split(","))
    with open_progress(None) as bar:
        if task == "segmentation":
            wanted = training_segmentation.SegmentationRequest(
                data=data,
                out=out,
                created=created,
                method=method,
                seed=seed,
                minutes=minutes,
                threads=threads,
                patch=size,
                class_names=class_names,
                name=name,
                source_statement=source_statement,
            )
            manifest = training_segmentation.train_segmentation(
                wanted, signing_key, lambda seconds: _Bar(bar, seconds)
            )
        else:
            request = training.TrainRequest(
                data=data,
                out=out,
                created=created,
                seed=seed,
                minutes=minutes,
                threads=threads,
                size=size,
                class_names=class_names,
                name=name,
                source_statement=source_statement,
                generator=GeneratorSettings() if generator else None,
            )
            manifest = training.train(request, signing_key, lambda seconds: _Bar(bar, seconds))
    own = fingerprint(signing_key.public_key())
    summary = describe(open_bundle(out, trusted={own}), signer_trusted=True)
    if output is OutputFormat.JSON:
        print_json(summary)
    else:
        print_summary(summary)
    _warn_if_ineffective(manifest)
    return ExitCode.OK


class _Bar:
    """A reporter that moves one bar; where there is no terminal for it, each stage is a line in the log."""

    def __init__(self, bar: Progress, seconds: float) -> None:
        self._bar = bar
        self._task: TaskID = bar.add_task("training", total=seconds)

    def stage(self, text: str) -> None:
        self._bar.update(self._task, description=text)
        if self._bar.disable:
            self._bar.console.print(text, markup=False)

    def advance(self, seconds: float) -> None:
        self._bar.advance(self._task, seconds)


def _warn_if_ineffective(manifest: Manifest) -> None:
    """Say it where the bundle's own noise failed. The bundle is whole: its manifest and every site say so, too."""
    check = manifest.proxy_check if manifest.task == "classification" else manifest.segmentation_check
    if check is None or not check.effective:
        stderr_console().print(
            "The bundle is written, but its noise was not shown to protect: see the victims. "
            "Train on more images, allow more --minutes, or try another --seed"
            + (" or --method." if manifest.task == "segmentation" else "."),
            soft_wrap=True,
        )


campaign_cli.register(app)


def main() -> int:
    """Run the ``medveil-coordinator`` command; the console script exits with what this returns."""
    return run_command(app, "medveil-coordinator")
