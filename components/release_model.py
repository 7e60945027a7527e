"""Step: the challenger goes out as a canary, and is promoted or taken back."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def release_model(
    training_set: dsl.Input[dsl.Dataset],
    challenger: dsl.Input[dsl.Model],
    incumbent: dsl.Input[dsl.Model],
    decision: dsl.Input[dsl.Artifact],
    impressions: str,
    state: str,
    as_of: str,
    canary_requests: int,
    latency_budget_ms: float,
    server_url: str,
    server_token_file: str,
    report: dsl.Output[dsl.Artifact],
) -> bool:
    """Ask challenger and incumbent the newest logged requests, each on a server of its own; the better one serves.

    The users' own server is not asked: its answers would be logged as if somebody had seen them. Repeated after it was
    killed, the step releases nothing twice.

    Args:
        training_set: of the challenger; what its windows will be compared with comes from there.
        challenger: the package that passed the gate.
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
        report: CanaryReport.
    """
    import logging
    import shutil
    import tempfile
    from contextlib import ExitStack
    from datetime import datetime
    from pathlib import Path

    import httpx

    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.errors import EvergreenError
    from evergreen.contracts.gate import GateReport
    from evergreen.contracts.loop_state import LoopState, put
    from evergreen.contracts.release import CanaryReport
    from evergreen.contracts.training_set import FeatureOrigin, TrainingSet
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.watch import keep_reference
    from evergreen.release.canary import CanaryConfig, not_started, run_canary
    from evergreen.release.deploy import promote, server_client
    from evergreen.release.replay import logged_requests
    from evergreen.release.store import ReleaseStore
    from evergreen.serving.process import served
    from evergreen.step import pipeline_step

    with pipeline_step("release_model"), ExitStack() as stack:
        loop, moment = LoopState(Path(state)), datetime.fromisoformat(as_of)
        package, champion = (ModelPackage.load(Path(model.path)) for model in (challenger, incumbent))
        file = loop.canary(moment)
        seen = CanaryReport.read(file) if file.is_file() else None
        if seen is None or seen.challenger != package.version:
            context = [feature.name for feature in package.info.features if feature.origin is FeatureOrigin.CONTEXT]
            asked = logged_requests(impressions, context=context, limit=canary_requests, before=moment)
            logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="evergreen-canary-")))
            options = ["--feature-store", str(loop.feature_store)]
            theirs = stack.enter_context(served(champion.path, log=logs / "champion.log", options=options))
            try:
                ours = stack.enter_context(served(package.path, log=logs / "challenger.log", options=options))
            except EvergreenError as error:
                seen = not_started(package.version, champion.version, str(error))
            else:
                clients = (stack.enter_context(httpx.Client(base_url=url, trust_env=False)) for url in (ours, theirs))
                expected = (
                    GateReport.read(loop.gate(moment)).mean_prediction_ratio if loop.gate(moment).is_file() else None
                )
                seen = run_canary(
                    *clients,
                    asked,
                    expected_ratio=expected or 1.0,
                    config=CanaryConfig(latency_budget_ms=latency_budget_ms),
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
                server=server_client(server_url, server_token_file),
            )
    report.metadata["passed"] = seen.passed
    return seen.passed
