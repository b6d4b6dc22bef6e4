"""Answers by a JSON Schema: valid, compact, ended in time, sampled from the model's odds."""

from __future__ import annotations

import contextlib
import json
import random
import sys
import time
from typing import Any

import mlx.core as mx
import numpy as np
import pydantic
import pytest
from jsonschema_rs import Draft202012Validator

import mlx_janus
from mlx_janus.decode.grammar import (
    MAX_SCHEMA_BYTES,
    Grammar,
    Tool,
    call_grammar,
    schema_grammar,
)
from mlx_janus.decode.sampling import choose
from mlx_janus.decode.text import TextOptions
from mlx_janus.errors import OptionError
from mlx_janus.inference.results import TextResult
from mlx_janus.inference.text_generation import last_result
from mlx_janus.installation import install_command
from mlx_janus.processing.prompts import Turn

Janus = mlx_janus.JanusPipeline

QUESTION = "What is in the picture?"
SHAPE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "hue": {"enum": ["red", "blue", "green"]},
        "n": {"type": "integer"},
        "words": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["hue", "n", "words"],
    "additionalProperties": False,
}
ANYTHING = Grammar("start: /(.|\\n)*/", allows_words=True)


@pytest.fixture(scope="module")
def tiny() -> Janus:
    return mlx_janus.load("tiny")


def answer(janus: Janus, grammar: Grammar, **options: Any) -> TextResult:
    turns = [Turn("user", QUESTION)]
    return last_result(
        janus.stream_turns(turns, (), options=TextOptions(grammar=grammar, **options))
    )


def random_schema(choice: random.Random, depth: int = 0) -> dict[str, Any]:
    """A schema of the keywords that people write, at most three objects or lists deep."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kinds += ["object", "array", "anyOf", "tuple"] if depth < 3 else []
    kind = choice.choice(["object", "array", "anyOf", "tuple"] if depth == 0 else kinds)
    if kind == "object":
        names = [f'{number}"' for number in range(choice.randint(0, 3))]
        return {
            "type": "object",
            "properties": {name: random_schema(choice, depth + 1) for name in names},
            "required": [name for name in names if choice.random() < 0.6],
            "additionalProperties": choice.random() < 0.2,
        }
    if kind == "array":
        low = choice.randint(0, 2)
        items = random_schema(choice, depth + 1)
        return {"type": "array", "items": items, "minItems": low, "maxItems": low + 2}
    if kind == "tuple":
        parts = [random_schema(choice, depth + 1) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2}
    if kind == "anyOf":
        return {"anyOf": [random_schema(choice, depth + 1) for _ in range(choice.randint(1, 3))]}
    low = choice.randint(-20, 20)
    leaves: dict[str, dict[str, Any]] = {
        "string": {"type": "string", "minLength": choice.randint(0, 3), "maxLength": 12},
        "integer": {"type": "integer", "minimum": low, "maximum": low + 30},
        "number": {"type": "number", "exclusiveMinimum": low},
        "enum": {"enum": ["a", 'say "b"', 3, None, True, "Größe\n"]},
        "const": {"const": choice.choice(["x", 7, None, {"a": [1]}])},
        "pattern": {"type": "string", "pattern": "^[A-C]{2,3}-[0-9]+$"},
    }
    return leaves.get(kind, {"type": kind})


def drawn_without_a_model(janus: Janus, schema: dict[str, Any], length: int, seed: int) -> str:
    """A text of at most ``length`` tokens, each drawn from those that may follow."""
    choice = np.random.default_rng(seed)
    constraint = janus.grammars.constraint(schema_grammar(schema), length)
    text = b""
    for room in range(length - 1, -1, -1):
        mask: mx.array | None = constraint.mask()
        while mask is not None:
            token = int(choice.choice(np.flatnonzero(np.array(mask))))
            mask = constraint.another_mask(token, room)
        constraint.add(token)
        text += janus.prompts.spelling(token)[1] or b""
        if constraint.ended:
            break
    return text.decode() if constraint.complete else ""


def test_answers_of_200_random_schemas_are_valid(tiny: Janus) -> None:
    closing = {tiny.prompts.encode(character)[0]: 4.0 for character in '"]},'}  # for short values
    finished = 0
    for seed in range(200):
        schema = random_schema(random.Random(seed))
        length = 10 + seed // 3
        text = drawn_without_a_model(tiny, schema, length, seed)
        if seed % 20 == 0:
            options: dict[str, Any] = {"temperature": 1.5, "seed": seed, "logit_bias": closing}
            result = tiny.generate_text(QUESTION, schema=schema, max_tokens=60, **options)
            assert result.finish_reason == "stop"
            Draft202012Validator(schema).validate(json.loads(result.text))
        if not text:  # no value of the schema is as short
            assert length < 70
            continue
        finished += 1
        value = json.loads(text)
        Draft202012Validator(schema).validate(value)
        compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
        assert len(text) <= len(compact) + 200  # escapes and digits, but no white space
    assert finished > 160


@pytest.mark.check
@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_grammar_of_all_texts_changes_nothing(tiny: Janus, temperature: float) -> None:
    options: dict[str, Any] = {"max_tokens": 30, "temperature": temperature, "seed": 1}
    options |= {"frequency_penalty": 0.1, "logprobs": True, "top_logprobs": 2}
    plain = tiny.generate_text(QUESTION, **options)
    free = answer(tiny, ANYTHING, **options)
    assert (free.text, free.tokens) == (plain.text, plain.tokens)
    assert free.finish_reason == plain.finish_reason
    assert plain.logprobs is not None
    assert free.logprobs is not None
    for one, other in zip(plain.logprobs, free.logprobs, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.check
@pytest.mark.parametrize("temperature", [0, 1.0, 3.0])
def test_tokens_are_those_of_the_model_among_the_allowed(tiny: Janus, temperature: float) -> None:
    """The same noise and the model's own logits, over the tokens that continue a value."""
    values = ["red circle", "blue", "bluish circle", "green", "grey"]
    texts = [space + json.dumps(value) for value in values for space in ("", " ")]
    spelled = [tiny.prompts.spelling(token)[1] for token in range(tiny.config.language.vocab_size)]
    prompt = tiny.prompts.answering([Turn("user", QUESTION)])
    seen = set()
    for seed in range(4):
        key, text, tokens = mx.random.key(seed), "", list[int]()
        while text not in texts:
            key, step_key = mx.random.split(key)
            allowed = [
                content is not None
                and any(whole.encode().startswith(text.encode() + content) for whole in texts)
                for content in spelled
            ]
            embeddings = tiny.model.embed_text(mx.array([[*prompt, *tokens]]))
            logits = tiny.model.text_logits(tiny.model.hidden_states(embeddings))[0, -1:]
            masked = mx.where(mx.array(allowed), logits, -mx.inf)
            tokens.append(choose(masked, step_key[None], temperature, 0.9).item())
            text += (spelled[tokens[-1]] or b"").decode()
        result = tiny.generate_text(
            QUESTION, schema={"enum": values}, temperature=temperature, top_p=0.9, seed=seed
        )
        assert list(result.tokens) == tokens
        assert result.text == text.strip()
        assert result.finish_reason == "stop"
        seen.add(text)
    assert len(seen) > 1 or temperature == 0


def test_an_answer_of_one_token_is_cut(tiny: Janus) -> None:
    result = tiny.generate_text(QUESTION, schema="json", max_tokens=1)
    assert len(result.tokens) == 1
    assert result.finish_reason == "length"


def test_log_probabilities_are_the_models_own(tiny: Janus) -> None:
    result = tiny.generate_text(QUESTION, schema={"enum": [7, 8]}, logprobs=True, top_logprobs=1)
    assert result.logprobs is not None
    first = result.logprobs[0]
    plain = tiny.generate_text(QUESTION, max_tokens=1, logprobs=True, top_logprobs=1)
    assert plain.logprobs is not None
    assert first.top[0].id == plain.logprobs[0].id  # it would have begun with a word
    assert first.top[0].logprob == pytest.approx(plain.logprobs[0].logprob, abs=1e-4)
    assert first.logprob < first.top[0].logprob


@pytest.mark.parametrize("temperature", [0, 2.0])
def test_json_ends_before_the_limit_if_it_can(pro: Janus, temperature: float) -> None:
    shortest = len('{"hue":"red","n":1,"words":[]}')  # in tokens at most
    lengths = set()
    for limit in range(shortest, shortest + 16, 3):
        result = pro.generate_text(
            QUESTION, schema=SHAPE, max_tokens=limit, temperature=temperature, seed=limit
        )
        assert result.finish_reason == "stop"
        assert len(result.tokens) <= limit
        Draft202012Validator(SHAPE).validate(json.loads(result.text))
        lengths.add(len(result.tokens))
    assert len(lengths) > 1
    cut = pro.generate_text(QUESTION, schema=SHAPE, max_tokens=6)
    assert (cut.finish_reason, len(cut.tokens)) == ("length", 6)
    assert '{"hue":"'.startswith(cut.text[:7])


def test_a_number_at_the_limit_is_complete(tiny: Janus) -> None:
    result = tiny.generate_text(
        QUESTION, schema={"type": "number"}, max_tokens=5, logit_bias={16: 50}
    )
    assert (result.text, result.finish_reason) == ("11111", "stop")


def test_any_object(pro: Janus) -> None:
    for seed in range(3):
        result = pro.generate_text(
            QUESTION, schema="json", max_tokens=40, temperature=1.0, seed=seed
        )
        assert isinstance(json.loads(result.text), dict)
        assert result.finish_reason == "stop"


def test_a_pydantic_model_and_its_stream(tiny: Janus) -> None:
    class Scene(pydantic.BaseModel):
        color: str
        count: int = pydantic.Field(ge=0, le=9)

    result = tiny.generate_text(QUESTION, schema=Scene, max_tokens=40)
    Scene.model_validate_json(result.text)
    chunks = list(tiny.stream_text(QUESTION, schema=Scene.model_json_schema(), max_tokens=40))
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert len(chunks) > 5


def test_a_conversation_goes_on_after_json(tiny: Janus) -> None:
    conversation = tiny.conversation()
    first = conversation.send(QUESTION, schema=SHAPE, max_tokens=40)
    json.loads(first.text)
    assert conversation.messages[-1].tokens == first.tokens
    second = conversation.send("And now?", schema={"enum": ["red", "blue"]})
    assert second.text in ('"red"', '"blue"')
    assert second.cached_tokens >= first.prompt_tokens
    assert conversation.send("And now?", max_tokens=4).text[:1] != "{"


def test_calls_and_words(pro: Janus, tiny: Janus) -> None:
    tools = [
        Tool("paint", SHAPE),
        Tool('odd "name"', {"$ref": "#/$defs/x", "$defs": {"x": {"type": "object"}}}),
        Tool("nothing"),
    ]
    for index, tool in enumerate(tools):
        for offered in ([tool], tools):
            call = answer(pro, call_grammar(offered), max_tokens=90, temperature=1.0, seed=index)
            value = json.loads(call.text)
            assert list(value) == ["name", "arguments"]
            assert value["name"] in [tool.name for tool in offered]
            if value["name"] == "paint":
                Draft202012Validator(SHAPE).validate(value["arguments"])
            if value["name"] == "nothing":
                assert value["arguments"] == {}
    either = call_grammar(tools, allows_words=True)
    plain = tiny.generate_text(QUESTION, max_tokens=20)
    words = answer(tiny, either, max_tokens=20)
    assert (words.tokens, words.finish_reason) == (plain.tokens, plain.finish_reason)
    brace = tiny.prompts.encode("{")[0]
    call = answer(tiny, either, max_tokens=60, logit_bias={brace: 100})
    assert json.loads(call.text)["name"] in [tool.name for tool in tools]


ONE_FIELD: dict[str, Any] = {"properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"type": None},
        {"type": ["object", "null"]},
        {**ONE_FIELD, "additionalProperties": False},
        {"anyOf": [{"type": "string"}, {"type": "object"}]},
        {"$ref": "#/$defs/x", "$defs": {"x": ONE_FIELD}},
    ],
)
def test_the_arguments_of_a_call_are_an_object(pro: Janus, parameters: dict[str, Any]) -> None:
    """Its random answers would begin with another value in nearly all cases."""
    grammar = call_grammar([Tool("f", parameters)])
    for seed in range(3):
        call = answer(pro, grammar, max_tokens=90, temperature=1.0, seed=seed)
        arguments = json.loads(call.text)["arguments"]
        assert isinstance(arguments, dict)
        if "properties" in str(parameters):
            assert isinstance(arguments["a"], int)


@pytest.mark.parametrize("kind", ["string", ["string", "null"], 3])
def test_arguments_of_another_type_are_refused(kind: Any) -> None:
    with pytest.raises(OptionError, match="tools: the arguments of 'f' must have the type"):
        call_grammar([Tool("f", {"type": kind})])


def test_mistakes_are_one_clear_line(tiny: Janus) -> None:
    loop: dict[str, Any] = {}
    loop["items"] = loop
    wide: dict[str, Any] = {}
    wide.update({str(number): wide for number in range(20)})
    mistakes: list[tuple[Any, str]] = [
        (3, 'schema must be a JSON Schema as a dict, a pydantic model or "json", got int'),
        ("yaml", 'schema must be a JSON Schema as a dict, a pydantic model or "json", got str'),
        ({"enum": [float("nan")]}, "schema must hold values of JSON only"),
        ({"enum": [{1, 2}]}, "schema must hold values of JSON only"),
        (loop, "schema is too deep: at most 64 levels"),
        (wide, "schema is too deep: at most 64 levels"),
        ({"enum": ["x" * MAX_SCHEMA_BYTES]}, "schema is too large: "),
        ({"type": "strange"}, "schema is not supported: Invalid type: strange"),
        ({"uniqueItems": True}, 'schema is not supported: Unimplemented keys: ["uniqueItems"]'),
        ({"$ref": "#/$defs/no"}, "schema is not supported: Pointer '/$defs/no' does not exist"),
        ({"$ref": "https://example.org/x"}, "schema is not supported: Resource 'https://exa"),
        ({"$ref": "#"}, "schema matches no value: correct it"),
        ({"pattern": "("}, "schema is not supported: regex parse error"),
        ({"pattern": "(?=a)"}, "schema is not supported: regex parse error"),
        ({"enum": ["\ud800"]}, 'schema is not supported: failed to parse "%json"'),
    ]
    for schema, message in mistakes:
        with pytest.raises(OptionError) as caught:
            tiny.stream_text(QUESTION, schema=schema)  # refused before the stream is read
        assert str(caught.value).startswith(message), caught.value
        assert len(str(caught.value)) <= 400
    with pytest.raises(OptionError, match="lookup does not go with a schema"):
        tiny.generate_text(QUESTION, schema="json", lookup=4)
    turns = [Turn("user", QUESTION), Turn("assistant", "{")]
    with pytest.raises(OptionError, match="does not go with the beginning of an answer"):
        tiny.stream_turns(turns, (), options=TextOptions(grammar=schema_grammar("json")))


def test_keywords_that_cannot_be_enforced_may_be_ignored(tiny: Janus) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "boolean"}, "maxItems": 3}
    result = answer(tiny, schema_grammar(schema, lenient=True), max_tokens=40)
    assert all(isinstance(item, bool) for item in json.loads(result.text))


HOSTILE: dict[str, dict[str, Any]] = {
    "patterns": {"pattern": "^" + "(a|b)?" * 5000 + "$"},
    "repeated patterns": {"type": "string", "pattern": "^((a{0,100}){0,100}){0,100}$"},
    "many automaton states": {"type": "string", "pattern": "(.*a.{18}){3}"},
    "huge enum": {"enum": [f"{number:08}" for number in range(5000)]},
    "enum of objects": {"enum": [{"a": number, "b": [number] * 4} for number in range(1500)]},
    "many fields": {"required": [f"field {number}" for number in range(3000)], "type": "object"},
    "endless recursion": {
        "type": "object",
        "properties": {"a": {"$ref": "#"}, "b": {"$ref": "#"}},
        "required": ["a", "b"],
    },
    "recursion without a value": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "combinations": {
        "allOf": [
            {"anyOf": [{"properties": {f"x{n}": {}}}, {"properties": {f"y{n}": {}}}]}
            for n in range(18)
        ]
    },
    "long list": {"type": "array", "minItems": 10**9, "items": {"type": "integer"}},
    "long text": {"type": "string", "minLength": 10**9},
    "large divisor": {"type": "integer", "multipleOf": 987654321},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_bounded_time(tiny: Janus, name: str) -> None:
    started = time.process_time()
    with contextlib.suppress(OptionError):
        tiny.generate_text(QUESTION, schema=HOSTILE[name], max_tokens=4, temperature=2.0, seed=1)
    assert time.process_time() - started < 6


def test_a_missing_package_is_named(tiny: Janus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(OptionError) as caught:
        tiny.generate_text(QUESTION, schema="json")
    assert str(caught.value) == f"schema needs the package llguidance: {install_command('schema')}"
    assert tiny.generate_text(QUESTION, max_tokens=1).tokens


def test_an_answer_by_a_schema_may_have_one_token(tiny: Janus) -> None:
    assert len(answer(tiny, ANYTHING, max_tokens=1).tokens) == 1
