"""What an operator may choose about a server; `evergreen serve` has an option for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from evergreen.contracts.errors import ArtifactError, EvergreenError

MAX_BODY_BYTES = 4 * 1024 * 1024
"""Enough for 64 requests with 500 candidates of 100 bytes each."""

_MODEL_FILE = "model.json"
_FEAST_CONFIG = "feature_store.yaml"
_RETRIEVER = "retriever"


class ServeSettings(BaseModel):
    """One server."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    model: Path
    """Directory of the model package; a link that is switched to another package is followed by the next load."""
    feature_store: Path
    """Directory of the feature store, materialized."""
    retriever: Path | None = None
    """Directory of the two-tower package for requests without candidates; default: `retriever` beside the model, if it
    is there, and otherwise the whole catalogue is ranked."""
    model_repository: Path | None = None
    """Folder of model packages that may be loaded by their version."""
    allow_reload: bool = False
    """Whether callers may have another model loaded."""

    name: str = Field(default="evergreen", pattern=r"^[A-Za-z0-9._-]{1,100}$")
    """Of the model in the URL."""
    host: str = "0.0.0.0"
    """Address to listen on; the default is every one, as a container needs."""
    port: int = Field(default=8080, ge=0, le=65535)
    """Of HTTP; 0 chooses a free one."""
    grpc_port: int | None = Field(default=None, ge=0, le=65535)
    """Of gRPC; None: no gRPC."""
    max_body_bytes: int = Field(default=MAX_BODY_BYTES, ge=1024)
    drain_seconds: float = Field(default=0.0, ge=0)
    """How long requests are still accepted after SIGTERM, while the server says that it is not ready."""
    grace_seconds: float = Field(default=25.0, ge=0)
    """How long requests in flight may take after that."""

    device: str = "cpu"
    threads: int = Field(default=1, ge=1)
    """Of torch, BLAS and Arrow."""
    deadline_ms: float = Field(default=50.0, gt=0)
    """How long the online store may take before defaults stand for its features."""
    refresh_seconds: float = Field(default=60.0, gt=0)
    """Between two readings of all items from the online store."""
    items: str | None = None
    """fsspec URL of an items.parquet, read with every refresh; None: the feature store's own, which never changes where
    it is part of an immutable bundle."""
    rules: Path | None = None
    """TOML file of the rules of an answer: blocked items, diversity."""

    impressions: str | None = None
    """Where answers are logged: a folder, an fsspec URL, or kafka://host:port/topic; None: nowhere."""
    impression_sampling: float = Field(default=1.0, gt=0, le=1)
    """Share of requests that are logged."""

    token_file: Path | None = None
    """File with a bearer token in each line, any of which a caller must bring."""
    trusted_header: str | None = Field(default=None, pattern=r"^[A-Za-z0-9-]{1,100}$")
    """Header that an authenticating proxy sets, and without which a request is refused."""
    protect_metrics: bool = False
    """Whether /metrics asks for them too."""

    log_format: Literal["text", "json"] = "text"
    access_log_sampling: float = Field(default=0.0, ge=0, le=1)
    """Share of requests that get a line in the log."""
    otlp_endpoint: str | None = None
    """Base URL of an OpenTelemetry collector for traces; None: no traces."""

    @classmethod
    def of(cls, **values: object) -> Self:
        """Settings from options.

        Raises:
            EvergreenError: a value is out of its range; names it.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(str(part) for part in problem["loc"])
            raise EvergreenError(f"{name}={problem['input']!r}: {problem['msg']}") from error

    def check(self) -> None:
        """Tell what can be told before kserve, torch and Feast are imported, which takes ten seconds and more.

        Raises:
            ArtifactError: a file or directory is missing or is not what it should be.
        """
        for path, what, marker in (
            (self.model, "model package", _MODEL_FILE),
            (self.feature_store, "feature store", _FEAST_CONFIG),
        ):
            if not path.is_dir():
                raise ArtifactError(f"{path}: no such directory; give the {what} that `evergreen run` wrote")
            if not (path / marker).is_file():
                raise ArtifactError(
                    f"{path}: no {marker} in it, so it is no {what}; give the one that `evergreen run` wrote"
                )
        for option, folder in (("--retriever", self.retriever), ("--model-repository", self.model_repository)):
            if folder is not None and not folder.is_dir():
                raise ArtifactError(f"{option} {folder}: no such directory")
        for option, file in (("--rules", self.rules), ("--token-file", self.token_file)):
            if file is not None and not file.is_file():
                raise ArtifactError(f"{option} {file}: no such file")

    def retriever_of(self, model: Path) -> Path | None:
        """The retriever to load with a model package: the one that is named, or the one beside it."""
        if self.retriever is not None:
            return self.retriever
        beside = model.resolve().parent / _RETRIEVER
        return beside if (beside / _MODEL_FILE).is_file() else None
