"""The rules that a ``tokenizer.json`` may have.

The tokenizers library runs any rules: one may multiply a text to gigabytes, search a pattern for
hours, or end the library in a panic. So only the kinds are accepted that byte-level tokenizers of
Llama models have, which keep the length of a text: BPE, byte-level spelling, and splitting by
patterns that cannot backtrack without end.

Source: the ``tokenizer.json`` of Janus-1.3B, Janus-Pro and JanusFlow; the format is that of
``tokenizers/src`` (Rust).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset({"NFC"}),
    "pre_tokenizer": frozenset({"ByteLevel", "Digits", "Split"}),
    "decoder": frozenset({"ByteLevel"}),
    "post_processor": frozenset({"ByteLevel", "TemplateProcessing"}),
}
"""Accepted kinds of rules, by the part of the file. A "Sequence" of them is accepted too."""
_MEMBERS = ("normalizers", "pretokenizers", "decoders", "processors")  # of a "Sequence"
_MAX_RULES = 32  # rules in a part; Janus has 7
_MAX_PATTERN = 4096  # characters of a pattern; the longest of Janus has about 400
_MAX_REPEATS = 1  # repeats in one alternative of a pattern, as in Janus

# A pattern without escaped characters and classes: "x" stands for each of these.
_ATOM = re.compile(r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\.|\[:\w+:\]|[^\]\\])*\]", re.DOTALL)
_BACK_REFERENCE = re.compile(r"\\[1-9kgK]")
_REPEATED_GROUP = re.compile(r"\)(?:[*+]|\{)")
_REPEAT = re.compile(r"[*+]|\{\d*,\d*\}")


class RuleError(ValueError):
    """A rule that is not accepted. The text names it."""


def check_rules(data: Mapping[str, Any]) -> None:
    """Check the rules of a ``tokenizer.json``.

    Args:
        data: the file's JSON object.

    Raises:
        RuleError: a rule is of a kind that Janus's tokenizers do not have.
    """
    model = data.get("model")
    kind = model.get("type") if isinstance(model, Mapping) else None
    # The type is missing in old files; only BPE has merges.
    if not isinstance(model, Mapping) or kind not in ("BPE", None) or "merges" not in model:
        raise RuleError(f"its model is {_shown(kind)}, not BPE")
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise RuleError(f"its model has a {name}")
    _check_unknown_token(model)
    for part, kinds in _KINDS.items():
        rules = list(_flat(data.get(part), part))
        if len(rules) > _MAX_RULES:
            raise RuleError(f"its {part} has {len(rules)} rules")
        for rule in rules:
            kind = rule.get("type")
            if not isinstance(kind, str) or kind not in kinds:
                raise RuleError(f"its {part} has the rule {_shown(kind)}")
            if kind == "Split":
                _check_pattern(rule.get("pattern"))


def _check_unknown_token(model: Mapping[str, Any]) -> None:
    """Check that the vocabulary has the token for unknown characters, if the model names one.

    The library would fail at the first unknown character of a text.

    Raises:
        RuleError: the vocabulary lacks the token.
    """
    token = model.get("unk_token")
    vocabulary = model.get("vocab")
    known = isinstance(token, str) and isinstance(vocabulary, Mapping) and token in vocabulary
    if token is not None and not known:
        raise RuleError(f"its vocabulary lacks the unk_token {_shown(token)}")


def _flat(rule: Any, part: str) -> Iterator[Mapping[str, Any]]:
    """Yield a rule, or the rules of a "Sequence" at any depth; None gives no rule.

    Raises:
        RuleError: something is not a rule.
    """
    if rule is None:
        return
    if not isinstance(rule, Mapping):
        raise RuleError(f"its {part} is not a rule")
    if rule.get("type") != "Sequence":
        yield rule
        return
    for name in _MEMBERS:
        members = rule.get(name, ())
        if not isinstance(members, list | tuple):
            raise RuleError(f"its {part} is not a list of rules")
        for member in members:
            yield from _flat(member, part)


def _check_pattern(pattern: Any) -> None:
    """Check that a search for a pattern takes a time that is bounded by the text.

    A repeated group, as in ``(a+)+``, can match in exponentially many ways. Each further repeat in
    an alternative multiplies the time by the length of the text.

    Raises:
        RuleError: the pattern has a repeated group, a reference to a group, or too many repeats; or
            is too long or no pattern.
    """
    if isinstance(pattern, Mapping) and isinstance(pattern.get("String"), str):
        if not 0 < len(pattern["String"]) <= _MAX_PATTERN:
            raise RuleError("it splits at an empty or a very long text")
        return
    regex = pattern.get("Regex") if isinstance(pattern, Mapping) else None
    if not isinstance(regex, str) or len(regex) > _MAX_PATTERN:
        raise RuleError("one of its patterns is no text, or a very long one")
    if _BACK_REFERENCE.search(regex.replace(r"\\", "")):
        raise RuleError(f"the pattern {_shown(regex)} refers to a group")
    outline = _ATOM.sub("x", regex)
    if _REPEATED_GROUP.search(outline):
        raise RuleError(f"the pattern {_shown(regex)} repeats a group")
    if any(len(_REPEAT.findall(part)) > _MAX_REPEATS for part in outline.split("|")):
        raise RuleError(f"the pattern {_shown(regex)} has several repeats")


def _shown(value: Any) -> str:
    """Return a value from the file for a message, in at most 40 characters."""
    text = repr(value) if isinstance(value, str | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}..."
