"""Constrained decoding: the tokens by which an answer can continue within a grammar.

llguidance keeps the state of an answer in its grammar, and computes the mask of the next token. A
mask is a few microseconds of work on the CPU, done while the device computes the logits.

An answer in JSON is also brought to its end in time: a token is refused if the shortest end after
it, as ``_shortest_end`` finds it, has more tokens than the answer may still have.
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import OptionError
from .grammar import Grammar, check_installed

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_LONGEST_SPELLED = 32  # bytes of the tokens in which a forced text is spelled, at most
_MAX_COMPILED = 32  # compiled grammars to keep
_MAX_REFUSED = 16  # tokens to refuse in one place; then the next one is that of the shortest end
_WATCHED = 1024  # tokens before an answer's maximum length in which its end is watched
_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 500_000,  # work to compile the patterns and strings of a grammar
    "step_lexer_fuel": 200_000,  # work on patterns for one mask
    "step_max_items": 50_000,  # work on the grammar's rules for one mask
    "max_grammar_size": 100_000,  # symbols of the rules
}
"""Bounds of the work on a grammar, as llguidance counts it. They hold for schemas of strangers."""
_LIMIT_REACHED = re.compile(
    r"\blimits?\b|\bfuel\b|max is|[Tt]oo (many|big|large|complex)|lexer error"
)
_PLACE = re.compile(r"(^|(?<=\n))at \d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>")
# Bytes that continue JSON to an early end, the best first: outside and inside a string.
_ENDING_OUTSIDE = b'}],:"0123456789ntf[{-.eE+'
_ENDING_INSIDE = b'"'
# Bytes to try in a string that cannot end yet, and after a backslash.
_FILLING = b"a0A -./:@_1Z+"
_ESCAPED = b'n"\\/bfrtu'

Spelling = Callable[[int], tuple[str, bytes | None]]
"""The text and the bytes of a token; None instead of bytes for a control token."""


class Vocabulary:
    """A model's tokens in llguidance's form. Building it takes up to seconds, once for a model.

    Args:
        size: number of the model's tokens.
        spelling: returns a token's text and bytes.
        encode: encodes text as ids.
        bos: id that begins a prompt.
        ends: ids that end an answer.
    """

    def __init__(
        self,
        size: int,
        spelling: Spelling,
        encode: Callable[[str], list[int]],
        bos: int,
        ends: Collection[int],
    ):
        from llguidance import LLTokenizer, TokenizerWrapper

        spelled = [spelling(token) for token in range(size)]
        self.size = size
        self.bytes = [content or b"" for _, content in spelled]
        self.end = min(ends)
        self._encode = encode
        # The attributes that ``TokenizerWrapper`` reads:
        self.eos_token_id = self.end
        self.bos_token_id = bos
        self.tokens = [text.encode() if content is None else content for text, content in spelled]
        self.special_token_ids = [
            token for token, (_, content) in enumerate(spelled) if content is None
        ]
        self.tokenizer: LLTokenizer = LLTokenizer(
            TokenizerWrapper(self), n_vocab=size, eos_token=sorted(ends)
        )
        self._ids: dict[bytes, int] = {}  # the lowest id of each text
        for token in reversed(range(size)):
            if self.bytes[token]:
                self._ids[self.bytes[token]] = token
        self._longest = min(max(map(len, self._ids)), _LONGEST_SPELLED)
        self.lengths = np.array([len(content) for content in self.bytes])  # of each token

    def __call__(self, text: str) -> list[int]:
        """Return the ids of a text; llguidance calls this."""
        return self._encode(text)

    def id_of(self, text: bytes) -> int | None:
        """Return the id of the token with exactly these bytes; None if there is none."""
        return self._ids.get(text)

    def spell(self, text: bytes, most: int) -> list[int]:
        """Return tokens that spell a text or its beginning, each the longest that fits.

        Args:
            text: bytes.
            most: maximum number of tokens.
        """
        tokens: list[int] = []
        start = 0
        while start < len(text) and len(tokens) < most:
            for end in range(min(start + self._longest, len(text)), start, -1):
                token = self._ids.get(text[start:end])
                if token is not None:
                    tokens.append(token)
                    start = end
                    break
            else:
                break
        return tokens

    def allowed_by(self, matcher: LLMatcher) -> np.ndarray:
        """Return which tokens may follow in a grammar: (size,), bool."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=self.size, bitorder="little").astype(bool)

    def can_begin(self, matcher: LLMatcher) -> bool:
        """Return whether an answer can begin with anything but a space."""
        allowed = self.allowed_by(matcher)
        space = self.id_of(b" ")
        if space is not None:
            allowed[space] = False
        return bool(allowed.any())


class GrammarCompiler:
    """The grammars of one model: compiled when first used, and the last ones kept.

    Any thread may call its methods.

    Args:
        vocabulary: builds the model's tokens in llguidance's form.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]):
        self._make_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()  # by source, newest last
        self._lock = threading.Lock()  # of the compiled grammars
        self._compiling = threading.Lock()  # one grammar is compiled at a time, in bounded memory

    def check(self, grammar: Grammar) -> None:
        """Compile a grammar, so that ``constraint`` has it ready.

        Raises:
            OptionError: llguidance is not installed, or the grammar is refused, as for
                ``constraint``.
        """
        self._matcher(grammar)

    def constraint(self, grammar: Grammar, max_tokens: int) -> Constraint:
        """Return the state of a new answer.

        Args:
            grammar: the grammar of the answer.
            max_tokens: the maximum length of the answer.

        Raises:
            OptionError: llguidance is not installed, or a schema has mistakes or unknown keywords,
                matches nothing, or takes too much work.
        """
        matcher = self._matcher(grammar).deep_copy()
        assert self._vocabulary is not None  # ``_matcher`` has made it
        return Constraint(matcher, self._vocabulary, grammar, max_tokens)

    def _matcher(self, grammar: Grammar) -> LLMatcher:
        """Return the grammar's matcher, which has read no token yet. Copy it before use.

        Raises:
            OptionError: what :meth:`constraint` raises.
        """
        check_installed(grammar.subject)
        matcher = self._find(grammar)
        if matcher is not None:
            return matcher
        with self._compiling:
            matcher = self._find(grammar)  # another thread may have compiled it
            if matcher is None:
                matcher = self._compile(grammar)
            with self._lock:
                self._compiled[grammar.source] = matcher
                while len(self._compiled) > _MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return matcher

    def _find(self, grammar: Grammar) -> LLMatcher | None:
        """Return a grammar that is compiled already."""
        with self._lock:
            if grammar.source in self._compiled:
                self._compiled.move_to_end(grammar.source)
            return self._compiled.get(grammar.source)

    def _compile(self, grammar: Grammar) -> LLMatcher:
        """Compile a grammar.

        Raises:
            OptionError: the grammar is refused.
        """
        from llguidance import LLMatcher, LLParserLimits

        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        limits = LLParserLimits(verbose_errors=False, **_LIMITS)
        matcher = LLMatcher(self._vocabulary.tokenizer, grammar.source, log_level=0, limits=limits)
        _check_matcher(matcher, grammar.subject)
        if not self._vocabulary.can_begin(matcher):
            _check_matcher(matcher, grammar.subject)
            raise OptionError(f"{grammar.subject} matches no value: correct it")
        return matcher


def _check_matcher(matcher: LLMatcher, subject: str) -> None:
    """Check that a grammar, and the answer so far, are free of errors.

    Raises:
        OptionError: the grammar is refused, or has become too complex.
    """
    if not matcher.is_error():
        return
    error = matcher.get_error().split("\n   1 | ")[0]  # what follows repeats the grammar
    if "NoExtension" in error:
        raise OptionError(f"{subject} matches no value: correct it")
    if _LIMIT_REACHED.search(error):
        raise OptionError(f"{subject} is too complex: make it smaller, or its patterns simpler")
    reason = " ".join(_PLACE.sub("", error).split())
    raise OptionError(f"{subject} is not supported: {reason or 'it is not valid'}")


class _JSONPlace:
    """The place of an answer's end in JSON: whether a string is open, by its bytes so far."""

    def __init__(self) -> None:
        self.in_string = False
        self.escaped = False  # whether the next byte follows a backslash
        self.begun = False  # whether anything but spaces has been added
        self.is_words = False  # whether the text does not begin with "{"

    def add(self, text: bytes) -> None:
        """Move past some bytes."""
        for byte in text:
            if not self.begun and byte not in b" \t\r\n":
                self.begun = True
                self.is_words = byte != ord("{")
            if self.escaped:
                self.escaped = False
            elif self.in_string:
                self.in_string = byte != ord('"')
                self.escaped = byte == ord("\\")
            else:
                self.in_string = byte == ord('"')


class Constraint:
    """The state of one answer in its grammar. Made by ``GrammarCompiler.constraint``.

    Args:
        matcher: the grammar at its start, for this answer only.
        vocabulary: the model's tokens.
        grammar: the grammar.
        max_tokens: the maximum length of the answer.
    """

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, grammar: Grammar, max_tokens: int
    ):
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._grammar = grammar
        self._place = _JSONPlace()
        self._allowed = np.zeros(0, bool)  # (V,): the mask of the next token
        self._refused = 0  # tokens that were refused in this place
        # Whether the answer is brought to its end. Without an end in reach, it is cut.
        self._ends_in_time = self._end(matcher, self._place, max_tokens) is not None

    @property
    def end(self) -> int:
        """An id that ends an answer."""
        return self._vocabulary.end

    @property
    def complete(self) -> bool:
        """Whether the answer is complete JSON, although it might go on."""
        return self._matcher.is_accepting() and not self._is_words(self._place)

    @property
    def ended(self) -> bool:
        """Whether the answer is complete, and nothing may follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> mx.array:
        """Return which tokens may follow: (V,), bool.

        Raises:
            OptionError: the grammar has become too complex.
        """
        self._allowed = self._tokens_that_follow()
        self._refused = 0
        return mx.array(self._allowed)

    def another_mask(self, token: int, room: int) -> mx.array | None:
        """Check whether the answer can still end in time after a token that may follow.

        Choosing again with the mask and the same noise is sampling from the tokens that pass this
        check.

        Args:
            token: the chosen token.
            room: number of tokens that may follow it.

        Returns:
            The mask to choose again with, without the token; None: the token passes.
        """
        if not self._ends_in_time or self._fits(token, room):
            return None
        self._allowed[token] = False
        self._refused += 1
        if self._refused >= _MAX_REFUSED or not self._allowed.any():
            self._allowed = self._next_of_end(room + 1)
        return mx.array(self._allowed)

    def _tokens_that_follow(self) -> np.ndarray:
        """Return which tokens may follow: (V,), bool.

        Raises:
            OptionError: the grammar has become too complex.
        """
        allowed = self._vocabulary.allowed_by(self._matcher)
        _check_matcher(self._matcher, self._grammar.subject)
        return allowed

    def _fits(self, token: int, room: int) -> bool:
        """Return whether an end of at most ``room`` tokens follows a token."""
        if room > _WATCHED or token == self.end:
            return True
        place = copy(self._place)
        place.add(self._vocabulary.bytes[token])
        matcher = self._matcher.deep_copy()
        return matcher.consume_token(token) and self._end(matcher, place, room) is not None

    def _next_of_end(self, room: int) -> np.ndarray:
        """Return a mask of the first token of a short end; if there is no end, of all tokens.

        Args:
            room: maximum number of tokens.
        """
        path = self._end(self._matcher, self._place, room)
        if path is None or self._refused > _MAX_REFUSED:
            self._ends_in_time = False
            return self._tokens_that_follow()
        only = np.zeros(self._vocabulary.size, bool)
        only[path[0] if path else self.end] = True
        return only

    def add(self, token: int) -> None:
        """Add a token to the answer.

        Raises:
            OptionError: the grammar has become too complex.
        """
        self._place.add(self._vocabulary.bytes[token])
        self._matcher.consume_token(token)
        _check_matcher(self._matcher, self._grammar.subject)

    def _is_words(self, place: _JSONPlace) -> bool:
        return self._grammar.allows_words and place.is_words

    def _end(self, matcher: LLMatcher, place: _JSONPlace, room: int) -> Sequence[int] | None:
        """Return a short end of the answer; [] if it may end here, None if there is none in reach.

        Args:
            matcher: the state of the answer, which is not changed.
            place: its place in JSON.
            room: maximum number of tokens. Ends of more than ``_WATCHED`` are not looked for.
        """
        if self._is_words(place):
            return []
        return _shortest_end(
            matcher.deep_copy(), self._vocabulary, copy(place), min(room, _WATCHED)
        )


def _shortest_end(
    matcher: LLMatcher, vocabulary: Vocabulary, place: _JSONPlace, room: int
) -> list[int] | None:
    """Find a short end of JSON: close strings, lists and objects as soon as the grammar allows.

    The end is a greedy one, not always the shortest of all. The rest of an end is the end after its
    first tokens, so an answer that follows it always reaches its end.

    Args:
        matcher: the state of the answer; it is changed.
        vocabulary: the model's tokens.
        place: the place in JSON; it is changed.
        room: maximum number of tokens.

    Returns:
        The tokens; None if there is no end of at most ``room`` tokens, or none was found.
    """
    path: list[int] = []
    while not matcher.is_accepting():
        # Where only one text can follow, take it in the longest tokens.
        tokens = vocabulary.spell(matcher.compute_ff_bytes(), room - len(path))
        if not tokens and len(path) < room:
            tokens = _next_token(matcher, vocabulary, place)
        if not tokens or not matcher.consume_tokens(tokens):
            return None
        for token in tokens:
            place.add(vocabulary.bytes[token])
        path += tokens
    return path


def _next_token(matcher: LLMatcher, vocabulary: Vocabulary, place: _JSONPlace) -> list[int]:
    """Return the next token of a short end; [] if nothing may follow.

    It is a byte that leads to an end, else the longest of the tokens that may follow.
    """
    if place.escaped:
        candidates = _ESCAPED
    elif place.in_string:
        candidates = _ENDING_INSIDE + _FILLING
    else:
        candidates = _ENDING_OUTSIDE
    for byte in candidates:
        token = vocabulary.id_of(bytes([byte]))
        if token is not None and matcher.validate_tokens([token]):
            return [token]
    lengths = np.where(vocabulary.allowed_by(matcher), vocabulary.lengths, 0)
    longest = int(lengths.argmax())
    return [longest] if lengths[longest] else []
