"""The forward half of the loop: from a click log to a champion and the features that it is served with."""

from typing import NamedTuple

from kfp import dsl

from components.build_feature_tables import build_feature_tables
from components.build_training_set import build_training_set
from components.deploy_model import deploy_model
from components.evaluate_models import evaluate_models
from components.filter_events import filter_events
from components.ingest_log import ingest_log
from components.materialize_features import materialize_features
from components.report_drift import report_drift
from components.summarize_run import summarize_run
from components.train_model import train_model
from evergreen.models.registry import MODEL_NAMES

MODELS = list(MODEL_NAMES)

# What a person need not type on a cluster: as manifests/steps and the kind overlay have it.
STATE = "/state"
IMPRESSIONS = "s3://mlpipeline/evergreen/impressions"
MODEL_STORE = "s3://mlpipeline/evergreen/models"
STORE_CONFIG = "feature_store.cluster.yaml"
TOKEN_FILE = "/etc/evergreen/tokens/tokens"
INFERENCE_SERVICE = "evergreen"
NAMESPACE = "evergreen"


class FeatureSteps(NamedTuple):
    """Channels that a pipeline gets from `feature_steps`."""

    ingested: dsl.PipelineTask
    filtered: dsl.PipelineTask
    features: dsl.PipelineTask


class ModelSteps(NamedTuple):
    """Channels that a pipeline gets from `model_steps`."""

    training_set: dsl.PipelineTask
    train_usages: dsl.Collected
    evaluated: dsl.PipelineTask


def feature_steps(
    *, mapping: str, log_uri: str, as_of: str, test_hours: float, check_leakage: bool, false_positive_share: float
) -> FeatureSteps:
    """From a log to features: what training needs, and what serving needs with every window.

    Called while a pipeline is described; the arguments are its parameters.
    """
    ingested = ingest_log(mapping=mapping, log_uri=log_uri, as_of=as_of, test_hours=test_hours)
    filtered = filter_events(snapshot=ingested.outputs["snapshot"], false_positive_share=false_positive_share)
    features = build_feature_tables(snapshot=filtered.outputs["filtered"], check_leakage=check_leakage)
    return FeatureSteps(ingested, filtered, features)


def model_steps(
    *,
    snapshot: dsl.Dataset,
    feature_tables: dsl.Dataset,
    models: list,
    latency_budget_ms: float,
    seed: int,
    start: str,
    leave_out: list,
    changed_at: str,
    batch_hours: float,
    incumbent: dsl.Model | None = None,
) -> ModelSteps:
    """From features to the best model: the trainer, on its own and inside the monitoring pipeline.

    Called while a pipeline is described, like `feature_steps`. For `start`, `leave_out`, `changed_at`, `batch_hours`
    and `incumbent` see the steps `build_training_set` and `train_model`.
    """
    built = build_training_set(
        snapshot=snapshot,
        feature_tables=feature_tables,
        seed=seed,
        start=start,
        leave_out=leave_out,
        changed_at=changed_at,
        batch_hours=batch_hours,
    )
    rows = built.outputs["training_set"]
    with dsl.ParallelFor(models, parallelism=2) as model:
        given = {"incumbent": incumbent} if incumbent is not None else {}
        trained = train_model(training_set=rows, model=model, seed=seed, changed_at=changed_at, **given)
    evaluated = evaluate_models(
        snapshot=snapshot,
        feature_tables=feature_tables,
        training_set=rows,
        packages=dsl.Collected(trained.outputs["package"]),
        latency_budget_ms=latency_budget_ms,
        seed=seed,
    )
    return ModelSteps(built, dsl.Collected(trained.outputs["usage"]), evaluated)


class TrainingOutputs(NamedTuple):
    """What the training pipeline leaves behind."""

    champion: dsl.Model
    retriever: dsl.Model
    feature_store: dsl.Artifact
    report: dsl.HTML
    drift_report: dsl.HTML
    filter_report: dsl.HTML
    summary: dsl.Artifact


@dsl.pipeline(
    name="evergreen-training", description="Click log to champion: snapshot, features, models, evaluation, release."
)
def training_pipeline(
    log_uri: str,
    mapping: str = "simulated",
    as_of: str = "",
    models: list = MODELS,
    latency_budget_ms: float = 50.0,
    seed: int = 0,
    check_leakage: bool = True,
    false_positive_share: float = 0.005,
    feature_batch_hours: float = 1.0,
    state: str = STATE,
    store_config: str = STORE_CONFIG,
    impressions: str = IMPRESSIONS,
    canary_requests: int = 500,
    server_token_file: str = TOKEN_FILE,
    inference_service: str = INFERENCE_SERVICE,
    namespace: str = NAMESPACE,
    model_store: str = MODEL_STORE,
    model_store_path: str = "",
) -> TrainingOutputs:
    """Train all models on a log up to `as_of`, choose the champion, and on a cluster let it serve.

    Args:
        log_uri: path or fsspec URL of the log.
        mapping: name of a shipped mapping, URL of a TOML file, or TOML text.
        as_of: ISO 8601 time up to which the log is read; empty for all of it.
        models: names of the model registry to train.
        latency_budget_ms: p99 milliseconds that scoring 500 candidates may take.
        seed: of everything drawn at random.
        check_leakage: prove on this log that no feature knows its future; half of the feature building again.
        false_positive_share: share of people whom the filter of events may take for bots; 0: only what rules catch.
        feature_batch_hours: how often the features that serve will be materialized, which is with every run of the
            monitor; 0: they are streamed.
        state: folder of the loop that the champion belongs to, on a volume that all runs share; empty: there is none.
        store_config: file of feature_repo/ that says which feature stores.
        impressions: folder or fsspec URL of the impression log: what gate and canary of a later champion ask again.
        canary_requests: how many of the newest logged requests a canary is asked.
        server_token_file: file with the bearer token that servers ask for, if they do.
        inference_service: to be told of the champion; empty: the artifacts are the end of it.
        namespace: of the InferenceService.
        model_store: where InferenceServices find models: a URL for KServe, or pvc://claim/folder.
        model_store_path: where the folder of a claim is mounted in the steps; empty for a URL.
    """
    ingested, filtered, features = feature_steps(
        mapping=mapping,
        log_uri=log_uri,
        as_of=as_of,
        test_hours=0.0,
        check_leakage=check_leakage,
        false_positive_share=false_positive_share,
    )
    snapshot, tables = filtered.outputs["filtered"], features.outputs["feature_tables"]
    built, train_usages, evaluated = model_steps(
        snapshot=snapshot,
        feature_tables=tables,
        models=models,
        latency_budget_ms=latency_budget_ms,
        seed=seed,
        start="",
        leave_out=[],
        changed_at="",
        batch_hours=feature_batch_hours,
    )
    rows = built.outputs["training_set"]
    drift = report_drift(training_set=rows, seed=seed)
    materialized = materialize_features(
        feature_tables=tables, as_of=ingested.outputs["as_of"], state=state, store_config=store_config
    )
    with dsl.If(inference_service != "", name="deploy"):
        deploy_model(
            training_set=rows,
            champion=evaluated.outputs["champion"],
            retriever=evaluated.outputs["retriever"],
            impressions=impressions,
            state=state,
            as_of=ingested.outputs["as_of"],
            canary_requests=canary_requests,
            latency_budget_ms=latency_budget_ms,
            seed=seed,
            server_token_file=server_token_file,
            inference_service=inference_service,
            namespace=namespace,
            model_store=model_store,
            model_store_path=model_store_path,
        ).after(materialized)  # the bundle has the feature store in it
    summarized = summarize_run(
        snapshot=snapshot,
        training_set=rows,
        evaluation=evaluated.outputs["evaluation"],
        ingest_usage=ingested.outputs["usage"],
        filter_usage=filtered.outputs["usage"],
        feature_tables_usage=features.outputs["usage"],
        training_set_usage=built.outputs["usage"],
        training_usages=train_usages,
        evaluation_usage=evaluated.outputs["usage"],
        drift_usage=drift.outputs["usage"],
        materialize_usage=materialized.outputs["usage"],
    )
    return TrainingOutputs(
        champion=evaluated.outputs["champion"],
        retriever=evaluated.outputs["retriever"],
        feature_store=materialized.outputs["feature_store"],
        report=evaluated.outputs["report"],
        drift_report=drift.outputs["report"],
        filter_report=filtered.outputs["report"],
        summary=summarized.outputs["summary"],
    )
