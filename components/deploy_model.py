"""Step: the champion of a training reaches the users of a cluster."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def deploy_model(
    training_set: dsl.Input[dsl.Dataset],
    champion: dsl.Input[dsl.Model],
    retriever: dsl.Input[dsl.Model],
    impressions: str,
    state: str,
    as_of: str,
    canary_requests: int,
    latency_budget_ms: float,
    seed: int,
    server_token_file: str,
    inference_service: str,
    namespace: str,
    model_store: str,
    model_store_path: str,
) -> str:
    """Let the first model of a loop serve at once, and any later one after the gate and a canary.

    The InferenceService is created or patched, and waited for until it answers with the new version and no other. A
    challenger that is refused, or taken back, leaves what served. Repeated, the step changes nothing.

    Args:
        training_set: of the champion; what its windows will be compared with comes from there.
        champion: the best of the models that were trained.
        retriever: the two towers that find candidates for it; nothing where none were trained.
        impressions: folder or fsspec URL of the impression log: what gate and canary ask again.
        state: folder of the loop, with its feature store.
        as_of: ISO 8601 time up to which the log was read; the champion serves from the next whole second on.
        canary_requests: how many are asked.
        latency_budget_ms: p99 milliseconds of scoring 500 candidates, and of a canary's requests.
        seed: of the gate's bootstrap.
        server_token_file: file with the bearer token that the server asks for; empty, or no such file: none.
        inference_service: to be told.
        namespace: of the InferenceService.
        model_store: where it finds its model: a URL for KServe, or pvc://claim/folder.
        model_store_path: where the folder of a claim is mounted here; empty for a URL.

    Returns:
        What became of the champion, in words.
    """
    import logging
    from datetime import datetime, timedelta
    from pathlib import Path

    from evergreen.contracts.gate import GateReport
    from evergreen.contracts.impressions import read_impressions
    from evergreen.contracts.loop_state import LoopState, put
    from evergreen.contracts.release import CanaryReport
    from evergreen.contracts.training_set import TrainingSet
    from evergreen.evaluation.gate import GateConfig, gate_challenger
    from evergreen.models.package import ModelPackage
    from evergreen.monitoring.watch import keep_reference
    from evergreen.release.canary import CanaryConfig
    from evergreen.release.deploy import promote
    from evergreen.release.inference_service import InferenceServer
    from evergreen.release.replay import context_of, logged_requests
    from evergreen.release.store import ReleaseStore
    from evergreen.step import pipeline_step

    with pipeline_step("deploy_model"):
        loop, package = LoopState(Path(state)), ModelPackage.load(Path(champion.path))
        rows, releases = TrainingSet.load(Path(training_set.path)), ReleaseStore(loop.releases)
        moment = datetime.fromisoformat(as_of)
        if moment.microsecond:  # what is in the loop's state has whole seconds for a name
            moment = moment.replace(microsecond=0) + timedelta(seconds=1)
        server = InferenceServer.connect(
            inference_service, namespace, model_store, model_store_path, token_file=server_token_file
        )
        server.models.write(
            package.version, package=package.path, feature_store=loop.feature_store, retriever=Path(retriever.path)
        )
        server.models.publish(loop.feature_store)
        # Without what an earlier try of this very step released.
        before = [one for one in loop.released() if (one.released_at, one.version) != (moment, package.version)]
        last = before[-1] if before else None
        canary, refusal, reason = None, "", "trained on schedule" if last else "the first model of the loop"
        if last is not None and last.version == package.version:
            server.serve(package.version)
            refusal = "serves already"
        elif last is not None and last.released_at > moment:
            refusal = f"is left aside: {last.version} was released at {last.released_at}, after this log's end"
        elif last is not None:
            # Latency is another one each time; what was said of this challenger stays.
            judged = GateReport.read(loop.gate(moment)) if loop.gate(moment).is_file() else None
            if judged is None or judged.challenger != package.version:
                judged = gate_challenger(
                    rows,
                    package,
                    ModelPackage.load(loop.package(last.version)),
                    served=read_impressions(impressions),
                    config=GateConfig(latency_budget_ms=latency_budget_ms, seed=seed),
                )
                put(loop.gate(moment), judged)
            if not judged.passed:
                refusal = f"is refused by the gate: {judged.reason}"
            else:
                canary = CanaryReport.read(loop.canary(moment)) if loop.canary(moment).is_file() else None
                if canary is None or canary.challenger != package.version:
                    asked = logged_requests(
                        impressions, context=context_of(package.info.features), limit=canary_requests, before=moment
                    )
                    canary = server.try_out(
                        package.version,
                        asked,
                        expected_ratio=judged.mean_prediction_ratio or 1.0,
                        config=CanaryConfig(latency_budget_ms=latency_budget_ms),
                    )
                    put(loop.canary(moment), canary)
                refusal = "" if canary.passed else f"is taken back by the canary: {canary.failures}"
        if not refusal:
            keep_reference(loop, rows, package)
            promote(releases, package.path, package.version, as_of=moment, reason=reason, canary=canary, server=server)
        outcome = f"{package.version} {refusal or f'serves: {reason}'}"
        logging.getLogger("evergreen").info("%s", outcome)
    return outcome
