"""/openapi.json tells the truth: what it allows is answered as it says, and what it does not is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import mlx_janus

# isort: split
import pytest
import schemathesis
from fake_engine import FakeEngine
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks
from serving import served

OPERATIONS = {
    "/v1/chat/completions": "post",
    "/v1/images/generations": "post",
    "/v1/models": "get",
    "/v1/models/{name}": "get",
    "/health": "get",
    "/metrics": "get",
    "/": "get",
}


@pytest.fixture(scope="module")
def described() -> Iterator[Any]:
    """What a server says of itself."""
    with served(FakeEngine(mlx_janus.load().config)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_described(described: Any) -> None:
    found = [operation.ok() for operation in described.get_all_operations()]
    assert {operation.path: operation.method for operation in found} == OPERATIONS


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("path", OPERATIONS)
def test_replies_are_as_described(described: Any, path: str, mode: GenerationMode) -> None:
    operation = described[path][OPERATIONS[path]]
    if mode.is_negative and not operation.body:
        return  # nothing can be wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=20,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    def check(case: schemathesis.Case) -> None:
        case.call_and_validate(
            checks=[
                schemathesis.checks.not_a_server_error,
                checks.status_code_conformance,
                checks.content_type_conformance,
                checks.response_schema_conformance,
                checks.response_headers_conformance,
                checks.negative_data_rejection,
                checks.unsupported_method,
            ]
        )

    check()
