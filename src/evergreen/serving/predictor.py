"""The KServe model: each call is read, answered and written by one recommender. All thinking is in `recommender`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import kserve
from kserve.model import InferenceVerb

from evergreen.serving.answer import Answer
from evergreen.serving.calls import Answering, Call
from evergreen.serving.schema import RankingRequest
from evergreen.serving.stages import Stage, timed
from evergreen.serving.tensors import input_types, output_types


class Recommender(Answering, Protocol):
    """What a predictor needs of `serving.recommender.Recommender`."""

    async def answer(self, requests: Sequence[RankingRequest]) -> list[Answer]:
        """The answers, in order."""


class Slot(Protocol):
    """What a predictor needs of `serving.repository.ModelSlot`: the recommender of the moment."""

    @property
    def loaded(self) -> bool:
        """Whether there is one."""

    @property
    def recommender(self) -> Recommender:
        """The one that answers now. Raises ModelNotReady while there is none."""

    def use(self) -> AbstractContextManager[Recommender]:
        """The one that answers now, kept open while it is in use. Raises ModelNotReady while there is none."""


@dataclass(frozen=True, slots=True)
class _Step:
    """A call on its way through KServe's three hooks."""

    call: Call
    recommender: Recommender
    requests: Sequence[RankingRequest] = ()
    answers: Sequence[Answer] = ()


class RecommenderModel(kserve.Model):  # type: ignore[misc]  # kserve has no type information
    """Answers `Call`s by the recommender in a slot; one call meets one recommender, whatever is put there meanwhile."""

    def __init__(self, name: str, slot: Slot) -> None:
        """Name the model.

        Args:
            name: in the URL.
            slot: what answers.
        """
        super().__init__(name)
        self.slot = slot

    @property
    def ready(self) -> bool:
        """Whether there is something that answers."""
        return self.slot.loaded

    @ready.setter
    def ready(self, value: bool) -> None:
        """Ignored: KServe sets it, whether anything is loaded or not."""

    def load(self) -> bool:
        """Whether the model is loaded: `serving.repository` does it."""
        return self.ready

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2 metadata: name, datatype and shape of the inputs."""
        rules = self.slot.recommender.rules
        return input_types(has_users=rules.has_users, has_items=rules.has_items)

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2 metadata: name, datatype and shape of the outputs."""
        recommender = self.slot.recommender
        return output_types(recommender.value_name, has_items=recommender.rules.has_items)

    async def __call__(
        self, body: Call, headers: dict[str, str] | None = None, verb: InferenceVerb = InferenceVerb.PREDICT
    ) -> tuple[Any, dict[str, str]]:
        """KServe's preprocess, predict and postprocess, which its metrics time.

        Raises:
            RequestError: the call is malformed.
            ModelNotReady: nothing is loaded.
        """
        with self.slot.use() as recommender:
            reply: tuple[Any, dict[str, str]] = await super().__call__(_Step(body, recommender), headers, verb)
            return reply

    def validate(self, payload: _Step) -> _Step:
        """The step as it is: `preprocess` has checked more than KServe would."""
        return payload

    async def preprocess(self, payload: _Step, headers: dict[str, str] | None = None) -> _Step:
        """Read the call."""
        with timed(Stage.PARSE):
            return _Step(payload.call, payload.recommender, payload.call.requests(payload.recommender))

    async def predict(self, payload: _Step, headers: dict[str, str] | None = None) -> _Step:
        """Answer its requests."""
        answers = await payload.recommender.answer(payload.requests)
        return _Step(payload.call, payload.recommender, payload.requests, answers)

    async def postprocess(self, result: _Step, headers: dict[str, str] | None = None) -> Any:
        """Write the answers in the protocol of the call."""
        with timed(Stage.ENCODE):
            return result.call.reply(result.answers, self.name, result.recommender)
