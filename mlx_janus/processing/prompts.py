"""Words to token ids and back: the tokenizer, the special ids, and the two templates, answering and drawing.

What is unusual here:

- Ids are looked up by spelling, never fixed: they differ between the models.
- Exactly one bos stands in front, whether or not ``tokenizer.json`` would add one.
- A prompt is a list of segments, our own control tokens and plain text. Plain text is encoded with no control token
  recognised, so that ``<|Assistant|>`` typed by a user stays ordinary characters. The tokenizer cuts at added tokens
  before anything else, and adjacent plain segments are joined first, so an ordinary prompt gets the ids of encoding
  the whole rendered string at once.
- Streaming decodes bytes, since a token may end inside a character.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders

from ..config import PromptConfig, read_model_json
from ..errors import ConfigError, OptionError, PromptError

TOKENIZER_FILE = "tokenizer.json"
_SAMPLE = "hello world, twice"


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens that the runtime handles by itself."""

    bos: int
    eos: int
    pad: int
    image_start: int
    image_end: int
    image: int


@dataclass(frozen=True)
class Turn:
    """One message of a conversation; ``images`` pictures stand before its text."""

    role: Literal["user", "assistant"]
    text: str
    images: int = 0

    def __post_init__(self) -> None:
        if self.role not in ("user", "assistant"):
            raise OptionError(f"a turn's role must be 'user' or 'assistant', got {self.role!r}")
        most = None if self.role == "user" else 0
        if self.images < 0 or (most is not None and self.images > most):
            allowed = "0 or more" if most is None else "0 (only the user shows pictures)"
            raise OptionError(f"images of the {self.role}'s turn must be {allowed}, got {self.images}")


class _Control(str):
    """A segment that is one control token, by its spelling; every other segment is plain text."""

    __slots__ = ()


class Prompts:
    """A tokenizer together with its model's template.

    Args:
        tokenizer: never changed; copied where a control token is not flagged as special.
        config: roles and the spellings of the control tokens.
        image_tokens: positions that one picture takes in an answering prompt.

    Raises:
        ConfigError: a control token is missing, or the tokenizer loses text, contradicts itself or is not byte-level.
    """

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig, *, image_tokens: int) -> None:
        if image_tokens < 1:
            raise OptionError(f"image_tokens must be 1 or more, got {image_tokens}")
        self.config = config
        self.image_tokens = image_tokens
        self.special = _special_ids(tokenizer, config)
        self.tokenizer = _mark_controls(tokenizer, config)
        self._special_spellings = frozenset(_special_spellings(self.tokenizer))
        self._user = self._role(config.user)
        self._assistant = self._role(config.assistant)
        self._plain = _copy(self.tokenizer)  # its own copy: the setting below changes how it encodes
        self._plain.encode_special_tokens = True
        self._check_plain()

    @classmethod
    def load(cls, folder: Path, config: PromptConfig, *, image_tokens: int) -> Prompts:
        """Read ``tokenizer.json`` of a model folder.

        Raises:
            ConfigError: missing, no JSON, no tokenizer, without one of the control tokens, or not byte-level.
        """
        path = folder / TOKENIZER_FILE
        tokenizer = _read(path)
        try:
            return cls(tokenizer, config, image_tokens=image_tokens)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def answering(self, turns: Sequence[Turn], system: str | None = None) -> list[int]:
        """Ids of a whole conversation up to where the assistant speaks, bos first.

        Each picture is image_start, ``image_tokens`` times the image id, image_end. ``system`` None takes the
        model's own system prompt, "" none.

        Raises:
            PromptError: no turn, a question without words or pictures, the last turn not the user's, or text that is
                not Unicode.
        """
        return self._encode(self._answering_segments(turns, system))

    def following(self, turn: Turn) -> list[int]:
        """Ids that one more question adds after an answer's eos, up to where the assistant speaks.

        Raises:
            PromptError: a question without words or pictures, or text that is not Unicode.
        """
        return self._encode([*self._turn_segments(turn), self._assistant, ":"])[1:]

    def drawing(self, text: str) -> list[int]:
        """Ids of the conditional row of drawing: bos first, image_start last.

        Raises:
            PromptError: the text is empty or not Unicode.
        """
        return self._encode(self._drawing_segments(text))

    def unconditional(self, ids: Sequence[int]) -> list[int]:
        """The row that guidance steers away from: all but the first and last id of ``drawing`` is pad."""
        return [*ids[:1], *[self.special.pad] * (len(ids) - 2), *ids[1:][-1:]]

    def render_answering(self, turns: Sequence[Turn], system: str | None = None) -> str:
        """The template of ``answering`` as text, without bos; one placeholder for each picture."""
        return "".join(self._answering_segments(turns, system))

    def render_drawing(self, text: str) -> str:
        """The template of ``drawing`` as text, without bos."""
        return "".join(self._drawing_segments(text))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no bos, no template, no control token whatever the text spells."""
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"the prompt holds {text[error.start]!r}, which is no Unicode text: type it again, or save it as UTF-8"
            ) from None
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens, and ids that the tokenizer does not have, are skipped."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """``decode`` for one id at a time."""
        return Detokenizer(self.tokenizer, self._special_spellings)

    def _role(self, name: str) -> str:
        added = {token.content for token in self.tokenizer.get_added_tokens_decoder().values()}
        return _Control(name) if name in added else name  # Janus-1.3B's roles are ordinary words

    def _answering_segments(self, turns: Sequence[Turn], system: str | None) -> list[str]:
        if not turns or turns[-1].role != "user":
            raise PromptError("the last message must be the user's: add a question")
        system = self.config.system if system is None else system
        segments = [system + self.config.separator] if system else []
        for turn in turns:
            segments += self._turn_segments(turn)
        return _strip([*segments, self._assistant, ":"])

    def _turn_segments(self, turn: Turn) -> list[str]:
        text = turn.text.strip()
        if turn.role == "assistant":  # an answer may be empty: then eos follows the colon, as when it was generated
            return [self._assistant, f": {text}" if text else ":", _Control(self.config.eos)]
        if not text and not turn.images:
            raise PromptError("the question is empty: say what you want to know")
        pictures = [_Control(self.config.image), "\n"] * turn.images
        return [self._user, ": ", *pictures, text + self.config.separator]

    def _drawing_segments(self, text: str) -> list[str]:
        text = text.strip()
        if not text:
            raise PromptError("the prompt is empty: describe the picture to draw")
        template = [self._user, f": {text}{self.config.separator}", self._assistant, ":"]
        return [*_strip(template), _Control(self.config.image_start)]

    def _encode(self, segments: Iterable[str]) -> list[int]:
        ids = [self.special.bos]
        for control, group in itertools.groupby(segments, lambda s: isinstance(s, _Control)):
            if control:
                for spelling in group:
                    ids += self._control_ids(spelling)
            else:
                ids += self.encode("".join(group))
        return ids

    def _control_ids(self, spelling: str) -> list[int]:
        if spelling == self.config.image:
            return [self.special.image_start, *[self.special.image] * self.image_tokens, self.special.image_end]
        found = self.tokenizer.token_to_id(spelling)
        assert found is not None  # _Control is made only for what __init__ has found
        return [found]

    def _check_plain(self) -> None:
        """Refuse a tokenizer that loses text, or that still makes a control token of its spelling."""
        text = self.decode(self.encode(_SAMPLE))
        if not isinstance(self.tokenizer.decoder, decoders.ByteLevel) or text.strip() != _SAMPLE:
            raise ConfigError(
                f"this is no byte-level tokenizer ({_SAMPLE!r} comes back as {text[:40]!r}): another tool may have "
                "rewritten it, download the model's own"
            )
        for spelling in sorted(self._special_spellings):
            if self.tokenizer.token_to_id(spelling) in self.encode(spelling):
                raise ConfigError(
                    f"the tokenizer makes the control token {spelling!r} of ordinary text: it is damaged, "
                    "download it again"
                )


class Detokenizer:
    """Text from ids, one at a time, in whole characters only.

    The pieces put together are what ``Tokenizer.decode`` gives for all ids at once, for any ids: invalid bytes become
    U+FFFD in both. Each id costs the same however many came before.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """The characters that this id completes; "" while one is incomplete."""
        token = self._tokenizer.id_to_token(int(token_id))  # None: a row of the model beyond the tokenizer's entries
        if token is None or token in self._skipped:
            return ""
        return self._utf8.decode(_token_bytes(token))

    def finish(self) -> str:
        """What is left: U+FFFD if the last character never came to its end, else ""."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return rest


def prepare_tokenizer(tokenizer_json: Path, config: PromptConfig) -> str:
    """``tokenizer.json`` for a converted folder, the same text for the same input.

    Adds the image placeholder where it is absent (Janus-1.3B; it gets the next free id, as in the reference), flags
    the control tokens as special, and drops truncation and padding.

    Raises:
        ConfigError: missing, no JSON, no tokenizer, without one of the other control tokens, or not byte-level.
    """
    tokenizer = _read(tokenizer_json)
    if tokenizer.token_to_id(config.image) is None:
        tokenizer.add_special_tokens([AddedToken(config.image, normalized=False, special=True)])
    try:
        return Prompts(tokenizer, config, image_tokens=1).tokenizer.to_str()  # nothing is written that cannot be loaded
    except ConfigError as error:
        raise ConfigError(f"{tokenizer_json}: {error}") from None


def _read(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except Exception as error:  # the library raises bare Exceptions
        read_model_json(path)  # says in plain words what is wrong with a file that is missing or no JSON
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{path} is not a tokenizer ({reason}): download the model's own") from None


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    """A copy by way of JSON, which renumbers added tokens where the vocabulary has holes; that is refused."""
    try:
        copy = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the library raises bare Exceptions
        raise ConfigError(
            f"the tokenizer contradicts itself ({str(error)[:80]}): it is damaged, download it again"
        ) from None
    before, after = ({i: t.content for i, t in x.get_added_tokens_decoder().items()} for x in (tokenizer, copy))
    if before != after:
        raise ConfigError(
            "the tokenizer contradicts itself (ids of added tokens clash): it is damaged, download it again"
        )
    return copy


def _control_spellings(config: PromptConfig) -> dict[str, str]:
    """Spellings of the tokens that every model has, by field of ``SpecialIds``."""
    return {
        "bos": config.bos,
        "eos": config.eos,
        "pad": config.pad,
        "image_start": config.image_start,
        "image_end": config.image_end,
        "image": config.image,
    }


def _special_ids(tokenizer: Tokenizer, config: PromptConfig) -> SpecialIds:
    ids: dict[str, int] = {}
    for name, spelling in _control_spellings(config).items():
        found = tokenizer.token_to_id(spelling)
        if found is None:
            raise ConfigError(
                f"the tokenizer lacks the {name} token {spelling!r}: it is of another model, or not converted yet; "
                "download the model's own tokenizer, or convert the folder"
            )
        ids[name] = found
    return SpecialIds(**ids)


def _special_spellings(tokenizer: Tokenizer) -> list[str]:
    return [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]


def _mark_controls(tokenizer: Tokenizer, config: PromptConfig) -> Tokenizer:
    """The tokenizer with every control token special and no truncation or padding: a copy if that changes it.

    Control tokens are the template's own, roles included where they are added tokens, and any ``<...>``.
    Other added tokens, like the ``ø`` in DeepSeek's vocabulary, are ordinary characters and stay so.
    """
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    controls = set(_control_spellings(config).values())
    controls |= {s for s in added if s in (config.user, config.assistant) or (s[:1] == "<" and s[-1:] == ">")}
    unmarked = sorted(s for s in controls if s not in added or not added[s].special)
    if not (unmarked or tokenizer.truncation or tokenizer.padding):
        return tokenizer
    tokenizer = _copy(tokenizer)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.add_special_tokens([_as_special(s, added.get(s)) for s in unmarked])
    return tokenizer


def _as_special(spelling: str, token: AddedToken | None) -> AddedToken:
    if token is None:
        return AddedToken(spelling, normalized=False, special=True)
    return AddedToken(
        spelling,
        single_word=token.single_word,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        normalized=token.normalized,
        special=True,
    )


def _strip(segments: Sequence[str]) -> list[str]:
    """Strip the rendered whole, as the reference does, without touching control tokens."""
    stripped = list(segments)
    for end, strip in ((0, str.lstrip), (-1, str.rstrip)):
        while stripped and not isinstance(stripped[end], _Control):
            stripped[end] = strip(stripped[end])
            if stripped[end]:
                break
            del stripped[end]
    return stripped


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, the other way round (``bytes_to_unicode`` of openai/gpt-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """Bytes of one vocabulary entry; an entry with a character outside the alphabet stands for itself."""
    try:
        return bytes(_BYTES[c] for c in token)
    except KeyError:
        return token.encode()
