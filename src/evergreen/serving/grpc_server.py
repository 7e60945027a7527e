"""KServe's GRPCInferenceService on the event loop that HTTP is served on, with the same calls, texts and limits.

What kserve 0.21's own server does, and is mended here: it listens on every address; versions are left out of metadata
and ignored in calls; a model's load answers None; errors have their class name or no text; each call writes log lines.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc import grpc_predict_v2_pb2_grpc
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.utils.utils import to_headers

from evergreen.contracts.errors import EvergreenError, RequestError
from evergreen.serving import logs
from evergreen.serving.answer import Answer
from evergreen.serving.calls import Answering, TensorCall
from evergreen.serving.protocol import RecommenderDataPlane, error_of
from evergreen.serving.settings import MAX_BODY_BYTES
from evergreen.serving.tensors import Tensor, to_binary
from evergreen.serving.validation import describe

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    409: grpc.StatusCode.ABORTED,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
}
_CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Where a tensor of each datatype has its values."""

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class GrpcCall(TensorCall):
    """ModelInfer."""

    message: Any = field(default_factory=pb.ModelInferRequest)

    def read(self) -> list[Tensor]:
        """The inputs, of `contents` or of `raw_input_contents`."""
        message = self.message
        self.id = message.id
        for output in message.outputs:
            if output.name in self.wanted:
                raise RequestError(f"outputs: {describe(output.name)} is asked for twice")
            self.wanted[output.name] = None
        raw = message.raw_input_contents
        if raw and len(raw) != len(message.inputs):
            raise RequestError(f"raw_input_contents: {len(raw)} of them for {len(message.inputs)} inputs")
        if raw:
            for tensor in message.inputs:
                if tensor.HasField("contents"):
                    raise RequestError(f"inputs.{describe(tensor.name)}: has contents beside raw_input_contents")
            return [
                Tensor(t.name, t.datatype, tuple(t.shape), data) for t, data in zip(message.inputs, raw, strict=True)
            ]
        return [Tensor(t.name, t.datatype, tuple(t.shape), _contents(t)) for t in message.inputs]

    def reply(self, answers: Sequence[Answer], model_name: str, recommender: Answering) -> Any:
        """The outputs, raw."""
        outputs = self.outputs(answers, recommender)
        version = recommender.model_version
        return pb.ModelInferResponse(
            model_name=model_name,
            model_version=version,
            id=self.id,
            parameters={"model_version": pb.InferParameter(string_param=version)},
            outputs=[
                pb.ModelInferResponse.InferOutputTensor(name=o.name, datatype=o.datatype, shape=o.shape)
                for o in outputs
            ],
            raw_output_contents=[to_binary(output) for output in outputs],
        )


class GrpcServer:
    """The service on an address."""

    def __init__(
        self,
        data_plane: RecommenderDataPlane,
        repository: Any,
        *,
        interceptors: Sequence[aio.ServerInterceptor] = (),
        max_message_bytes: int = MAX_BODY_BYTES,
    ) -> None:
        """Serve nothing yet.

        Args:
            data_plane: what answers.
            repository: what loads models.
            interceptors: around each call, the outermost first.
            max_message_bytes: of one call; a larger one is refused.
        """
        self._data_plane = data_plane
        self._repository = repository
        self._interceptors = (*interceptors, _Errors())
        self._max_message_bytes = max_message_bytes
        self._server: aio.Server | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen, in the event loop that runs.

        Args:
            host: address to listen on.
            port: to listen on; 0 chooses a free one.

        Returns:
            The port.

        Raises:
            EvergreenError: the address cannot be had.
        """
        # An answer may be larger than a question: 64 of 500 items each, with their ids.
        options = [
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # another server on the port would take half of the calls
        ]
        server = aio.server(interceptors=self._interceptors, options=options)
        servicer = _Servicer(self._data_plane, self._repository)
        grpc_predict_v2_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = server.add_insecure_port(address)
        except RuntimeError as error:
            raise EvergreenError(f"cannot listen on {address} for gRPC: is it in use?") from error
        await server.start()
        self._server = server
        return int(bound)

    async def stop(self, grace_seconds: float) -> None:
        """Take no more calls; those in flight have this long to end."""
        if self._server is not None:
            await self._server.stop(grace_seconds)


class _Servicer(InferenceServicer):  # type: ignore[misc]  # kserve has no type information
    """KServe's, with our calls."""

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802  (the service's name for it)
        call = GrpcCall(version=request.model_version or None, message=request)
        reply, _ = await self._data_plane.infer(request.model_name, call, to_headers(context))
        return reply

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        ready = await self._data_plane.model_ready(request.name, version=request.version or None)
        return pb.ModelReadyResponse(ready=ready)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        return pb.ModelMetadataResponse(
            **await self._data_plane.model_metadata(request.name, version=request.version or None)
        )

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._mode_repository_extension.load(request.model_name)
        return pb.RepositoryModelLoadResponse(model_name=request.model_name, isLoaded=True)

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._mode_repository_extension.unload(request.model_name)
        return pb.RepositoryModelUnloadResponse(model_name=request.model_name, isUnloaded=True)


class _Errors(aio.ServerInterceptor):
    """Tells a caller's mistake as one, with our text; a failure of ours is logged once and not told."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.unary_unary is None:
            return handler

        async def answer(request: Any, context: Any) -> Any:
            try:
                return await handler.unary_unary(request, context)
            except Exception as error:
                told = error_of(error)
                if told is None:
                    logger.exception("%s failed", handler_call_details.method)
                    code, text = grpc.StatusCode.INTERNAL, f"internal error, request id {logs.request_id()}"
                else:
                    code, text = _CODES.get(told[0], grpc.StatusCode.INVALID_ARGUMENT), told[1]
                await context.abort(code, text)

        return grpc.unary_unary_rpc_method_handler(answer, handler.request_deserializer, handler.response_serializer)


def _contents(tensor: Any) -> list[Any]:
    name = _CONTENTS.get(tensor.datatype)
    if name is None:
        raise RequestError(f"inputs.{describe(tensor.name)}: datatype {describe(tensor.datatype)}: no such datatype")
    for given, values in tensor.contents.ListFields():
        if given.name != name:
            raise RequestError(
                f"inputs.{describe(tensor.name)}: {len(values)} values in {given.name}; those of {tensor.datatype} "
                f"belong in {name}"
            )
    values = list(getattr(tensor.contents, name))
    if tensor.datatype != "BYTES":
        return values
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise RequestError(f"inputs.{describe(tensor.name)}: a string is not UTF-8") from None
