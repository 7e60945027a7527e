"""A call in each of KServe's protocols: bytes to requests, answers to bytes.

V1                 {"instances": [RankingRequest, …]} → {"predictions": [Recommendation, …]}, see `schema`
V2, JSON           {"inputs": [{"name", "datatype", "shape", "data"}, …]} → {"outputs": [the same, …]}, see `tensors`
V2, binary data    that JSON, then the tensors that have `"parameters": {"binary_data_size": bytes}` instead of `data`,
                   one after the other in the order of `inputs`. Header Inference-Header-Content-Length: that of the
                   JSON. An output comes so that is asked for with `{"name", "parameters": {"binary_data": true}}`;
                   all do by `"parameters": {"binary_data_output": true}` of the call.
gRPC               ModelInfer, with `contents` or `raw_input_contents`; outputs are raw. See `grpc_server`
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import orjson

from evergreen.contracts.errors import RequestError
from evergreen.serving.answer import Answer
from evergreen.serving.schema import MAX_ID_LENGTH, RankingRequest
from evergreen.serving.tensors import (
    INPUT_DATATYPES,
    Tensor,
    instances_of,
    output_types,
    outputs_of,
    tensor_field,
    to_binary,
)
from evergreen.serving.validation import RequestRules, decode_json, describe, refuse_repeated_keys

HEADER_LENGTH = "inference-header-content-length"
JSON = "application/json"
BINARY = "application/octet-stream"

MAX_OUTPUTS = len(output_types("", has_items=True))
_MAX_DIMENSIONS = 8  # more than any tensor of ours has; `tensors` says how many each may have
_CURL_DEFAULT = "application/x-www-form-urlencoded"
_PARAMETER = (str, int, float)  # bool is an int

T = TypeVar("T")


class Answering(Protocol):
    """What reading and writing a call needs of `serving.recommender.Recommender`."""

    rules: RequestRules
    value_name: str

    @property
    def model_version(self) -> str:
        """Version of the model package."""


class UnknownVersionError(RequestError):
    """The version that a call names is not the one that is served (404)."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What goes back over HTTP."""

    body: bytes
    media_type: str = JSON
    header_length: int | None = None
    """Of the JSON before binary data."""


class Call(ABC):
    """One call, as it came in."""

    @abstractmethod
    def requests(self, recommender: Answering) -> list[RankingRequest]:
        """The requests in it.

        Raises:
            RequestError: it is malformed; says where and what is wrong.
            UnknownVersionError: it names another version of the model.
        """

    @abstractmethod
    def reply(self, answers: Sequence[Answer], model_name: str, recommender: Answering) -> Any:
        """The answers in the call's protocol."""


def check_version(version: str | None, recommender: Answering) -> None:
    """Raise UnknownVersionError if this is another version of the model than the one that is served."""
    if version is not None and version != recommender.model_version:
        raise UnknownVersionError(f"version {describe(version)}: not served; version {recommender.model_version} is")


@dataclass
class V1Call(Call):
    """POST /v1/models/{name}:predict."""

    body: bytes
    headers: Mapping[str, str]

    def requests(self, recommender: Answering) -> list[RankingRequest]:
        """The instances."""
        _check_media_type(self.headers)
        return recommender.rules.parse_body(self.body)

    def reply(self, answers: Sequence[Answer], model_name: str, recommender: Answering) -> Reply:
        """The predictions."""
        return Reply(orjson.dumps({"predictions": [answer.to_json() for answer in answers]}))


@dataclass
class TensorCall(Call):
    """A V2 call. `id`, the wanted outputs and whether they are wanted as binary data are known once it is read."""

    version: str | None = None
    """Of the model, if the caller names one."""
    id: str = ""
    wanted: dict[str, bool | None] = field(default_factory=dict)
    """Whether each output is wanted as binary data, by name; empty: all outputs are wanted."""
    binary: bool = False
    """Of the outputs that do not say."""

    def requests(self, recommender: Answering) -> list[RankingRequest]:
        """The rows of the input tensors."""
        check_version(self.version, recommender)
        inputs = self.read()
        if self.id and not self.id.isprintable():  # it is echoed
            raise RequestError(f"id={describe(self.id)}: must be printable text")
        if len(self.id) > MAX_ID_LENGTH:
            raise RequestError(f"id={describe(self.id)}: must have at most {MAX_ID_LENGTH} characters")
        known = [output["name"] for output in _output_types(recommender)]
        for name in self.wanted:
            if name not in known:
                raise RequestError(f"outputs: no such output {describe(name)}; known: {', '.join(known)}")
        return recommender.rules.parse(instances_of(inputs), tensor_field)

    def outputs(self, answers: Sequence[Answer], recommender: Answering) -> list[Tensor]:
        """The output tensors that are wanted."""
        outputs = outputs_of(answers, recommender.value_name, has_items=recommender.rules.has_items)
        return [output for output in outputs if not self.wanted or output.name in self.wanted]

    @abstractmethod
    def read(self) -> list[Tensor]:
        """The input tensors; learns what else the call says."""


@dataclass
class V2Call(TensorCall):
    """POST /v2/models/{name}/infer."""

    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def requests(self, recommender: Answering) -> list[RankingRequest]:
        """The rows of the input tensors."""
        requests = super().requests(recommender)
        refuse_repeated_keys(self._json, self._num_keys, "the body")
        return requests

    def read(self) -> list[Tensor]:
        """The inputs of a JSON body, or of JSON with binary data after it."""
        has_binary = HEADER_LENGTH in self.headers
        _check_media_type(self.headers, binary=has_binary)
        length = self._header_length() if has_binary else len(self.body)
        self._json, binary = self.body[:length], self.body[length:]
        decoded = decode_json(self._json, "the body")
        call = _fields(decoded, "the body", required=("inputs",), optional=("id", "parameters", "outputs"))
        self.id = _of_type(call.get("id", ""), str, "id", "must be a string")
        self.binary = _flag(_parameters(call, "parameters"), "binary_data_output", "parameters") or False
        outputs = _tensor_list(call.get("outputs", []), "outputs", MAX_OUTPUTS)
        for index, output in enumerate(outputs):
            self._want(output, f"outputs[{index}]")
        tensors = []
        rest = binary
        inputs = _tensor_list(call["inputs"], "inputs", len(INPUT_DATATYPES))
        for index, entry in enumerate(inputs):
            tensor, rest = _input(entry, f"inputs[{index}]", rest)
            tensors.append(tensor)
        if rest:
            raise RequestError(
                f"{len(binary)} bytes follow the JSON, {len(binary) - len(rest)} are those of tensors: {HEADER_LENGTH} "
                "is the length of the JSON, binary_data_size that of each tensor"
            )
        holders = [decoded, *inputs, *outputs]
        self._num_keys = sum([len(holder) + len(holder.get("parameters") or ()) for holder in holders])
        return tensors

    def reply(self, answers: Sequence[Answer], model_name: str, recommender: Answering) -> Reply:
        """The outputs as JSON, and after it those that are wanted as binary data."""
        outputs, binary = [], []
        for tensor in self.outputs(answers, recommender):
            output: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
            wanted = self.wanted.get(tensor.name)
            if self.binary if wanted is None else wanted:
                binary.append(to_binary(tensor))
                output["parameters"] = {"binary_data_size": len(binary[-1])}
            else:
                output["data"] = tensor.data
            outputs.append(output)
        version = recommender.model_version
        body = orjson.dumps(
            {
                "id": self.id,
                "model_name": model_name,
                "model_version": version,
                "parameters": {"model_version": version},
                "outputs": outputs,
            },
            option=orjson.OPT_SERIALIZE_NUMPY,
        )
        return Reply(b"".join([body, *binary]), BINARY, len(body)) if binary else Reply(body)

    def _header_length(self) -> int:
        given = self.headers[HEADER_LENGTH]
        if not (given.isascii() and given.isdigit() and len(given) < 12 and int(given) <= len(self.body)):
            raise RequestError(
                f"{HEADER_LENGTH}={describe(given)}: must be the length of the JSON, at most that of the body, "
                f"{len(self.body)}"
            )
        return int(given)

    def _want(self, output: object, place: str) -> None:
        output = _fields(output, place, required=("name",), optional=("parameters",))
        name = _of_type(output["name"], str, f"{place}.name", "must be a string")
        if name in self.wanted:
            raise RequestError(f"{place}: {describe(name)} is asked for twice")
        self.wanted[name] = _flag(_parameters(output, f"{place}.parameters"), "binary_data", f"{place}.parameters")


def _tensor_list(value: object, place: str, limit: int) -> list[Any]:
    tensors = _of_type(value, list, place, "must be a list of tensors")
    if len(tensors) > limit:
        raise RequestError(f"{place}: {len(tensors)} tensors: there are {limit}, and each is given once")
    return tensors


def _input(entry: object, place: str, binary: bytes) -> tuple[Tensor, bytes]:
    """An input, and the binary data that is left for those after it."""
    entry = _fields(entry, place, required=("name", "datatype", "shape"), optional=("parameters", "data"))
    name = _of_type(entry["name"], str, f"{place}.name", "must be a string")
    datatype = _of_type(entry["datatype"], str, f"{place}.datatype", "must be a string")
    shape = _of_type(entry["shape"], list, f"{place}.shape", "must be a list of integers")
    if len(shape) > _MAX_DIMENSIONS or not all(type(length) is int for length in shape):
        raise RequestError(f"{place}.shape={describe(shape)}: must be a list of at most {_MAX_DIMENSIONS} integers")
    size = _parameters(entry, f"{place}.parameters").get("binary_data_size")
    data = entry.get("data")
    if size is None:
        if data is None:
            raise RequestError(f"{place}.data: missing: give it, or binary data and its binary_data_size")
        return Tensor(name, datatype, tuple(shape), _of_type(data, list, f"{place}.data", "must be a list")), binary
    if data is not None:
        raise RequestError(f"{place}: has data and binary_data_size; give one of them")
    if type(size) is not int or not 0 <= size <= len(binary):
        raise RequestError(
            f"{place}.parameters.binary_data_size={describe(size)}: must be an integer, at most {len(binary)}, the "
            "bytes that are left after the JSON and the tensors before"
        )
    return Tensor(name, datatype, tuple(shape), binary[:size]), binary[size:]


def _fields(value: object, place: str, *, required: Sequence[str], optional: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(f"{place}: {describe(value)}: must be an object with {', '.join(required)}")
    for name in required:
        if name not in value:
            raise RequestError(f"{name}: missing" if place == "the body" else f"{place}.{name}: missing")
    for name in value:
        if name not in required and name not in optional:
            raise RequestError(f"{place}: unknown field {describe(name)}; known: {', '.join([*required, *optional])}")
    # null is the same as left out.
    return {name: entry for name, entry in value.items() if entry is not None or name in required}


def _of_type(value: object, wanted: type[T], place: str, rule: str) -> T:
    if not isinstance(value, wanted):
        raise RequestError(f"{place}={describe(value)}: {rule}")
    return value


def _parameters(holder: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Parameters, of which those that are not known are left aside, as the protocol has it."""
    parameters = _of_type(holder.get("parameters", {}), dict, place, "must be an object")
    for name, value in parameters.items():
        if not isinstance(value, _PARAMETER):
            raise RequestError(f"{place}.{_shown(name)}={describe(value)}: must be a string, a number or a boolean")
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, place: str) -> bool | None:
    if name not in parameters:
        return None
    return _of_type(parameters[name], bool, f"{place}.{name}", "must be true or false")


def _output_types(recommender: Answering) -> list[dict[str, Any]]:
    return output_types(recommender.value_name, has_items=recommender.rules.has_items)


def _check_media_type(headers: Mapping[str, str], *, binary: bool = False) -> None:
    """Raise RequestError unless a body is said to be JSON, of any kind, or nothing is said of it.

    What curl -d says by default counts as nothing said: the examples of KServe's own documentation send JSON so.
    """
    given = headers.get("content-type", JSON)
    if given == JSON:
        return
    media_type = given.split(";")[0].strip().lower()
    is_json = media_type in (JSON, _CURL_DEFAULT) or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if is_json or (binary and media_type == BINARY):
        return
    way_out = f"; binary data needs the header {HEADER_LENGTH}" if media_type == BINARY else ""
    raise RequestError(f"Content-Type {describe(given)}: send JSON with Content-Type: {JSON}{way_out}")


def _shown(name: str) -> str:
    return name if name.isidentifier() and len(name) < 60 else describe(name)
