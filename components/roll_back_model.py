"""Step: the model that served before serves again."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def roll_back_model(
    reason: str,
    state: str,
    as_of: str,
    server_url: str,
    server_token_file: str,
    inference_service: str,
    namespace: str,
    model_store: str,
    model_store_path: str,
    decision: dsl.Input[dsl.Artifact] = None,
) -> str:
    """Go back to the version that served before. Repeated after it was killed, the step goes back once.

    Args:
        reason: why, for people; empty: the decision's.
        state: folder of the loop.
        as_of: ISO 8601 time from which the other model serves.
        server_url: as in `release_model`, like all that follow.
        server_token_file: likewise.
        inference_service: likewise.
        namespace: likewise.
        model_store: likewise.
        model_store_path: likewise.
        decision: that calls for it, if it is not a person who does.

    Returns:
        The version that serves.
    """
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.loop_state import LoopState
    from evergreen.release.deploy import roll_back, server_client
    from evergreen.release.inference_service import InferenceServer
    from evergreen.release.store import ReleaseStore
    from evergreen.step import pipeline_step

    with pipeline_step("roll_back_model"):
        server = server_client(server_url, server_token_file)
        if inference_service:
            server = InferenceServer.connect(
                inference_service, namespace, model_store, model_store_path, token_file=server_token_file
            )
        release = roll_back(
            ReleaseStore(LoopState(Path(state)).releases),
            as_of=datetime.fromisoformat(as_of),
            reason=reason or RetrainDecision.read(Path(decision.path)).reason,
            server=server,
        )
    return release.version
