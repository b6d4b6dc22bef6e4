"""The description of a form in ``/openapi.json``. FastAPI describes JSON bodies itself."""

from __future__ import annotations

from typing import Any

from .bodies import FORM, JSON
from .schema import MAX_INPUT_IMAGES, EditFields, EditRequest


def edit_body_schema() -> dict[str, Any]:
    """Return OpenAPI's description of the body of ``/v1/images/edits``: a form or JSON."""
    form = EditFields.model_json_schema()
    file = {"type": "string", "contentMediaType": "application/octet-stream"}
    form["properties"]["image"] = {
        "anyOf": [
            file,
            {"type": "array", "items": file, "minItems": 1, "maxItems": MAX_INPUT_IMAGES},
        ],
        "description": "A file of an image to change, or several files; also as `image[]`.",
    }
    form["required"] = ["image", *form["required"]]
    content = {FORM: {"schema": form}, JSON: {"schema": _inline(EditRequest.model_json_schema())}}
    return {"content": content, "required": True}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in which the definitions stand in the places that refer to them."""
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if reference := part.get("$ref"):
            return resolve(definitions[reference.rpartition("/")[2]])
        return {name: resolve(value) for name, value in part.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
