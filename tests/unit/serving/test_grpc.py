"""The real gRPC server on loopback, with a stand-in model behind it."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from kserve.protocol.grpc import grpc_predict_v2_pb2 as pb
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import GRPCInferenceServiceStub

from evergreen.contracts.errors import EvergreenError
from evergreen.serving.server import Background, serving_in_background
from evergreen.serving.settings import MAX_BODY_BYTES, ServeSettings


@dataclass(frozen=True)
class Served:
    stub: Any
    server: Background
    parts: Any

    def infer(self, *inputs: Any, **call: Any) -> Any:
        return self.stub.ModelInfer(pb.ModelInferRequest(model_name="evergreen", inputs=inputs, **call), timeout=20)

    def refusal(self, *inputs: Any, **call: Any) -> tuple[grpc.StatusCode, str]:
        with pytest.raises(grpc.RpcError) as caught:
            self.infer(*inputs, **call)
        return caught.value.code(), caught.value.details()


@pytest.fixture(scope="module")
def served(parts: Callable[[str], Any]) -> Iterator[Served]:
    serving = parts("impressions")
    recommender = serving.other()  # closed with the server

    async def open_model(path: Path) -> Any:
        return recommender

    settings = ServeSettings(model=Path("m"), feature_store=Path("f"), host="127.0.0.1", port=0, grpc_port=0)
    with (
        serving_in_background(settings, open_model) as server,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}", [("grpc.max_send_message_length", -1)]) as channel,
    ):
        yield Served(GRPCInferenceServiceStub(channel), server, serving)


def tensor(name: str, datatype: str, shape: list[int], **contents: Any) -> Any:
    return pb.ModelInferRequest.InferInputTensor(
        name=name, datatype=datatype, shape=shape, contents=pb.InferTensorContents(**contents) if contents else None
    )


def strings(data: bytes) -> list[str]:
    found = []
    while data:
        (length,) = struct.unpack_from("<I", data)
        found.append(data[4 : 4 + length].decode())
        data = data[4 + length :]
    return found


USER = tensor("user_id", "BYTES", [1], bytes_contents=[b"u1"])


def test_contents_and_raw_contents_are_answered_alike_and_as_over_http(served: Served) -> None:
    at = b"2026-03-12T05:00:00Z"
    given = served.infer(
        USER,
        tensor("k", "INT64", [1], int64_contents=[3]),
        tensor("diversity", "FP64", [1], fp64_contents=[0.5]),
        tensor("exclude_seen", "BOOL", [1], bool_contents=[True]),
        tensor("event_timestamp", "BYTES", [1], bytes_contents=[at]),
        id="42",
    )
    raw = served.infer(
        tensor("user_id", "BYTES", [1]),
        tensor("k", "INT64", [1]),
        tensor("diversity", "FP64", [1]),
        tensor("exclude_seen", "BOOL", [1]),
        tensor("event_timestamp", "BYTES", [1]),
        raw_input_contents=[
            b"\x02\0\0\0u1",
            struct.pack("<q", 3),
            struct.pack("<d", 0.5),
            b"\1",
            struct.pack("<I", len(at)) + at,
        ],
    )
    version = served.parts.package.version
    assert (given.id, given.model_name, given.model_version) == ("42", "evergreen", version)
    names = [output.name for output in given.outputs]
    assert names == [output.name for output in raw.outputs]
    found = dict(zip(names, given.raw_output_contents, strict=True))
    again = dict(zip(names, raw.raw_output_contents, strict=True))
    assert found.pop("request_id") != again.pop("request_id") and found == again
    expected = served.parts.ask(
        user_id="u1", k=3, diversity=0.5, exclude_seen=True, event_timestamp="2026-03-12T05:00:00Z"
    )
    assert strings(found["item_id"]) == expected.item_ids
    np.testing.assert_allclose(np.frombuffer(found["probability"], "<f4"), expected.scores, atol=1e-6)
    assert json.loads(strings(found["notes"])[0])["event_timestamp"] == "2026-03-12T05:00:00+00:00"


def test_only_the_outputs_asked_for_are_given(served: Served) -> None:
    wanted = [pb.ModelInferRequest.InferRequestedOutputTensor(name="item_id")]
    answer = served.infer(USER, outputs=wanted)
    assert [output.name for output in answer.outputs] == ["item_id"] and len(answer.raw_output_contents) == 1


@pytest.mark.parametrize(
    ("inputs", "call", "code", "message"),
    [
        ([], {}, "INVALID_ARGUMENT", "inputs: empty"),
        ([USER, USER], {}, "INVALID_ARGUMENT", "inputs.user_id: given twice"),
        ([tensor("users", "BYTES", [1], bytes_contents=[b"u"])], {}, "INVALID_ARGUMENT", "no such input 'users'"),
        ([tensor("user_id", "TEXT", [1], bytes_contents=[b"u"])], {}, "INVALID_ARGUMENT", "datatype 'TEXT': no such"),
        ([tensor("user_id", "BYTES", [2], bytes_contents=[b"u"])], {}, "INVALID_ARGUMENT", "do not fill the shape [2]"),
        ([tensor("user_id", "BYTES", [1])], {}, "INVALID_ARGUMENT", "0 values in data do not fill the shape [1]"),
        ([tensor("user_id", "BYTES", [1], bytes_contents=[b"\xff"])], {}, "INVALID_ARGUMENT", "is not UTF-8"),
        (
            [tensor("user_id", "BYTES", [1], int64_contents=[1])],
            {},
            "INVALID_ARGUMENT",
            "1 values in int64_contents; those of BYTES belong in bytes_contents",
        ),
        ([USER], {"raw_input_contents": [b"u1"]}, "INVALID_ARGUMENT", "has contents beside raw_input_contents"),
        ([USER], {"raw_input_contents": [b"", b""]}, "INVALID_ARGUMENT", "raw_input_contents: 2 of them for 1 inputs"),
        (
            [tensor("user_id", "BYTES", [1])],
            {"raw_input_contents": [b"u1"]},
            "INVALID_ARGUMENT",
            "inputs.user_id: its binary data ends after 0 of 1 strings",
        ),
        ([USER], {"id": "a\nb"}, "INVALID_ARGUMENT", "id='a\\nb': must be printable text"),
        ([USER], {"model_version": "7"}, "NOT_FOUND", "version '7': not served; version"),
        (
            [USER],
            {"outputs": [pb.ModelInferRequest.InferRequestedOutputTensor(name="logits")]},
            "INVALID_ARGUMENT",
            "outputs: no such output 'logits'",
        ),
    ],
)
def test_mistake_is_told_with_the_reason(
    served: Served, inputs: list[Any], call: dict[str, Any], code: str, message: str
) -> None:
    found, text = served.refusal(*inputs, **call)
    assert found is grpc.StatusCode[code] and message in text


def test_unknown_model_is_not_found(served: Served) -> None:
    for method, request in (
        (served.stub.ModelInfer, pb.ModelInferRequest(model_name="other", inputs=[USER])),
        (served.stub.ModelReady, pb.ModelReadyRequest(name="other")),
        (served.stub.ModelMetadata, pb.ModelMetadataRequest(name="other")),
    ):
        with pytest.raises(grpc.RpcError, match="other") as caught:
            method(request, timeout=20)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_health_and_metadata_are_those_of_http(served: Served) -> None:
    stub, version = served.stub, served.parts.package.version
    assert stub.ServerLive(pb.ServerLiveRequest()).live and stub.ServerReady(pb.ServerReadyRequest()).ready
    assert stub.ModelReady(pb.ModelReadyRequest(name="evergreen", version=version)).ready
    assert "binary_tensor_data" in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
    metadata = stub.ModelMetadata(pb.ModelMetadataRequest(name="evergreen"))
    assert list(metadata.versions) == [version] and metadata.platform == "evergreen"
    shapes = {tensor.name: list(tensor.shape) for tensor in metadata.inputs}
    assert shapes["candidates"] == [-1, -1] and shapes["diversity"] == [-1]


def test_models_are_not_loaded_or_unloaded_where_it_is_not_allowed(served: Served) -> None:
    for method, request in (
        (served.stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="evergreen")),
        (served.stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="evergreen")),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            method(request, timeout=20)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_too_large_a_message_is_refused(served: Served) -> None:
    huge = tensor("user_id", "BYTES", [1], bytes_contents=[b"x" * MAX_BODY_BYTES])
    assert served.refusal(huge)[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_failure_of_ours_tells_nothing_and_is_logged_once(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(requests: Any) -> Any:
        raise RuntimeError("the secret path")

    monkeypatch.setattr(served.server.server.slot.recommender, "answer", fail)
    code, text = served.refusal(USER)
    assert code is grpc.StatusCode.INTERNAL and text.startswith("internal error, request id ")
    logged = [record for record in caplog.records if record.exc_info]
    assert len(logged) == 1 and "the secret path" in str(logged[0].exc_info)


def test_port_that_is_taken_is_told(served: Served) -> None:
    settings = ServeSettings(
        model=Path("m"), feature_store=Path("f"), host="127.0.0.1", port=0, grpc_port=served.server.grpc_port
    )

    async def open_model(path: Path) -> Any:
        return served.parts.other()

    with (
        pytest.raises(EvergreenError, match=rf"cannot listen on 127\.0\.0\.1:{served.server.grpc_port} for gRPC"),
        serving_in_background(settings, open_model),
    ):
        pass
