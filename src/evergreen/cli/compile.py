"""`evergreen compile`: the YAML that `kfp run create -f` takes."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("compile")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the YAML files."
)
def compile_pipelines(out: Path) -> None:
    """Compile the pipelines for a Kubeflow Pipelines server."""
    from kfp import compiler

    from pipelines.monitoring import monitoring_pipeline
    from pipelines.training import training_pipeline

    out.mkdir(parents=True, exist_ok=True)
    for name, pipeline in (("training", training_pipeline), ("monitoring", monitoring_pipeline)):
        target = out / f"{name}.yaml"
        compiler.Compiler().compile(pipeline, str(target))
        click.echo(f"{target}")
