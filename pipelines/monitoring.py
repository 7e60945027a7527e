"""The backward half of the loop: from what was served and clicked to a decision, and to what follows from it.

A recurring run executes it once a window. Features are brought up to date in any case; the trainer is inside, under a
condition, so that one graph tells the whole story and no step needs a client or a token to start another pipeline.
"""

from typing import NamedTuple

from kfp import dsl

from components.decide_retraining import decide_retraining
from components.finish_run import finish_run
from components.gate_challenger import gate_challenger
from components.join_outcomes import join_outcomes
from components.monitor_window import monitor_window
from components.read_clock import read_clock
from components.refresh_features import refresh_features
from components.release_model import release_model
from components.roll_back_model import roll_back_model
from components.start_run import start_run
from pipelines.training import (
    IMPRESSIONS,
    INFERENCE_SERVICE,
    MODEL_STORE,
    NAMESPACE,
    STATE,
    STORE_CONFIG,
    TOKEN_FILE,
    feature_steps,
    model_steps,
)

THE_SAME: list = []
DEFAULTS: dict = {}
CLICKS = "s3://mlpipeline/evergreen/clicks"


class MonitoringOutputs(NamedTuple):
    """What the monitoring pipeline leaves behind, whatever the verdict is; the loop's state holds the rest."""

    report: dsl.Artifact
    page: dsl.HTML
    decision: dsl.Artifact


@dsl.pipeline(name="evergreen-retraining", description="Fresh rows to a challenger, past the gate and the canary.")
def retraining_pipeline(
    snapshot: dsl.Input[dsl.Dataset],
    feature_tables: dsl.Input[dsl.Dataset],
    decision: dsl.Input[dsl.Artifact],
    incumbent: dsl.Input[dsl.Model],
    start: str,
    leave_out: list,
    changed_at: str,
    batch_hours: float,
    models: list,
    impressions: str,
    state: str,
    as_of: str,
    latency_budget_ms: float,
    canary_requests: int,
    server_url: str,
    server_token_file: str,
    inference_service: str,
    namespace: str,
    model_store: str,
    model_store_path: str,
    seed: int,
) -> None:
    """Train on the fresh window, and release the challenger if it is better.

    Args:
        snapshot: the log without suspicious events.
        feature_tables: its features.
        decision: that calls for the run.
        incumbent: the package that serves.
        start: ISO 8601 time from which rows are learned from.
        leave_out: ranges of time in which the data was broken.
        changed_at: ISO 8601 time since which the world is another, if it is.
        batch_hours: how often the features that serve are materialized.
        models: names of the model registry to train.
        impressions: as in `monitoring_pipeline`, like all that follow.
        state: folder of the loop.
        as_of: of the run.
        latency_budget_ms: of models and servers.
        canary_requests: how many a canary is asked.
        server_url: server to be told.
        server_token_file: its token.
        inference_service: to be told in its stead.
        namespace: of the InferenceService.
        model_store: where it finds its model.
        model_store_path: where that is mounted.
        seed: of everything drawn at random.
    """
    built, _, evaluated = model_steps(
        snapshot=snapshot,
        feature_tables=feature_tables,
        models=models,
        latency_budget_ms=latency_budget_ms,
        seed=seed,
        start=start,
        leave_out=leave_out,
        changed_at=changed_at,
        batch_hours=batch_hours,
        incumbent=incumbent,
    )
    rows, challenger = built.outputs["training_set"], evaluated.outputs["champion"]
    gated = gate_challenger(
        training_set=rows,
        challenger=challenger,
        incumbent=incumbent,
        impressions=impressions,
        state=state,
        as_of=as_of,
        latency_budget_ms=latency_budget_ms,
        seed=seed,
    )
    with dsl.If(gated.outputs["Output"] == True, name="passed"):  # noqa: E712  # a condition of the graph, not of Python
        release_model(
            training_set=rows,
            challenger=challenger,
            retriever=evaluated.outputs["retriever"],
            incumbent=incumbent,
            decision=decision,
            impressions=impressions,
            state=state,
            as_of=as_of,
            canary_requests=canary_requests,
            latency_budget_ms=latency_budget_ms,
            server_url=server_url,
            server_token_file=server_token_file,
            inference_service=inference_service,
            namespace=namespace,
            model_store=model_store,
            model_store_path=model_store_path,
        )


@dsl.pipeline(
    name="evergreen-monitoring", description="Outcomes, monitors, decision; retraining or rollback if called for."
)
def monitoring_pipeline(
    log_uri: str,
    mapping: str = "simulated",
    impressions: str = IMPRESSIONS,
    clicks: str = CLICKS,
    state: str = STATE,
    as_of: str = "",
    window_hours: float = 24.0,
    training_days: int = 28,
    test_hours: float = 24.0,
    feature_batch_hours: float = 24.0,
    late_days: int = 7,
    models: list = THE_SAME,
    decision_config: dict = DEFAULTS,
    latency_budget_ms: float = 50.0,
    canary_requests: int = 500,
    server_url: str = "",
    server_token_file: str = TOKEN_FILE,
    inference_service: str = INFERENCE_SERVICE,
    namespace: str = NAMESPACE,
    model_store: str = MODEL_STORE,
    model_store_path: str = "",
    store_config: str = STORE_CONFIG,
    live: bool = False,
    check_leakage: bool = False,
    false_positive_share: float = 0.005,
    seed: int = 0,
) -> MonitoringOutputs:
    """Watch the window that ends at `as_of`, and do what follows from it.

    Args:
        log_uri: path or fsspec URL of the click log, with what was served since: features and training read it.
        mapping: name of a shipped mapping, URL of a TOML file, or TOML text.
        impressions: folder or fsspec URL of the server's impression log.
        clicks: file, folder or fsspec URL of the clicks on what it served.
        state: folder of the loop, on a volume that all runs share; see `contracts.loop_state`.
        as_of: ISO 8601 time, in whole seconds; empty, as in a recurring run: the end of the last whole window.
        window_hours: length of the window: the time between two runs.
        training_days: how many days before `as_of` a training learns from.
        test_hours: of these the newest: so many are tested on, and so many before them validated on.
        feature_batch_hours: how often features are materialized, so that training rows know what the server knew: the
            time between two runs; 0: they are streamed.
        late_days: after so many days a late click changes no outcome any more.
        models: names of the model registry to train; empty: the one that serves.
        decision_config: thresholds of `DecisionConfig` that are not its defaults.
        latency_budget_ms: p99 milliseconds of scoring 500 candidates, and of a canary's requests.
        canary_requests: how many of the newest logged requests a canary is asked.
        server_url: server to be told of a release, started with --allow-reload; empty: it reads the link at its start.
        server_token_file: file with its bearer token, or the InferenceService's, if it asks for one.
        inference_service: of a cluster, to be told in its stead; empty: there is no cluster.
        namespace: of the InferenceService.
        model_store: where InferenceServices find models and the catalogue: a URL for KServe, or pvc://claim/folder.
        model_store_path: where the folder of a claim is mounted in the steps; empty for a URL.
        store_config: file of feature_repo/ that says which feature stores.
        live: the server's clock is the log's, so that old impressions need not be read; not where a log is replayed.
        check_leakage: prove on this log that no feature knows its future; half of the feature building again.
        false_positive_share: share of people whom the filter of events may take for bots; 0: only what rules catch.
        seed: of everything drawn at random.
    """
    moment = read_clock(as_of=as_of, window_hours=window_hours).output
    ingested, filtered, features = feature_steps(
        mapping=mapping,
        log_uri=log_uri,
        as_of=moment,
        test_hours=test_hours,
        check_leakage=check_leakage,
        false_positive_share=false_positive_share,
    )
    tables = features.outputs["feature_tables"]
    joined = join_outcomes(
        mapping=mapping,
        impressions=impressions,
        clicks=clicks,
        state=state,
        as_of=moment,
        late_days=late_days,
        live=live,
    )
    monitored = monitor_window(
        snapshot=ingested.outputs["snapshot"],
        suspicious=filtered.outputs["suspicious"],
        impressions=impressions,
        state=state,
        as_of=moment,
        window_hours=window_hours,
        batch_hours=feature_batch_hours,
        live=live,
    ).after(joined)
    # Not before: what served in the window is compared with what the store holds until then.
    refreshed = refresh_features(
        feature_tables=tables,
        as_of=moment,
        state=state,
        store_config=store_config,
        model_store=model_store,
        model_store_path=model_store_path,
    ).after(monitored)
    decided = decide_retraining(
        report=monitored.outputs["report"],
        state=state,
        as_of=moment,
        training_days=training_days,
        config=decision_config,
    )
    decision = decided.outputs["decision"]
    with dsl.If(decided.outputs["Output"] == "retrain", name="retrain"):
        started = start_run(decision=decision, state=state, as_of=moment, training_days=training_days, models=models)
        retrained = retraining_pipeline(
            snapshot=filtered.outputs["filtered"],
            feature_tables=tables,
            decision=decision,
            incumbent=started.outputs["incumbent"],
            start=started.outputs["start"],
            leave_out=started.outputs["leave_out"],
            changed_at=started.outputs["changed_at"],
            batch_hours=feature_batch_hours,
            models=started.outputs["models"],
            impressions=impressions,
            state=state,
            as_of=moment,
            latency_budget_ms=latency_budget_ms,
            canary_requests=canary_requests,
            server_url=server_url,
            server_token_file=server_token_file,
            inference_service=inference_service,
            namespace=namespace,
            model_store=model_store,
            model_store_path=model_store_path,
            seed=seed,
        ).after(refreshed)  # a canary asks the feature store
        finish_run(state=state, as_of=moment).after(retrained)
    with dsl.If(decided.outputs["Output"] == "rollback", name="rollback"):
        roll_back_model(
            decision=decision,
            reason="",
            state=state,
            as_of=moment,
            server_url=server_url,
            server_token_file=server_token_file,
            inference_service=inference_service,
            namespace=namespace,
            model_store=model_store,
            model_store_path=model_store_path,
        )
    return MonitoringOutputs(report=monitored.outputs["report"], page=monitored.outputs["page"], decision=decision)
