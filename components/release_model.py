"""Step: the challenger goes out as a canary, and is promoted or taken back."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def release_model(
    training_set: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Model],
    retriever: dsl.Input[dsl.Model],
    incumbent: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    impressions: str,
    state: str,
    as_of: str,
    canary_requests: int,
    latency_budget_ms: float,
    server_url: str,
    server_token_file: str,
    inference_service: str,
    namespace: str,
    model_store: str,
    model_store_path: str,
    report: dsl.Output[dsl.Artifact],
) -> bool:
    """Ask challenger and incumbent the newest logged requests; the better one serves.

    On one machine each gets a server of its own. On a cluster the challenger is a canary beside the InferenceService of
    the users, see `release.inference_service`; requests then say that nobody is shown the answers, so none is logged.
    Repeated after it was killed, the step releases nothing twice.

    Args:
        training_set: of the challenger; what its windows will be compared with comes from there.
        challenger: the package that passed the gate.
        retriever: the two towers that find candidates for it; nothing where none were trained.
        incumbent: the package that serves.
        decision: why there is a challenger at all.
        impressions: folder or fsspec URL of the impression log.
        state: folder of the loop; its releases, canaries and references are added to.
        as_of: ISO 8601 time from which the challenger serves.
        canary_requests: how many are asked.
        latency_budget_ms: p99 milliseconds of a request over HTTP.
        server_url: server to be told, started with --allow-reload on the releases' link; empty: one that is started
            later reads the link.
        server_token_file: file with its bearer token; empty: it asks for none.
        inference_service: of the cluster, to be told in its stead; empty: there is no cluster.
        namespace: of the InferenceService.
        model_store: where it finds its model: a URL for KServe, or pvc://claim/folder.
        model_store_path: where the folder of a claim is mounted here; empty for a URL.
        report: CanaryReport.
    """
    import logging
    import shutil
    import tempfile
    from datetime import datetime
    from functools import partial
    from pathlib import Path

    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.gate import GateReport
    from evergreen.contracts.loop_state import LoopState, put
    from evergreen.contracts.release import CanaryReport
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.watch import keep_reference
    from evergreen.release.canary import CanaryConfig, try_out
    from evergreen.release.deploy import promote, server_client
    from evergreen.release.inference_service import InferenceServer
    from evergreen.release.replay import context_of, logged_requests
    from evergreen.release.store import ReleaseStore
    from evergreen.serving.process import served
    from evergreen.step import pipeline_step

    with pipeline_step("release_model"):
        loop, moment = LoopState(Path(state)), datetime.fromisoformat(as_of)
        package, champion = (ModelPackage.load(Path(model.path)) for model in (challenger, incumbent))
        server = server_client(server_url, server_token_file)
        if inference_service:
            server = InferenceServer.connect(
                inference_service, namespace, model_store, model_store_path, token_file=server_token_file
            )
            server.models.write(
                package.version, package=package.path, feature_store=loop.feature_store, retriever=Path(retriever.path)
            )
        file = loop.canary(moment)
        seen = CanaryReport.read(file) if file.is_file() else None
        if seen is None or seen.challenger != package.version:
            asked = logged_requests(
                impressions, context=context_of(package.info.features), limit=canary_requests, before=moment
            )
            gate = GateReport.read(loop.gate(moment)) if loop.gate(moment).is_file() else None
            ratio = (gate.mean_prediction_ratio if gate else None) or 1.0
            config = CanaryConfig(latency_budget_ms=latency_budget_ms)
            if inference_service:
                seen = server.try_out(package.version, asked, expected_ratio=ratio, config=config)
            else:
                with tempfile.TemporaryDirectory(prefix="evergreen-canary-") as logs:
                    start = partial(served, options=["--feature-store", str(loop.feature_store)])
                    seen = try_out(
                        (package.version, start(package.path, log=Path(logs) / "challenger.log")),
                        (champion.version, start(champion.path, log=Path(logs) / "champion.log")),
                        asked,
                        expected_ratio=ratio,
                        config=config,
                    )
            put(file, seen)
        shutil.copyfile(file, report.path)
        logging.getLogger("evergreen").info("canary: %s", seen.failures or f"passed {seen.num_requests} requests")
        if seen.passed:
            keep_reference(loop, TrainingSet.load(Path(training_set.path)), package)
            promote(
                ReleaseStore(loop.releases),
                package.path,
                package.version,
                as_of=moment,
                reason=RetrainDecision.read(Path(decision.path)).reason,
                canary=seen,
                server=server,
            )
    report.metadata["passed"] = seen.passed
    return seen.passed
