"""The real schemas of Kubernetes and of the operators, fetched as Go modules; what they do not know is an error.

A module is a zip on Go's proxy, and a proxy serves parts of files: so one file of each is read, not 60 MB around it. It
is kept in ~/.cache/evergreen/schemas. Feast's operator is no module of its own version: its file is fetched by itself.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import fsspec
import jsonschema_rs
import yaml

from tests.manifests.kustomize import Object

CACHE = Path.home() / ".cache" / "evergreen" / "schemas"
_METADATA = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"
_LOOSE = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": ["integer", "string"],
    "io.k8s.apimachinery.pkg.api.resource.Quantity": ["string", "number"],
}


class SchemaUnavailableError(Exception):
    """Neither kept here nor to be had: says what, and why."""


@dataclass(frozen=True)
class _File:
    """A file of a Go module, or of a folder of the web."""

    module: str
    """Its name, or the folder's URL."""
    version: str
    path: str

    def read(self) -> bytes:
        """Its bytes, from the cache or the proxy."""
        cached = CACHE / f"{self.module.removeprefix('https://')}@{self.version}" / self.path
        if cached.is_file():
            return cached.read_bytes()
        try:
            found = self._fetch()
        except (OSError, zipfile.BadZipFile, aiohttp.ClientError) as error:
            raise SchemaUnavailableError(f"{self.module}@{self.version}: {self.path}: not here: {error!r}") from error
        cached.parent.mkdir(parents=True, exist_ok=True)
        part = cached.with_name(f"{cached.name}.{os.getpid()}")  # two workers may fetch it at once
        part.write_bytes(found)
        part.replace(cached)
        return found

    def _fetch(self) -> bytes:
        if self.module.startswith("https://"):
            with fsspec.open(f"{self.module}/{self.version}/{self.path}") as remote:
                return bytes(remote.read())
        url = f"{_proxy()}/{self.module}/@v/{self.version}.zip"
        with fsspec.open(url) as remote, zipfile.ZipFile(remote) as archive:
            return archive.read(f"{self.module}@{self.version}/{self.path}")


def _proxy() -> str:
    setting = os.environ.get("GOPROXY", "")
    if not setting and shutil.which("go"):
        setting = subprocess.run(["go", "env", "GOPROXY"], capture_output=True, text=True, timeout=30).stdout
    urls = [url.strip() for url in setting.replace("|", ",").split(",") if url.strip().startswith("http")]
    return (urls or ["https://proxy.golang.org"])[0].rstrip("/")


_KUBERNETES = _File("k8s.io/kubernetes", "v1.34.4", "api/openapi-spec/swagger.json")
_KSERVE = ("github.com/kserve/kserve", "v0.20.0", "config/crd/full")
_MONITORING = ("github.com/prometheus-operator/prometheus-operator", "v0.85.0", "example/prometheus-operator-crd")
_SPARK = ("github.com/kubeflow/spark-operator/v2", "v2.3.0", "config/crd/bases")
_TRAINER = ("github.com/kubeflow/trainer/v2", "v2.0.0", "manifests/base/crds")
_FEAST = ("https://raw.githubusercontent.com/feast-dev/feast", "v0.67.0", "infra/feast-operator/config/crd/bases")
_STORAGE = (*_KSERVE[:2], "config/crd/full/clusterstoragecontainer")
_CRDS = {
    "serving.kserve.io/InferenceService": (*_KSERVE, "serving.kserve.io_inferenceservices.yaml"),
    "serving.kserve.io/ServingRuntime": (*_KSERVE, "serving.kserve.io_servingruntimes.yaml"),
    "serving.kserve.io/ClusterStorageContainer": (*_STORAGE, "serving.kserve.io_clusterstoragecontainers.yaml"),
    "monitoring.coreos.com/ServiceMonitor": (*_MONITORING, "monitoring.coreos.com_servicemonitors.yaml"),
    "monitoring.coreos.com/PodMonitor": (*_MONITORING, "monitoring.coreos.com_podmonitors.yaml"),
    "monitoring.coreos.com/PrometheusRule": (*_MONITORING, "monitoring.coreos.com_prometheusrules.yaml"),
    "sparkoperator.k8s.io/SparkApplication": (*_SPARK, "sparkoperator.k8s.io_sparkapplications.yaml"),
    "trainer.kubeflow.org/TrainingRuntime": (*_TRAINER, "trainer.kubeflow.org_trainingruntimes.yaml"),
    "trainer.kubeflow.org/TrainJob": (*_TRAINER, "trainer.kubeflow.org_trainjobs.yaml"),
    "feast.dev/FeatureStore": (*_FEAST, "feast.dev_featurestores.yaml"),
}


def crd(group_and_kind: str) -> Object:
    """A CustomResourceDefinition, as its project publishes it.

    Args:
        group_and_kind: e.g. `serving.kserve.io/InferenceService`.

    Raises:
        SchemaUnavailableError: it cannot be had.
        KeyError: no module is known for it.
    """
    module, version, folder, name = _CRDS[group_and_kind]
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    found: Object = yaml.load(_File(module, version, f"{folder}/{name}").read(), Loader=loader)
    return found


def crds() -> list[str]:
    """Group and kind of every CustomResourceDefinition that the manifests use."""
    return list(_CRDS)


def errors(found: Object) -> list[str]:
    """What is wrong with an object: unknown fields, wrong types, what is missing.

    Raises:
        SchemaUnavailableError: its schema cannot be had.
    """
    where = f"{found['kind']} {found['metadata']['name']}"
    validator = _validator(found["apiVersion"], found["kind"])
    wrong = [f"{'.'.join(map(str, e.instance_path))}: {e.message[:300]}" for e in validator.iter_errors(found)]
    if not wrong:  # a CRD does not spell the metadata out
        wrong = [f"metadata: {error.message[:300]}" for error in _compiled(_METADATA).iter_errors(found["metadata"])]
    return [f"{where}: {text}" for text in wrong]


@functools.cache
def _validator(api_version: str, kind: str) -> jsonschema_rs.Draft4Validator:
    group, _, version = api_version.rpartition("/")
    if f"{group}/{kind}" not in _CRDS:
        definitions = _definitions()
        wanted = {"group": group, "version": version, "kind": kind}
        names = [n for n, d in definitions.items() if wanted in d.get("x-kubernetes-group-version-kind", [])]
        assert names, f"Kubernetes 1.34 knows no {api_version} {kind}"
        return _compiled(names[0])
    versions = {entry["name"]: entry for entry in crd(f"{group}/{kind}")["spec"]["versions"]}
    assert versions[version]["served"], f"{api_version} of {kind} is not served any more"
    schema = _strict(versions[version]["schema"]["openAPIV3Schema"], prunes=True)
    schema["properties"]["metadata"] = {"type": "object"}
    return jsonschema_rs.Draft4Validator(schema)


@functools.cache
def _compiled(definition: str) -> jsonschema_rs.Draft4Validator:
    return jsonschema_rs.Draft4Validator({"$ref": f"#/definitions/{definition}", "definitions": _definitions()})


@functools.cache
def _definitions() -> dict[str, Any]:
    definitions: dict[str, Any] = json.loads(_KUBERNETES.read())["definitions"]
    for name, types in _LOOSE.items():
        definitions[name] = {"type": types}
    return {name: _strict(definition, prunes=False) for name, definition in definitions.items()}


def _strict(schema: Any, *, prunes: bool) -> Any:
    """The schema without room for unknown fields.

    Args:
        schema: as published.
        prunes: an object without `properties` is an empty one, since the server drops what a CRD does not name.
    """
    if isinstance(schema, list):
        return [_strict(entry, prunes=prunes) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    # Names of fields are no keywords: a field may well be called `properties` or `items`.
    strict = {
        key: {name: _strict(entry, prunes=prunes) for name, entry in value.items()}
        if key == "properties" and isinstance(value, dict)
        else _strict(value, prunes=prunes)
        for key, value in schema.items()
        if key not in ("default", "example")
    }
    if "(?i)" in str(strict.get("pattern")):  # Go's; JSON schema's expressions have no flags
        del strict["pattern"]
    open_ended = "additionalProperties" in schema or schema.get("x-kubernetes-preserve-unknown-fields")
    if schema.get("type") == "object" and not open_ended and ("properties" in schema or prunes):
        strict["additionalProperties"] = False
    return strict
