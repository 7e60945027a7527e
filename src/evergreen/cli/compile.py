"""`evergreen compile`: the YAML that `kfp run create -f` takes."""

from __future__ import annotations

from pathlib import Path

import click

_IMAGES = Path("manifests/images/kustomization.yaml")


@click.command("compile", context_settings={"show_default": True})
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("pipelines/compiled"),
    help="Folder for the YAML files.",
)
@click.option(
    "--images",
    type=click.Path(dir_okay=False, path_type=Path),
    default=_IMAGES,
    help="Kustomize's list of images, with the name of the steps' image.",
)
@click.option("--image", default=None, help="Name of the steps' image, in its stead.")
@click.option("--gpu", is_flag=True, help="Train on nodes that have a GPU.")
@click.option(
    "--trainer-nodes",
    type=click.IntRange(min=0),
    default=0,
    help="Train on so many nodes at once, by Kubeflow Trainer; 0: in the step itself.",
)
def compile_pipelines(out: Path, images: Path, image: str | None, gpu: bool, trainer_nodes: int) -> None:
    """Compile the pipelines for a Kubeflow Pipelines server."""
    from components.image import PIPELINE_IMAGE
    from pipelines.kubernetes import compile_for_cluster, image_name
    from pipelines.monitoring import monitoring_pipeline
    from pipelines.rollback import rollback_pipeline
    from pipelines.training import training_pipeline

    name = image or image_name(images)
    if name == PIPELINE_IMAGE:
        click.echo(f"warning: {name} was never built: `make images` builds it and names it in {images}", err=True)
    out.mkdir(parents=True, exist_ok=True)
    for file, pipeline in (
        ("training", training_pipeline),
        ("monitoring", monitoring_pipeline),
        ("rollback", rollback_pipeline),
    ):
        target = out / f"{file}.yaml"
        compile_for_cluster(pipeline, target, image=name, use_gpu=gpu, trainer_nodes=trainer_nodes)
        click.echo(f"{target}")
