"""Images: named by what they hold, built by any builder, and the server's holds all that serving imports."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from packaging.requirements import Requirement

from tests.servers import free_port
from tests.small_world import SmallWorld

ROOT = Path(__file__).resolve().parents[2]
CONTAINERFILES = [ROOT / "images" / name / "Containerfile" for name in ("server", "pipeline")]
INPUTS = ("LICENSE", "pyproject.toml", "uv.lock", "images", "src", "components", "pipelines", "feature_repo")
NAMES = Path("manifests/images/kustomization.yaml")
START_SECONDS = 60


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of all that images are made of."""
    for name in INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "compiled"))
        else:
            shutil.copy(source, tmp_path / name)
    (tmp_path / NAMES).parent.mkdir(parents=True)
    shutil.copy(ROOT / NAMES, tmp_path / NAMES)
    return tmp_path


def build(checkout: Path, *flags: str) -> str:
    """What images/build says; its builder is `echo`, so every command but the build itself runs."""
    environment = {"PATH": os.environ["PATH"], "KUBECONFIG": "/dev/null"}
    command = [checkout / "images" / "build", "--builder", "echo", *flags]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def names(checkout: Path) -> dict[str, str]:
    """Name of each image in the kustomization that was written."""
    images = yaml.safe_load((checkout / NAMES).read_text())["images"]
    return {image["name"]: f"{image['newName']}:{image['newTag']}" for image in images}


def built(checkout: Path, *flags: str) -> dict[str, str]:
    build(checkout, *flags)
    return names(checkout)


def test_same_content_has_the_same_name_and_new_code_a_new_one(checkout: Path) -> None:
    first = built(checkout)
    assert built(checkout) == first
    assert re.fullmatch(r"docker.io/library/evergreen-server:[0-9a-f]{12}", first["evergreen-server"])
    (checkout / "src" / "evergreen" / "added.py").write_text("ADDED = 1\n")
    second = built(checkout)
    for name in ("evergreen-server", "evergreen-pipeline-python"):
        assert first[name] != second[name]


def test_what_is_in_no_image_changes_no_name(checkout: Path) -> None:
    first = built(checkout)
    (checkout / "README.md").write_text("another text\n")
    (checkout / "pipelines" / "compiled").mkdir()
    (checkout / "pipelines" / "compiled" / "training.yaml").write_text(first["evergreen-pipeline-python"])
    (checkout / "src" / "evergreen" / "__pycache__").mkdir()
    (checkout / "src" / "evergreen" / "__pycache__" / "step.pyc").write_bytes(b"\0")
    assert built(checkout) == first


def test_an_image_is_named_by_its_own_containerfile_and_torch(checkout: Path) -> None:
    first = built(checkout)
    with (checkout / "images" / "server" / "Containerfile").open("a") as file:
        file.write("# another line\n")
    second = built(checkout)
    assert first["evergreen-server"] != second["evergreen-server"]
    assert first["evergreen-pipeline-python"] == second["evergreen-pipeline-python"]
    third = built(checkout, "--torch", "cuda")
    assert len({first["evergreen-server"], second["evergreen-server"], third["evergreen-server"]}) == 3


def test_only_the_images_that_were_asked_for_are_built_and_named(checkout: Path) -> None:
    before = names(checkout)
    output = build(checkout, "server-cuda", "--registry", "registry.example.com/team")
    after = names(checkout)
    assert after.pop("evergreen-server-cuda").startswith("registry.example.com/team/evergreen-server-cuda:")
    assert before.items() >= after.items()
    assert output.count("--file images/") == 2, output  # said once, and once more by `echo`
    assert "TORCH=cuda" in output


@pytest.mark.parametrize(
    ("builder", "command"),
    [("docker", "docker build"), ("podman", "podman build"), ("buildah", "buildah bud --isolation chroot --layers")],
)
def test_each_builder_is_called_in_its_own_way(checkout: Path, builder: str, command: str) -> None:
    before = names(checkout)
    output = build(
        checkout, "--builder", builder, "--dry-run", "--registry", "r.example/x", "--push", "--load-kind", "k"
    )
    assert f"+ {command} --tag r.example/x/evergreen-server:" in output
    assert f"+ {builder} push r.example/x/evergreen-pipeline-python:" in output
    assert "+ kind load " in output
    assert names(checkout) == before, "a dry run writes nothing"


def test_an_index_and_certificates_reach_the_build(checkout: Path) -> None:
    (checkout / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n")
    output = build(checkout, "server", "--index", "https://mirror.example/simple", "--ca", str(checkout / "ca.pem"))
    assert "PIP_INDEX_URL=https://mirror.example/simple" in output
    assert "CA_CERTIFICATES=-----BEGIN CERTIFICATE-----" in output


def test_pushing_without_a_registry_is_refused(checkout: Path) -> None:
    command = [checkout / "images" / "build", "--builder", "echo", "--push"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--push wants --registry" in done.stderr


def test_a_compiled_pipeline_and_an_overlay_get_the_names_from_one_file(checkout: Path) -> None:
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl on this machine, which is what builds an overlay")
    name = built(checkout)["evergreen-server"]
    overlay = checkout / "overlay"
    overlay.mkdir()
    (overlay / "kustomization.yaml").write_text("resources: [pod.yaml]\ncomponents: [../manifests/images]\n")
    container = {"name": "server", "image": "evergreen-server:0.1.0"}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}}
    (overlay / "pod.yaml").write_text(json.dumps(pod))
    built_overlay = subprocess.run(["kubectl", "kustomize", overlay], check=True, capture_output=True, text=True).stdout
    assert yaml.safe_load(built_overlay)["spec"]["containers"][0]["image"] == name


def stages(containerfile: Path) -> dict[str, str]:
    """Text of each stage by its name; the last one has none."""
    parts = re.split(r"^FROM (\S+)(?: AS (\S+))?\n", containerfile.read_text(), flags=re.MULTILINE)
    return {parts[i + 1] or "": f"FROM {parts[i]}\n{parts[i + 2]}" for i in range(1, len(parts), 3)}


def test_both_images_share_the_layer_of_torch() -> None:
    server, pipeline = (stages(file) for file in CONTAINERFILES)
    for stage in ("build", "torch"):
        assert server[stage] == pipeline[stage]
    copy_torch = "COPY --from=torch /opt/evergreen /opt/evergreen"
    for last in (server[""], pipeline[""]):
        lines = [line for line in last.splitlines() if not line.startswith("#")]
        assert lines[:2] == ["FROM python:3.11-slim", copy_torch]


@pytest.mark.parametrize("containerfile", CONTAINERFILES, ids=["server", "pipeline"])
def test_an_image_runs_as_a_numbered_user_and_says_its_commit(containerfile: Path) -> None:
    last = stages(containerfile)[""]
    assert re.findall(r"^USER (\d+):(\d+)$", last, flags=re.MULTILINE) == [("65532", "65532")]
    assert "org.opencontainers.image.revision=$COMMIT" in last
    assert "binutils" not in last
    assert "pip install" not in last


@pytest.mark.parametrize("containerfile", CONTAINERFILES, ids=["server", "pipeline"])
def test_what_is_copied_is_in_the_context_and_in_the_name(containerfile: Path) -> None:
    allowed = {
        line.removeprefix("!") for line in (ROOT / ".containerignore").read_text().splitlines() if line[:1] == "!"
    }
    hashed = set(re.search(r"^inputs=\((.*)\)$", (ROOT / "images" / "build").read_text(), re.MULTILINE)[1].split())  # type: ignore[index]
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", containerfile.read_text(), flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]
    assert sources
    for source in sources:
        assert source.split("/")[0] in allowed, f"{source}: not in .containerignore"
        assert source in hashed or source.startswith(f"images/{containerfile.parent.name}/"), (
            f"{source}: not in the name"
        )


def test_scripts_parse() -> None:
    for script, shell in (("images/build", "bash"), ("images/install", "sh"), ("images/pipeline/entrypoint", "bash")):
        subprocess.run([shell, "-n", ROOT / script], check=True)


def in_server_image() -> set[str]:
    """Distributions of the server's image: what the project and its extras there ask for, less what is left out."""
    containerfile, install = CONTAINERFILES[0].read_text(), (ROOT / "images" / "install").read_text()
    extras = set(re.findall(r"--extra=(\S+)", containerfile))
    left_out = set(re.findall(r"--no-emit-package=(\S+)", containerfile))
    left_out |= set(re.search(r"^unused='(.*)'$", install, re.MULTILINE)[1].split("|"))  # type: ignore[index]
    assert {"sympy", "dask", "mypy", "triton"} <= left_out
    assert extras == {"s3", "tracing"}
    found: set[str] = set()
    waiting = [("evergreen", frozenset(extras))]
    while waiting:
        name, wanted = waiting.pop()
        name = re.sub(r"[-_.]+", "-", name).lower()
        if name in left_out or (name in found and not wanted):
            continue
        found.add(name)
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform, or an extra that this environment has not
        for requirement in map(Requirement, requirements):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": e}) for e in (*wanted, "")):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def top_level_modules_of_others(inside: set[str]) -> list[str]:
    """Modules that this environment has and the server's image has not."""
    return sorted(
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if not any(re.sub(r"[-_.]+", "-", name).lower() in inside for name in distributions)
    )


BLOCKED = """
import sys
class NotInTheImage:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED or name == "pyarrow.flight":
            raise ModuleNotFoundError(f"No module named {name!r}: it is not in the server's image", name=name)
sys.meta_path.insert(0, NotInTheImage())
"""


@pytest.fixture(scope="module")
def small_world(tmp_path_factory: pytest.TempPathFactory) -> SmallWorld:
    return SmallWorld.make(tmp_path_factory.mktemp("small_world"))


@pytest.fixture
def server(small_world: SmallWorld, tmp_path: Path) -> Iterator[str]:
    """The address of a server that finds no module but those of its image."""
    blocked = top_level_modules_of_others(in_server_image())
    assert {"kfp", "evidently", "sympy", "dask", "PIL", "matplotlib", "scipy"} <= set(blocked)
    assert not {"torch", "feast", "kserve", "duckdb", "s3fs"} & set(blocked)
    port, grpc_port = free_port(), free_port()
    package = small_world.package("dlrm")
    code = f"BLOCKED = {set(blocked)!r}\n{BLOCKED}\nfrom evergreen.cli import main\nmain()"
    options = [
        "--model",
        package.path,
        "--feature-store",
        small_world.feature_store,
        "--impressions",
        tmp_path / "shown",
    ]
    command = [sys.executable, "-c", code, "serve", "--port", port, "--grpc-port", grpc_port, *options]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                httpx.get(f"{address}/v2/models/evergreen/ready").raise_for_status()
                break
            except httpx.HTTPError:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=START_SECONDS)
    assert process.returncode == 0, (tmp_path / "log").read_text()
    assert list((tmp_path / "shown").rglob("*.parquet"))


@pytest.mark.heavy
def test_the_servers_image_holds_all_that_serving_imports(server: str) -> None:
    answer = httpx.post(f"{server}/v1/models/evergreen:predict", json={"instances": [{"user_id": "u1", "k": 3}]}).json()
    assert len(answer["predictions"][0]["items"]) == 3
    user = {"name": "user_id", "shape": [1], "datatype": "BYTES", "data": ["u1"]}
    answer = httpx.post(f"{server}/v2/models/evergreen/infer", json={"inputs": [user]}).json()
    assert answer["outputs"][0]["shape"] == [1, 10]


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["evergreen.stream.consumer", "evergreen.features.redis_online_store", "s3fs"])
def test_the_servers_image_holds_what_it_imports_on_a_cluster(module: str) -> None:
    code = f"BLOCKED = {set(top_level_modules_of_others(in_server_image()))!r}\n{BLOCKED}\nimport {module}"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_module_that_is_not_in_the_image_is_missed() -> None:
    blocked = set(top_level_modules_of_others(in_server_image()))
    code = f"BLOCKED = {blocked!r}\n{BLOCKED}\nimport evergreen.monitoring.gate"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "it is not in the server's image" in done.stderr
