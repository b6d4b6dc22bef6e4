"""The parts that the bodies of requests share: strict parts, and fields that are not supported."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

_MAX_PARTS = 256  # parts of a message
# Without fail_fast, collecting an error for each of a million parts takes minutes.
SHORT_LIST = Field(max_length=_MAX_PARTS, fail_fast=True)


class RequestPart(BaseModel):
    """A part of a body: strings are not accepted as numbers, and unknown fields are dropped."""

    model_config = ConfigDict(strict=True, extra="ignore")


class OnlyNeutral:
    """An annotation of an unsupported field: only values that would have no effect are accepted.

    Args:
        values: the values without effect. None, the value of an absent field, is added.
    """

    def __init__(self, *values: Any):
        self.neutral_values = (None, *values)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        """Return the field's JSON schema for ``/openapi.json``; pydantic calls this."""
        field_schema = handler(schema)
        values = ", ".join(f"`{json.dumps(value)}`" for value in self.neutral_values)
        field_schema["description"] = f"Not supported. Accepted without effect: {values}."
        return field_schema


class RequestBody(RequestPart):
    """The body of a request. Subclasses annotate unsupported fields with ``OnlyNeutral``."""

    def unsupported_field(self) -> str | None:
        """Return the name of the first unsupported field that would have an effect; None: none."""
        for name, field in type(self).model_fields.items():
            for annotation in field.metadata:
                if (
                    isinstance(annotation, OnlyNeutral)
                    and getattr(self, name) not in annotation.neutral_values
                ):
                    return name
        return None
