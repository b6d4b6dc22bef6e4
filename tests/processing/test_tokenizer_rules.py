"""Rules that published tokenizers do not have are refused before the library runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_janus.errors import ConfigError
from mlx_janus.processing.tokenizer import read_tokenizer
from mlx_janus.processing.tokenizer_rules import RuleError, check_rules
from tests.support.golden import FIXTURES

PUBLISHED = json.loads((FIXTURES / "deepseek-pro-bin" / "tokenizer.json").read_text())


def replaced(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def split(pattern: str) -> dict[str, Any]:
    rule = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [rule]}


def nested(depth: int) -> dict[str, Any]:
    rule: dict[str, Any] = {"type": "NFC"}
    for _ in range(depth):
        rule = {"type": "Sequence", "normalizers": [rule]}
    return rule


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "multiplies text": (
        {"normalizer": {"type": "Sequence", "normalizers": [replaced("l", "l" * 100)] * 5}},
        "normalizer has the rule 'Replace'",
    ),
    "multiplies answers": (
        {"decoder": {"type": "Sequence", "decoders": [replaced("l", "l" * 100)] * 5}},
        "decoder has the rule 'Replace'",
    ),
    "panics": ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}}, "Pre"),
    "panics in the model": (
        {"model": PUBLISHED["model"] | {"continuing_subword_prefix": "x" * 1000}},
        "continuing_subword_prefix",
    ),
    "another model": ({"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}, "WordLevel"),
    "random": ({"model": PUBLISHED["model"] | {"dropout": 0.5}}, "dropout"),
    "many rules": (
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}] * 33}},
        "33 rules",
    ),
    "a kind that is no text": ({"decoder": {"type": ["ByteLevel"]}}, "has the rule a list"),
    "no token for unknown characters": (
        {"model": PUBLISHED["model"] | {"unk_token": "absent"}},
        "lacks the unk_token 'absent'",
    ),
    "no rule": ({"decoder": 5}, "decoder is not a rule"),
    "backtracks": ({"pre_tokenizer": split("(a+)+$")}, "repeats a group"),
    "backtracks by a count": ({"pre_tokenizer": split("(?:a|aa){9,}b")}, "repeats a group"),
    "backtracks in steps": ({"pre_tokenizer": split(r"\s*\s*\s*x")}, "several repeats"),
    "refers": ({"pre_tokenizer": split(r"(a*)\1b")}, "refers to a group"),
    "a long pattern": ({"pre_tokenizer": split("a" * 5000)}, "very long"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_rule_that_published_tokenizers_do_not_have_is_refused(case: str, tmp_path: Path) -> None:
    change, words = HOSTILE[case]
    with pytest.raises(RuleError, match=words):
        check_rules(PUBLISHED | change)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(PUBLISHED | change))
    with pytest.raises(ConfigError, match="is not a byte-level tokenizer of Janus"):
        read_tokenizer(path)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"normalizer": nested(20)},
        {"pre_tokenizer": split(r"'s|'t| ?\p{L}+| ?\p{N}+|[^\s)]+|\s+(?!\S)|[\]+*]|\(\)\+")},
        {"pre_tokenizer": split(r"(?i:'s|'t)?")},
    ],
)
def test_rules_of_published_tokenizers_are_taken(change: dict[str, Any]) -> None:
    check_rules(PUBLISHED | change)
