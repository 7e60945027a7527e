"""The OpenAPI document of a server: what it takes and answers, for the model that it serves."""

from __future__ import annotations

from typing import Any

from evergreen.contracts.training_set import ColumnKind
from evergreen.serving.calls import BINARY, JSON, Answering
from evergreen.serving.protocol import RecommenderDataPlane
from evergreen.serving.repository import MAX_VERSION_LENGTH
from evergreen.serving.schema import (
    MAX_CANDIDATES,
    MAX_ID_LENGTH,
    MAX_INSTANCES,
    NUMBER_PATTERN,
    RankingRequest,
    Recommendation,
)
from evergreen.serving.tensors import INPUT_DATATYPES, input_types, output_types
from evergreen.serving.validation import MAX_CONTEXT_VALUES, MAX_TEXT_LENGTH, RequestRules

Schema = dict[str, Any]

_STRING: Schema = {"type": "string"}
_BOOLEAN: Schema = {"type": "boolean"}
_DAY = "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])|(0[469]|11)-(0[1-9]|[12][0-9]|30)|02-(0[1-9]|1[0-9]|2[0-8])"
_TIME = "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9]([.][0-9]{1,6})?(Z|[+-](0[0-9]|1[0-3]):[0-5][0-9])"
# Every text of this form is a time that is taken; 29 February and the first and last year are taken too.
_TIMESTAMP_PATTERN = f"^(197[1-9]|19[89][0-9]|20[0-9][0-9]|21[0-8][0-9])-({_DAY})T{_TIME}$"

_ERRORS = {
    "400": "The request is malformed; `error` says where and how.",
    "401": "A token is needed and was not given, or is wrong.",
    "403": "Not allowed on this server.",
    "404": "No such model, or no such version of it.",
    "408": "The body did not arrive in time.",
    "409": "Another load is under way.",
    "413": "The body is too large.",
    "422": "The package cannot be loaded; the model that answers stays.",
    "503": "Not ready, or too many calls at once.",
}


def describe_api(data_plane: RecommenderDataPlane) -> dict[str, Any]:
    """The document (OpenAPI 3.1). The schemas are those of the first model, as it is now, if it is loaded."""
    models = data_plane.model_registry.get_models()
    model = next(iter(models.values()))
    recommender = model.slot.recommender if model.ready else None
    schemas = _schemas(recommender)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Evergreen",
            "version": data_plane.metadata()["version"],
            "description": "Recommendations over KServe's V1 and V2 (Open Inference) protocols.",
        },
        "paths": _paths(list(models), recommender.model_version if recommender else None),
        "components": {
            "schemas": schemas,
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _paths(models: list[str], version: str | None) -> dict[str, Any]:
    model = _path_parameter("model_name", models)
    of_version = [model, _path_parameter("model_version", [version] if version else None)]
    name_and = {"name": _STRING}
    ready = _object(name_and | {"ready": _BOOLEAN})
    ask = ("400", "401", "404", "408", "413", "503")
    infer = {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": _ref("InferenceRequest")}, BINARY: {"schema": {"contentMediaType": BINARY}}},
        },
        "responses": _responses(_ref("InferenceResponse"), ask),
    }
    infer["responses"]["200"]["content"][BINARY] = {"schema": {"contentMediaType": BINARY}}
    infer["responses"]["200"]["headers"] = {"Inference-Header-Content-Length": {"schema": {"type": "string"}}}
    header = {
        "name": "Inference-Header-Content-Length",
        "in": "header",
        "description": "Length of the JSON that binary tensor data follows.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,11}$"},
    }
    version_name = {"type": ["string", "null"], "minLength": 1, "maxLength": MAX_VERSION_LENGTH}
    which = _object({"version": version_name}, required=()) | {"type": ["object", "null"]}
    load = _object(name_and | {"load": _BOOLEAN, "version": _STRING}, required=("name", "load"))
    index = _object({"name": _STRING, "version": _STRING, "state": _STRING, "reason": _STRING}, required=("name",))
    return {
        "/": {"get": _get("Alive", _object({"status": _STRING}), open_to_all=True)},
        "/metrics": {"get": {"summary": "Prometheus metrics", "responses": {"200": _of_any_type("Metrics")}}},
        "/openapi.json": {"get": _get("This document", {"type": "object"})},
        "/v1/models": {"get": _get("Models", _object({"models": _list(_STRING)}))},
        "/v1/models/{model_name}": {"parameters": [model], "get": _get("Model ready", ready, "404", "503")},
        "/v1/models/{model_name}:predict": {
            "parameters": [model],
            "post": {
                "summary": "Recommend (V1)",
                "requestBody": {"required": True, "content": {JSON: {"schema": _ref("PredictRequest")}}},
                "responses": _responses(_ref("PredictResponse"), ask),
                "security": [{}, {"token": []}],
            },
        },
        "/v2": {
            "get": _get("Server metadata", _object({"name": _STRING, "version": _STRING, "extensions": _list(_STRING)}))
        },
        "/v2/health/live": {"get": _get("Alive", _object({"live": _BOOLEAN}), open_to_all=True)},
        "/v2/health/ready": {"get": _get("Ready", _object({"ready": _BOOLEAN}), "503", open_to_all=True)},
        "/v2/models": {"get": _get("Models", _object({"models": _list(_STRING)}))},
        "/v2/models/{model_name}": {
            "parameters": [model],
            "get": _get("Model metadata", _ref("ModelMetadata"), "404", "503"),
        },
        "/v2/models/{model_name}/ready": {
            "parameters": [model],
            "get": _get("Model ready", ready, "404", "503", open_to_all=True),
        },
        "/v2/models/{model_name}/infer": {
            "parameters": [model, header],
            "post": infer | {"summary": "Recommend (V2)", "security": [{}, {"token": []}]},
        },
        "/v2/models/{model_name}/versions/{model_version}": {
            "parameters": of_version,
            "get": _get("Model metadata", _ref("ModelMetadata"), "404", "503"),
        },
        "/v2/models/{model_name}/versions/{model_version}/ready": {
            "parameters": of_version,
            "get": _get("Model ready", ready, "404", "503"),
        },
        "/v2/models/{model_name}/versions/{model_version}/infer": {
            "parameters": [*of_version, header],
            "post": infer | {"summary": "Recommend by this version (V2)", "security": [{}, {"token": []}]},
        },
        "/v2/repository/index": {
            "post": {
                "summary": "What can be loaded",
                "requestBody": _optional_body(_object({"ready": _BOOLEAN}, required=())),
                "responses": _responses(_list(index), ("400", "401", "413")),
                "security": [{}, {"token": []}],
            }
        },
        "/v2/repository/models/{model_name}/load": {
            "parameters": [model],
            "post": {
                "summary": "Serve the newest package, or a version",
                "requestBody": _optional_body(_object({"parameters": which}, required=())),
                "responses": _responses(load, ("400", "401", "403", "404", "409", "413", "422", "503")),
                "security": [{}, {"token": []}],
            },
        },
        "/v2/repository/models/{model_name}/unload": {
            "parameters": [model],
            "post": {
                "summary": "Always refused",
                "responses": {status: _error(status) for status in ("401", "403", "404")},
                "security": [{}, {"token": []}],
            },
        },
    }


def _schemas(recommender: Answering | None) -> dict[str, Schema]:
    tensor = _object({"name": _STRING, "datatype": _STRING, "shape": _list({"type": "integer"})})
    metadata = {
        "name": _STRING,
        "versions": _list(_STRING),
        "platform": _STRING,
        "inputs": _list(tensor),
        "outputs": _list(tensor),
    }
    rules = recommender.rules if recommender else None
    request = _request(rules)
    answer = _answer(recommender)
    return {
        "Error": _object({"error": _STRING}),
        "PredictRequest": _object(
            {"instances": {"type": "array", "minItems": 1, "maxItems": MAX_INSTANCES, "items": request}}
        ),
        "PredictResponse": _object({"predictions": _list(answer)}),
        "InferenceRequest": _inference_request(rules),
        "InferenceResponse": _inference_response(recommender),
        "ModelMetadata": _object(metadata),
    }


def _request(rules: RequestRules | None) -> Schema:
    """What `RequestRules` takes as one instance."""
    schema = RankingRequest.model_json_schema()
    fields = schema["properties"]
    fields["candidates"]["anyOf"][0]["uniqueItems"] = True
    fields["diversity"]["anyOf"] = [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "null"}]
    fields["event_timestamp"]["anyOf"][0] |= {"pattern": _TIMESTAMP_PATTERN}
    if rules is not None:
        context = {name: _context_value(kind) for name, kind in rules.context.items()}
        fields["context"] |= {"properties": context, "additionalProperties": False}
        if rules.has_users:
            fields["user_id"] = fields["user_id"]["anyOf"][0] | {"title": "User Id"}
            schema["required"] = ["user_id"]
    return schema


def _context_value(kind: ColumnKind) -> Schema:
    null: Schema = {"type": "null"}
    text = _STRING | {"maxLength": MAX_TEXT_LENGTH}
    if kind is ColumnKind.NUMERIC:
        return {"anyOf": [{"type": "number"}, {"type": "string", "pattern": f"^{NUMBER_PATTERN}$"}, null]}
    if kind is ColumnKind.CATEGORICAL:
        return {"anyOf": [text, null]}
    return {"anyOf": [_list(text) | {"maxItems": MAX_CONTEXT_VALUES}, null]}


def _answer(recommender: Answering | None) -> Schema:
    """What `Answer.to_json` gives."""
    schema = Recommendation.model_json_schema(ref_template="#/components/schemas/{model}")
    item = schema.pop("$defs")["RankedItem"]
    fields = schema["properties"]
    fields["items"]["items"] = item
    always = ["request_id", "known_user", "model_version", "event_timestamp", "degraded", "unknown_items"]
    schema["required"] = [*always, "filtered_items", "notes"]
    if recommender is not None:
        if recommender.rules.has_items:
            schema["required"].append("items")
            item["required"].append(recommender.value_name)
        else:
            schema["required"].append(recommender.value_name)
    return schema


def _inference_request(rules: RequestRules | None) -> Schema:
    parameters = {
        "type": ["object", "null"],
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    }
    known = input_types(has_users=rules is None or rules.has_users, has_items=rules is None or rules.has_items)
    tensors = [
        _object(
            {
                "name": {"const": tensor["name"]},
                "datatype": {"enum": list(INPUT_DATATYPES[tensor["name"]])},
                "shape": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 2,
                    "items": {"type": "integer", "minimum": 0, "maximum": MAX_CANDIDATES},
                },
                "data": {"type": ["array", "null"]},
                "parameters": parameters | {"properties": {"binary_data_size": {"type": "integer", "minimum": 0}}},
            },
            required=("name", "datatype", "shape"),
        )
        for tensor in known
    ]
    output = _object(
        {"name": _STRING, "parameters": parameters | {"properties": {"binary_data": _BOOLEAN}}}, required=("name",)
    )
    return _object(
        {
            "id": {"type": ["string", "null"], "maxLength": MAX_ID_LENGTH},
            "parameters": parameters | {"properties": {"binary_data_output": _BOOLEAN}},
            "inputs": {"type": "array", "minItems": 1, "items": {"anyOf": tensors}},
            "outputs": {"type": ["array", "null"], "items": output},
        },
        required=("inputs",),
    )


def _inference_response(recommender: Answering | None) -> Schema:
    types = output_types("probability", has_items=True)
    if recommender is not None:
        types = output_types(recommender.value_name, has_items=recommender.rules.has_items)
    output = _object(
        {
            "name": {"enum": [tensor["name"] for tensor in types]},
            "datatype": {"enum": sorted({tensor["datatype"] for tensor in types})},
            "shape": _list({"type": "integer", "minimum": 0}),
            "data": {"type": "array", "items": {"type": ["string", "number", "boolean"]}},
            "parameters": _object({"binary_data_size": {"type": "integer", "minimum": 0}}),
        },
        required=("name", "datatype", "shape"),
    )
    return _object(
        {
            "id": _STRING,
            "model_name": _STRING,
            "model_version": _STRING,
            "parameters": _object({"model_version": _STRING}),
            "outputs": _list(output),
        }
    )


def _get(summary: str, schema: Schema, *errors: str, open_to_all: bool = False) -> dict[str, Any]:
    operation = {"summary": summary, "responses": _responses(schema, errors if open_to_all else ("401", *errors))}
    return operation if open_to_all else operation | {"security": [{}, {"token": []}]}


def _responses(schema: Schema, errors: tuple[str, ...]) -> dict[str, Any]:
    found = {"200": {"description": "OK", "content": {JSON: {"schema": schema}}}}
    return found | {status: _error(status) for status in errors}


def _error(status: str) -> dict[str, Any]:
    return {"description": _ERRORS[status], "content": {JSON: {"schema": _ref("Error")}}}


def _of_any_type(description: str) -> dict[str, Any]:
    return {
        "description": description,
        "content": {"text/plain": {"schema": _STRING}, "application/openmetrics-text": {"schema": _STRING}},
    }


def _optional_body(schema: Schema) -> dict[str, Any]:
    return {"required": False, "content": {JSON: {"schema": schema}}}


def _path_parameter(name: str, known: list[str] | None) -> dict[str, Any]:
    schema = _STRING | ({"enum": known} if known else {})
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _object(properties: Schema, *, required: tuple[str, ...] | None = None) -> Schema:
    needed = list(properties) if required is None else list(required)
    return {"type": "object", "properties": properties, "required": needed, "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
