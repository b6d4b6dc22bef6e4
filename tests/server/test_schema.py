"""/openapi.json is true: allowed requests are answered as it says, others are refused."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import mlx_janus

# isort: split
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from mlx_janus.server.schema import ChatRequest, ImageRequest
from tests.support.fake_engine import FakeEngine
from tests.support.serving import CHAT, refusal, served, to

OPERATIONS = {
    "/v1/chat/completions": "post",
    "/v1/images/generations": "post",
    "/images/{name}": "get",
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


def test_descriptions_are_sentences(described: Any) -> None:
    operations = [
        described.raw_schema["paths"][path][method] for path, method in OPERATIONS.items()
    ]
    schemas = described.raw_schema["components"]["schemas"]
    fields = [field for schema in schemas.values() for field in schema["properties"].values()]
    required = [part["description"] for part in (*operations, *schemas.values())]
    for text in required + [field["description"] for field in fields if "description" in field]:
        assert re.fullmatch(r"[A-Z`].*\.", text), text


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


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [1] * 1_000_000}, "messages"),
        ({"messages": [{"role": "assistant"}] * 100_000}, "messages"),
        ({"messages": [{"role": "user", "content": [1] * 1_000_000}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}], "stop": [""] * 1_000_000}, "stop"),
        (
            {
                "messages": [{"role": "user", "content": "x"}],
                "logit_bias": {str(token): "x" for token in range(300_000)},
            },
            "logit_bias",
        ),
    ],
)
def test_a_million_mistakes_cost_no_more_than_one(body: dict[str, Any], param: str) -> None:
    with served(FakeEngine(mlx_janus.load().config)) as url, to(url) as client:
        content = json.dumps(body).encode()
        started = time.perf_counter()
        reply = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})
        assert time.perf_counter() - started < 5  # each by itself they took ten
        assert refusal(reply, 400)["param"].startswith(param)


def test_what_is_not_known_is_not_kept() -> None:
    asked = ChatRequest.model_validate(
        {"messages": [{"role": "user", "content": "x", "y": 1}], "unknown": [{}] * 1000}
    )
    assert "unknown" not in repr(asked)
    assert asked.model_extra is None
    assert asked.messages[0].model_extra is None


@pytest.mark.parametrize(
    ("field", "neutral", "other"),
    [
        ("function_call", "none", {"name": "look_up"}),
        ("guided_json", None, {}),
        ("best_of", 1, 4),
    ],
)
def test_what_others_beside_openai_have(field: str, neutral: Any, other: Any) -> None:
    said = {"messages": [{"role": "user", "content": "x"}]}
    assert ChatRequest.model_validate(said | {field: neutral}).unsupported_field() is None
    assert ChatRequest.model_validate(said | {field: other}).unsupported_field() == field


def test_a_seed_of_minus_one_is_a_random_one() -> None:
    assert (
        ChatRequest.model_validate(
            {"messages": [{"role": "user", "content": "x"}], "seed": -1}
        ).seed
        is None
    )
    assert ImageRequest.model_validate({"prompt": "x", "seed": -1}).seed is None
    assert ImageRequest.model_validate({"prompt": "x", "seed": 3}).seed == 3
