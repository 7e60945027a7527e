"""Step: the model that served before serves again."""

from kfp import dsl

from components.image import PIPELINE_IMAGE


@dsl.component(base_image=PIPELINE_IMAGE, install_kfp_package=False)
def roll_back_model(
    decision: dsl.Input[dsl.Artifact], state: str, as_of: str, server_url: str, server_token_file: str
) -> str:
    """Go back to the version that the decision names. Repeated after it was killed, the step goes back once.

    Args:
        decision: that calls for it.
        state: folder of the loop.
        as_of: ISO 8601 time from which the other model serves.
        server_url: as in `release_model`.
        server_token_file: as in `release_model`.

    Returns:
        The version that serves.
    """
    from datetime import datetime
    from pathlib import Path

    from evergreen.contracts.decision import RetrainDecision
    from evergreen.contracts.loop_state import LoopState
    from evergreen.release.deploy import roll_back, server_client
    from evergreen.release.store import ReleaseStore
    from evergreen.step import pipeline_step

    with pipeline_step("roll_back_model"):
        release = roll_back(
            ReleaseStore(LoopState(Path(state)).releases),
            as_of=datetime.fromisoformat(as_of),
            reason=RetrainDecision.read(Path(decision.path)).reason,
            server=server_client(server_url, server_token_file),
        )
    return release.version
