"""The description of a form in ``/openapi.json``. FastAPI describes JSON bodies itself."""

from __future__ import annotations

from typing import Any

from .bodies import FORM, JSON
from .schema import MAX_INPUT_IMAGES, EditFields, EditRequest


def edit_body_schema() -> dict[str, Any]:
    """Return OpenAPI's description of the body of ``/v1/images/edits``: a form or JSON."""
    form_schema = EditFields.model_json_schema()
    file_schema = {"type": "string", "contentMediaType": "application/octet-stream"}
    several_files = {
        "type": "array",
        "items": file_schema,
        "minItems": 1,
        "maxItems": MAX_INPUT_IMAGES,
    }
    form_schema["properties"]["image"] = {
        "anyOf": [file_schema, several_files],
        "description": "A file of an image to change, or several files; also as `image[]`.",
    }
    form_schema["required"] = ["image", *form_schema["required"]]
    json_schema = _inline(EditRequest.model_json_schema())
    content = {FORM: {"schema": form_schema}, JSON: {"schema": json_schema}}
    return {"content": content, "required": True}


def _inline(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema in which each reference is replaced by the definition that it refers to.

    In ``/openapi.json`` a reference such as "#/$defs/Name" would not lead to ``$defs`` of this
    schema. The argument loses its ``$defs``.
    """
    definitions = schema.pop("$defs", {})

    def resolve(part: Any) -> Any:
        if isinstance(part, list):
            return [resolve(item) for item in part]
        if not isinstance(part, dict):
            return part
        if reference := part.get("$ref"):
            _, _, name = reference.rpartition("/")  # of "#/$defs/Name"
            return resolve(definitions[name])
        return {name: resolve(value) for name, value in part.items()}

    resolved: dict[str, Any] = resolve(schema)
    return resolved
