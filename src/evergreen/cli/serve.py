"""`evergreen serve`: one model package behind KServe's HTTP and gRPC protocols."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

_PATH = click.Path(path_type=Path)
_PORT = click.IntRange(0, 65535)
_SECONDS = click.FloatRange(min=0)
_SHARE = click.FloatRange(0, 1)


@click.command(context_settings={"show_default": True})
@click.option("--model", type=_PATH, required=True, help="Model package (OUT/model of a run), or a link to one.")
@click.option(
    "--feature-store",
    type=_PATH,
    default=None,
    show_default="feature_store beside the model",
    help="Feast repository with the online store.",
)
@click.option(
    "--retriever",
    type=_PATH,
    default=None,
    show_default="retriever beside the model, if it is there",
    help="two_tower package that finds candidates in a large catalogue.",
)
@click.option("--name", default="evergreen", help="Name of the model in the URL.")
@click.option("--host", default="0.0.0.0", help="Address to listen on.")
@click.option("--port", type=_PORT, default=8080, help="Of HTTP; 0: a free one.")
@click.option("--grpc-port", type=_PORT, default=None, help="Of gRPC; without it there is none.")
@click.option("--device", default="cpu", help="cpu, cuda or auto.")
@click.option("--threads", type=click.IntRange(min=1), default=1, help="Of torch, BLAS and Arrow.")
@click.option(
    "--deadline-ms",
    type=click.FloatRange(min=0, min_open=True),
    default=50.0,
    help="How long the online store may take before defaults stand for the user's features.",
)
@click.option(
    "--refresh-seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=60.0,
    help="Between two readings of all items from the online store.",
)
@click.option(
    "--items", default=None, help="URL of an items.parquet to read with every refresh.  [default: the feature store's]"
)
@click.option("--rules", type=_PATH, default=None, help="TOML file: blocked items, diversity, hooks.")
@click.option("--impressions", default=None, help="Log what is shown: a folder, fsspec URL or kafka://host:port/topic.")
@click.option(
    "--impression-sampling",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Share of requests that are logged.",
)
@click.option("--allow-reload", is_flag=True, help="Let callers load another model: POST /v2/repository/models/…/load.")
@click.option("--model-repository", type=_PATH, default=None, help="Folder of packages that may be loaded by version.")
@click.option(
    "--token-file", type=_PATH, default=None, help="Ask for one of the bearer tokens in this file, one a line."
)
@click.option("--trusted-header", default=None, help="Ask for this header, which an authenticating proxy sets.")
@click.option("--protect-metrics", is_flag=True, help="Ask for them at /metrics too.")
@click.option("--max-body-bytes", type=click.IntRange(min=1024), default=4 * 1024 * 1024, help="Of one call.")
@click.option("--drain-seconds", type=_SECONDS, default=0.0, help="Between SIGTERM and the end of listening.")
@click.option("--grace-seconds", type=_SECONDS, default=25.0, help="For requests in flight after that.")
@click.option("--log-format", type=click.Choice(["text", "json"]), default="text")
@click.option("--access-log-sampling", type=_SHARE, default=0.0, help="Share of requests that get a line in the log.")
@click.option(
    "--otlp-endpoint",
    envvar="OTEL_EXPORTER_OTLP_ENDPOINT",
    show_envvar=True,
    default=None,
    help="Collector of traces (OTLP over HTTP), e.g. http://collector:4318.",
)
def serve(model: Path, feature_store: Path | None, log_format: Any, **options: Any) -> None:
    """Serve recommendations over KServe V1, V2 and gRPC until told to stop.

    SIGTERM: not ready at once, answering for --drain-seconds more, then requests in flight end and impressions are
    written. A second one: at once.
    """
    from evergreen.serving.logs import configure_logging
    from evergreen.serving.server import serve as serve_model
    from evergreen.serving.settings import ServeSettings

    configure_logging(log_format)
    serve_model(
        ServeSettings.of(
            model=model,
            feature_store=feature_store or model.resolve().parent / "feature_store",
            log_format=log_format,
            **options,
        )
    )
