"""Holds every answer that a test gets against the OpenAPI document."""

import json
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import httpx
import jsonschema_rs

from server.openapi import compose
from server.routes import TABLE

_NOWHERE = {"not-found", "method-not-allowed"}
"""What paths and methods are told that are not in the document."""


@cache
def document() -> dict[str, Any]:
    """The document, as the server has it."""
    return dict(json.loads(compose(access_controlled=False)))


def resolved(part: dict[str, Any]) -> dict[str, Any]:
    """A part of the document, or what it refers to."""
    if "$ref" not in part:
        return part
    kind, name = part["$ref"].removeprefix("#/components/").split("/")
    return dict(document()["components"][kind][name])


@cache
def validator(schema: str) -> jsonschema_rs.Validator:
    """Validates by a schema of the document, given as JSON."""
    with_components = {**json.loads(schema), "components": document()["components"]}
    return jsonschema_rs.validator_for(with_components, validate_formats=True)


async def check(answer: httpx.Response) -> None:
    """Asserts that an answer is one that the document has for its request."""
    await answer.aread()
    request = answer.request
    content_type = answer.headers["Content-Type"].partition(";")[0]
    operation = _operation(request.method, request.url.path)
    if operation is None:
        assert answer.json()["code"] in _NOWHERE
        return
    assert str(answer.status_code) in operation["responses"], f"{answer.status_code} is undocumented: {answer.text}"
    documented = operation["responses"][str(answer.status_code)]
    _check_headers(answer.headers, documented["headers"])
    assert content_type in documented["content"]
    if "json" in content_type and request.method != "HEAD":
        schema = documented["content"][content_type]["schema"]
        validator(json.dumps(schema)).validate(answer.json())
        if content_type == "application/problem+json":
            assert _codes_and_members(schema)[answer.json()["code"]] == set(answer.json())


def _operation(method: str, path: str) -> dict[str, Any] | None:
    """That of the first path that fits, as the router has it."""
    for template in TABLE:
        if re.fullmatch(re.sub(r"{\w+}", "[^/]+", template), path):
            found = document()["paths"][template].get("get" if method == "HEAD" else method.lower())
            return None if found is None else dict(found)
    return None


def _check_headers(found: httpx.Headers, documented: Mapping[str, Any]) -> None:
    for name, header in documented.items():
        assert name in found or not resolved(header).get("required"), f"{name} is missing"
    ours = {*document()["components"]["headers"]} - {*documented}
    assert not [name for name in ours if name in found], "a header is undocumented"


def _codes_and_members(schema: dict[str, Any]) -> dict[str, set[str]]:
    schemas = [resolved(option) for option in schema.get("oneOf", [schema])]
    return {one["properties"]["code"]["const"]: set(one["properties"]) for one in schemas}
