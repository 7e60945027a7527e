"""The KServe model: translates V1 and V2 calls to requests, and answers back. All thinking is in `recommender`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import kserve

from evergreen.contracts.errors import RequestError
from evergreen.serving.recommender import Recommender
from evergreen.serving.schema import RankingRequest, Recommendation
from evergreen.serving.tensors import Tensor, input_types, instances_of, output_types, outputs_of, tensor_field
from evergreen.serving.validation import describe


@dataclass(frozen=True)
class Call:
    """One decoded call: its requests, and the V2 call that they came in (None for V1)."""

    requests: list[RankingRequest]
    v2: kserve.InferRequest | None


@dataclass(frozen=True)
class Answer:
    """The answers to one call, in its order."""

    call: Call
    recommendations: list[Recommendation]


class RecommenderModel(kserve.Model):  # type: ignore[misc]  # kserve has no type information
    """Serves one `Recommender`.

    V1: `{"instances": [RankingRequest, …]}` → `{"predictions": [Recommendation, …]}`, see `schema`.
    V2: tensors in, tensors out, see `tensors`; the model's version is in `model_version` and in the parameters.
    """

    def __init__(self, name: str, open_recommender: Callable[[], Recommender]) -> None:
        """Name the model; nothing is loaded yet.

        Args:
            name: in the URL.
            open_recommender: loads the model and its features; called once, by `load`.
        """
        super().__init__(name)
        self._open = open_recommender
        self._recommender: Recommender | None = None
        # One thread: scoring must not hold up the event loop, which answers the health checks, and more threads would
        # only share the same core and the same SQLite connection.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ranker")

    def load(self) -> bool:
        """Load the model and its features, then say that it is ready."""
        self._recommender = self._open()
        self.ready = True
        return True

    def start(self) -> None:
        """Do nothing: kserve's own would call the model ready whether it is loaded or not."""

    @property
    def recommender(self) -> Recommender:
        """What answers; there once the model is loaded."""
        if self._recommender is None:
            raise kserve.errors.ModelNotReady(self.name)
        return self._recommender

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2 metadata: name, datatype and shape of the inputs."""
        rules = self.recommender.rules
        return input_types(has_users=rules.has_users, has_items=rules.has_items)

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2 metadata: name, datatype and shape of the outputs."""
        return output_types(self.recommender.value_name, has_items=self.recommender.rules.has_items)

    async def preprocess(
        self, payload: dict[str, Any] | kserve.InferRequest, headers: dict[str, str] | None = None
    ) -> Call:
        """Check a call.

        Raises:
            RequestError: it is malformed; says where and what is wrong.
        """
        rules = self.recommender.rules
        if not isinstance(payload, kserve.InferRequest):
            return Call(rules.parse_body(payload), v2=None)
        self._check_envelope(payload)
        inputs = [Tensor(i.name, i.datatype, tuple(i.shape), i.data) for i in payload.inputs]
        return Call(rules.parse(instances_of(inputs), tensor_field), v2=payload)

    async def predict(
        self, payload: Call, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> Answer:
        """Rank, beside the event loop."""
        loop = asyncio.get_running_loop()
        return Answer(payload, await loop.run_in_executor(self._executor, self._rank, payload.requests))

    async def postprocess(
        self, result: Answer, headers: dict[str, str] | None = None, response_headers: dict[str, str] | None = None
    ) -> dict[str, Any] | kserve.InferResponse:
        """Write the answers in the protocol of the call."""
        if result.call.v2 is None:
            return {"predictions": [r.model_dump(mode="json", exclude_none=True) for r in result.recommendations]}
        wanted = {output.name for output in result.call.v2.request_outputs or ()}
        recommender = self.recommender
        outputs = outputs_of(result.recommendations, recommender.value_name, has_items=recommender.rules.has_items)
        return kserve.InferResponse(
            response_id=result.call.v2.id or "",
            model_name=self.name,
            model_version=recommender.model_version,
            infer_outputs=[
                kserve.InferOutput(name=o.name, shape=list(o.shape), datatype=o.datatype, data=list(o.data))
                for o in outputs
                if not wanted or o.name in wanted
            ],
            parameters={"model_version": recommender.model_version},
        )

    def _rank(self, requests: list[RankingRequest]) -> list[Recommendation]:
        return [self.recommender.recommend(request) for request in requests]

    def _check_envelope(self, payload: kserve.InferRequest) -> None:
        """Raise RequestError for what a V2 call says about itself and its answer, and cannot have."""
        if payload.id and not payload.id.isprintable():  # it is echoed, and JSON can hold half a surrogate pair
            raise RequestError(f"id={describe(payload.id)}: must be printable text")
        known = [output["name"] for output in self.get_output_types()]
        for output in payload.request_outputs or ():
            if output.name not in known:
                raise RequestError(f"outputs: no such output {describe(output.name)}; known: {', '.join(known)}")
        if payload.use_binary_outputs or any(output.binary_data for output in payload.request_outputs or ()):
            raise RequestError("binary tensor data is not offered: leave out binary_data and binary_data_output")
