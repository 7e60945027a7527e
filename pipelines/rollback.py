"""The way back by one command: `kfp run create -f pipelines/compiled/rollback.yaml reason=...`."""

from kfp import dsl

from components.read_clock import read_clock
from components.roll_back_model import roll_back_model
from pipelines.training import INFERENCE_SERVICE, MODEL_STORE, NAMESPACE, STATE, TOKEN_FILE

_SECOND = 1 / 3600  # hours


@dsl.pipeline(name="evergreen-rollback", description="The model that served before serves again.")
def rollback_pipeline(
    reason: str,
    as_of: str = "",
    state: str = STATE,
    server_url: str = "",
    server_token_file: str = TOKEN_FILE,
    inference_service: str = INFERENCE_SERVICE,
    namespace: str = NAMESPACE,
    model_store: str = MODEL_STORE,
    model_store_path: str = "",
) -> None:
    """Go back to the model that served before the one that serves now.

    Args:
        reason: why; goes into the history of releases.
        as_of: ISO 8601 time from which the other model serves, in whole seconds; empty: now.
        state: folder of the loop.
        server_url: as in `monitoring_pipeline`, like all that follow.
        server_token_file: likewise.
        inference_service: likewise.
        namespace: likewise.
        model_store: likewise.
        model_store_path: likewise.
    """
    roll_back_model(
        reason=reason,
        state=state,
        as_of=read_clock(as_of=as_of, window_hours=_SECOND).output,
        server_url=server_url,
        server_token_file=server_token_file,
        inference_service=inference_service,
        namespace=namespace,
        model_store=model_store,
        model_store_path=model_store_path,
    )
