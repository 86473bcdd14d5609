"""What every operation of the API has in common, told in its OpenAPI schema: keys, and refusals as problem+json."""

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema

PROBLEM = {
    "type": "object",
    "description": "RFC 9457; `pointer` says where in the body, `limit` and `size` which published limit was passed.",
    "required": ["type", "title", "status", "code", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "pointer": {"type": "string"},
        "limit": {"type": "integer"},
        "size": {"type": "integer"},
        "reasons": {"type": "array", "items": {"type": "object", "additionalProperties": {}}},
    },
}
REFUSED = {
    "description": "Refused: what is the case, and what to do about it.",
    "content": {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}},
}
STATUS = {
    "description": "Refused: a google.rpc.Status, in JSON or protobuf as the request was.",
    "content": {
        "application/json": {"schema": {"$ref": "#/components/schemas/Status"}},
        "application/x-protobuf": {"schema": {"type": "string", "format": "binary"}},
    },
}


class KeyScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]  # its metaclass registers it
    """`Authorization: Bearer <key>`, or `X-API-Key: <key>`."""

    target_class = "trajectories.auth.ApiKeyAuthentication"
    name = ["key", "keyHeader"]

    def get_security_definition(self, auto_schema: AutoSchema) -> list[dict[str, str]]:
        return [
            {"type": "http", "scheme": "bearer"},
            {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        ]

    def get_security_requirement(self, auto_schema: AutoSchema) -> list[dict[str, list[str]]]:
        return [{"key": []}, {"keyHeader": []}]


def with_problems(result: dict[str, dict[str, object]], **_: object) -> dict[str, dict[str, object]]:
    """Every operation may be refused; hook of drf-spectacular."""
    schemas = result.setdefault("components", {}).setdefault("schemas", {})
    assert isinstance(schemas, dict)
    schemas["Problem"] = PROBLEM
    words = {"code": {"type": "integer"}, "message": {"type": "string"}}
    schemas["Status"] = {"type": "object", "required": ["message"], "properties": words}
    for path, methods in result["paths"].items():
        assert isinstance(methods, dict)
        for operation in methods.values():
            if isinstance(operation, dict):
                _tell_ids(operation)
            if isinstance(operation, dict) and path != "/api/schema/":
                responses = operation["responses"]
                assert isinstance(responses, dict)
                refused = STATUS if path.startswith("/otel/") else REFUSED
                responses.update({status: refused for status in responses if status >= "400"}, default=refused)
    return result


def _tell_ids(operation: dict[str, object]) -> None:
    """Ids in paths are what they are; the expressions that tell our paths apart are no ECMA ones."""
    parameters = operation.get("parameters", [])
    assert isinstance(parameters, list)
    for parameter in parameters:
        if parameter["in"] == "path":
            parameter["schema"].pop("pattern", None)
