"""Composes the OpenAPI document from the route table, the models and what the other modules of its name say."""

import json
import re
from collections.abc import Iterable
from importlib.metadata import version
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema, models_json_schema

from eci_pay.requests import ListRequest
from server import problems
from server.openapi_examples import problem_example
from server.openapi_operations import DESCRIBED, JSON, TAGS, Answered, Described
from server.openapi_parts import HEADERS, PARAMETERS, SECURITY_SCHEMES
from server.openapi_problems import PROBLEMS
from server.routes import TABLE, Operation

_INTRODUCTION = (
    "Money is never charged twice, never refunded beyond what was captured, and never lost track of. Amounts in "
    "requests are JSON numbers or plain decimal strings, exact on the digits as sent; ids are digits alone, so `7.0` "
    "is none. Every error is a problem document (RFC 9457) with a `code` that stays the same. A method that a path "
    "does not have is answered with 405 `method-not-allowed` and `Allow`."
)
CODES_OF_ALL = ("bad-request", "request-timeout", "headers-too-large", "internal-error", "unavailable")
_CODES_OF_KEYS = ("unauthorized", "forbidden")
CODES_OF_ACCESS = (*_CODES_OF_KEYS, "rate-limited")
_CODES_WITH_RETRY = {*problems.RETRY_AFTER_SECONDS, "rate-limited"}

_Mode = Literal["validation", "serialization"]


class _Schemas(GenerateJsonSchema):
    """Without a title for each field, which only repeats its name."""

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        """Never."""
        return False


def compose(*, access_controlled: bool) -> bytes:
    """The document of a server that wants API keys, or of one that does not, as JSON."""
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "eci-pay",
            "version": version("eci-pay"),
            "summary": "Charges, refunds and queries payments.",
            "description": _INTRODUCTION,
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "/", "description": "The server that this document is from."}],
        "security": [],
        "tags": [{"name": name, "description": text} for name, text in TAGS.items()],
        "paths": {
            path: _path(path, operations, access_controlled=access_controlled) for path, operations in TABLE.items()
        },
        "components": {
            "schemas": {**_model_schemas(), **_problem_schemas()},
            "parameters": PARAMETERS,
            "headers": HEADERS,
            "securitySchemes": SECURITY_SCHEMES,
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _path(path: str, operations: dict[str, Operation], *, access_controlled: bool) -> dict[str, Any]:
    names = [*re.findall(r"{(\w+)}", path), "X-Request-ID", "traceparent"]
    methods = {
        method.lower(): {
            **_operation(DESCRIBED[f"{method} {path}"], operation),
            **_security(operation, access_controlled=access_controlled),
        }
        for method, operation in operations.items()
    }
    return {"parameters": [_ref("parameters", name) for name in names], **methods}


def _operation(described: Described, operation: Operation) -> dict[str, Any]:
    parameters: list[dict[str, Any]] = [_ref("parameters", name) for name in described.parameters]
    document: dict[str, Any] = {
        "operationId": described.operation_id,
        "summary": described.summary,
        "description": described.description,
        "tags": [described.tag],
        "parameters": [*parameters, *(_filters() if described.is_filtered else ())],
        "responses": {
            **{str(status): _answer(answered) for status, answered in described.answers.items()},
            **_problems(_codes(operation)),
        },
    }
    if described.body is not None:
        content = {"schema": _schema(described.body), "examples": described.examples}
        document["requestBody"] = {"required": True, "content": {JSON: content}}
    return document


def _codes(operation: Operation) -> Iterable[str]:
    """Each once."""
    return dict.fromkeys((*operation.codes, *(CODES_OF_ACCESS if operation.wants else ()), *CODES_OF_ALL))


def _security(operation: Operation, *, access_controlled: bool) -> dict[str, Any]:
    """The scopes stand there as roles, as OpenAPI 3.1 has it for bearer tokens."""
    if operation.wants is None:
        return {}
    key: dict[str, list[str]] = {"apiKey": [operation.wants.value]}
    return {"security": [key] if access_controlled else [{}, key]}


def _answer(answered: Answered) -> dict[str, Any]:
    content = {"schema": _schema(answered.schema), "examples": answered.examples}
    return {
        "description": answered.description,
        "headers": _headers(*answered.headers),
        "content": dict.fromkeys(answered.media_types, content),
    }


def _problems(codes: Iterable[str]) -> dict[str, Any]:
    by_status: dict[int, list[str]] = {}
    for code in codes:
        by_status.setdefault(PROBLEMS[code].status, []).append(code)
    return {str(status): _problem(by_status[status]) for status in sorted(by_status)}


def _problem(codes: list[str]) -> dict[str, Any]:
    """An answer that has one of these codes."""
    headers = _headers(*(["Idempotent-Replayed"] if any(PROBLEMS[code].is_recorded for code in codes) else []))
    with_retry = [code for code in codes if code in _CODES_WITH_RETRY]
    if with_retry:
        headers["Retry-After"] = {**HEADERS["Retry-After"], "required": with_retry == codes}
    if set(codes) <= {*_CODES_OF_KEYS}:
        headers |= _headers("WWW-Authenticate")
    schemas = [_ref("schemas", _problem_name(code)) for code in codes]
    content = {
        "schema": schemas[0] if len(schemas) == 1 else {"oneOf": schemas},
        "examples": {code: {"summary": code, "value": problem_example(code)} for code in codes},
    }
    return {
        "description": "; ".join(f"{PROBLEMS[code].title} (`{code}`)" for code in codes) + ".",
        "headers": headers,
        "content": {problems.MEDIA_TYPE: content},
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: _ref("headers", name) for name in dict.fromkeys(("X-Request-ID", "Cache-Control", *names))}


def _schema(model: type[BaseModel] | dict[str, Any]) -> dict[str, Any]:
    return model if isinstance(model, dict) else _ref("schemas", model.__name__)


def _filters() -> list[dict[str, Any]]:
    """The fields of a ListRequest as parameters, which are left out where a field would be null."""
    fields = _schemas_of([(ListRequest, "validation")])["ListRequest"]["properties"]
    return [_filter(name, schema) for name, schema in fields.items()]


def _filter(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    (given,) = [option for option in schema.pop("anyOf", [schema]) if option != {"type": "null"}]
    parameter = {"name": name, "in": "query", "schema": given}
    return {**parameter, "description": given.pop("description")} if "description" in given else parameter


def _model_schemas() -> dict[str, Any]:
    modes: dict[tuple[type[BaseModel], _Mode], None] = {(ListRequest, "validation"): None}
    for described in DESCRIBED.values():
        if isinstance(described.body, type):
            modes[described.body, "validation"] = None
        for answered in described.answers.values():
            if isinstance(answered.schema, type):
                modes[answered.schema, "serialization"] = None
    schemas = _schemas_of(list(modes))
    del schemas["ListRequest"]  # its fields are parameters
    return schemas


def _schemas_of(models: list[tuple[type[BaseModel], _Mode]]) -> dict[str, Any]:
    _, document = models_json_schema(models, ref_template="#/components/schemas/{model}", schema_generator=_Schemas)
    return dict(document["$defs"])


def _problem_schemas() -> dict[str, Any]:
    codes = {code for operations in TABLE.values() for operation in operations.values() for code in _codes(operation)}
    return {_problem_name(code): PROBLEMS[code].schema(code) for code in sorted(codes)}


def _problem_name(code: str) -> str:
    """`invalid-state` as InvalidStateProblem."""
    return f"{code.title().replace('-', '')}Problem"


def _ref(kind: str, name: str) -> dict[str, str]:
    return {"$ref": f"#/components/{kind}/{name}"}
