"""`evergreen serve`: one model package behind KServe's HTTP protocols."""

from __future__ import annotations

import logging
from pathlib import Path

import click


@click.command()
@click.option("--model", type=click.Path(path_type=Path), required=True, help="Model package (OUT/model of a run).")
@click.option(
    "--feature-store",
    type=click.Path(path_type=Path),
    default=None,
    help="Feast repository with the online store.  [default: feature_store beside the model]",
)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
@click.option("--name", default="evergreen", show_default=True, help="Name of the model in the URL.")
@click.option("--impressions", default=None, help="Log what is shown: a folder, fsspec URL or kafka://host:port/topic.")
@click.option(
    "--impression-sampling",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of requests that are logged.",
)
def serve(
    model: Path, feature_store: Path | None, port: int, name: str, impressions: str | None, impression_sampling: float
) -> None:
    """Serve recommendations over KServe V1 and V2 HTTP until interrupted."""
    from evergreen.serving.server import serve as serve_model

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("evergreen").setLevel(logging.INFO)
    serve_model(
        model,
        feature_store or model.resolve().parent / "feature_store",
        port=port,
        name=name,
        impressions=impressions,
        sampling_rate=impression_sampling,
    )
