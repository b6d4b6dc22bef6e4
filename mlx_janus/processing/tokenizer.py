"""The tokenizer: plain text to token ids and back, with control tokens kept apart.

Unusual here:

- Ids of control tokens are looked up by spelling and never fixed: they differ between the models.
- Plain text is encoded with no control token recognised. ``<|Assistant|>`` typed by a user stays
  ordinary characters.
- Streaming decodes bytes, since a token may end inside a character.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders

from ..config import PromptConfig, read_model_json
from ..errors import ConfigError, PromptError
from .tokenizer_rules import RuleError, check_rules

TOKENIZER_FILE = "tokenizer.json"
_SAMPLE = "hello world, twice"  # a byte-level tokenizer encodes and decodes it without a change


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the control tokens that every model has."""

    bos: int
    eos: int
    pad: int
    image_start: int
    image_end: int
    image: int


class PromptTokenizer:
    """A tokenizer that knows its model's control tokens.

    Args:
        tokenizer: a tokenizer of the ``tokenizers`` library, which is not changed. If it truncates
            or pads, or if one of its control tokens is not special, a corrected copy is used.
        config: spellings of the control tokens.

    Raises:
        ConfigError: a control token is missing, or the tokenizer is not byte-level, loses text or
            gives a token two ids.
    """

    def __init__(self, tokenizer: Tokenizer, config: PromptConfig) -> None:
        self.special = _special_ids(tokenizer, config)
        self.tokenizer = _with_special_controls(tokenizer, config)
        added = self.tokenizer.get_added_tokens_decoder().values()
        self._added = frozenset(token.content for token in added)
        self._special_spellings = frozenset(token.content for token in added if token.special)
        # A second tokenizer, for plain text. In spite of its name, ``encode_special_tokens`` makes
        # the library encode the spelling of a special token as ordinary text.
        self._text_encoder = _copy(self.tokenizer)
        self._text_encoder.encode_special_tokens = True
        self._check_plain_text()

    def encode(self, text: str) -> list[int]:
        """Return the ids of plain text, without bos.

        The spelling of a control token in the text is encoded as ordinary characters.

        Raises:
            PromptError: the text is not Unicode.
        """
        if not text:
            return []
        try:
            text.encode()
        except UnicodeEncodeError as error:
            # Only a lone surrogate, such as an undecodable byte of a command line, fails.
            problem = f"the prompt holds {text[error.start]!r}, which is not Unicode text"
            raise PromptError(f"{problem}: type it again, or save it as UTF-8") from None
        ids: list[int] = self._text_encoder.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids. Special tokens and ids beyond the vocabulary are skipped."""
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def detokenizer(self) -> Detokenizer:
        """Return a new streaming decoder, which takes one id at a time."""
        return Detokenizer(self.tokenizer, self._special_spellings)

    def spelling(self, token_id: int) -> tuple[str, bytes | None]:
        """Return a token's text and its bytes.

        Bytes that are no complete characters become U+FFFD in the text.

        Returns:
            The text and the bytes, in UTF-8. A special token has its spelling, such as "<pad>", and
            no bytes (None). An id beyond the tokenizer's vocabulary has "" and no bytes.
        """
        token = self.tokenizer.id_to_token(int(token_id))
        if token is None or token in self._special_spellings:
            return token or "", None
        content = _token_bytes(token)
        return content.decode("utf-8", "replace"), content

    def is_added(self, spelling: str) -> bool:
        """Return whether the tokenizer has an added token with this spelling."""
        return spelling in self._added

    def token_id(self, spelling: str) -> int | None:
        """Return the id of a token by its spelling; None if there is no such token."""
        return self.tokenizer.token_to_id(spelling)

    def _check_plain_text(self) -> None:
        """Check that encoding plain text loses no characters and gives no control token.

        Raises:
            ConfigError: the tokenizer is not byte-level, loses text, or encodes the spelling of a
                control token as that token.
        """
        decoded = self.decode(self.encode(_SAMPLE))
        keeps_sample = decoded.strip() == _SAMPLE
        has_byte_decoder = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        if not (keeps_sample and has_byte_decoder):
            reason = f"{_SAMPLE!r} decodes to {decoded[:40]!r}"
            raise ConfigError(
                f"this is not a byte-level tokenizer of Janus ({reason}): "
                "another tool may have rewritten it, download the model's own"
            )
        for spelling in sorted(self._special_spellings):
            if self.token_id(spelling) in self.encode(spelling):
                raise ConfigError(
                    f"the tokenizer encodes ordinary text as the control token {spelling!r}: "
                    "it is damaged, download it again"
                )


class Detokenizer:
    """A streaming decoder: it takes one id at a time and returns complete characters.

    The joined results of ``add`` and ``finish`` equal ``Tokenizer.decode`` of all ids at once. Both
    turn invalid bytes into U+FFFD. The cost of an id does not grow with the number of ids before
    it.

    Args:
        tokenizer: a byte-level tokenizer.
        skipped: spellings of the special tokens, which give no text.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[str]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token_id: int) -> str:
        """Return the characters that this id completes; "" if it completes none."""
        token = self._tokenizer.id_to_token(int(token_id))
        # ``token`` is None for an id beyond the tokenizer's vocabulary. A model may have more ids.
        if token is None or token in self._skipped:
            return ""
        return self._utf8.decode(_token_bytes(token))

    def finish(self) -> str:
        """End the text. Return U+FFFD if its last character is incomplete, otherwise "".

        The next ``add`` begins another text.
        """
        replacement = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return replacement


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``.

    Raises:
        ConfigError: the file is missing, not JSON, or not a tokenizer; or it has rules that a
            tokenizer of Janus does not have.
    """
    data = read_model_json(path)
    try:
        check_rules(data)
    except RuleError as error:
        raise ConfigError(
            f"{path} is not a byte-level tokenizer of Janus ({error}): "
            "another tool may have rewritten it, download the model's own"
        ) from None
    try:
        return Tokenizer.from_str(json.dumps(data))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises bare Exceptions, and panics
        reason = " ".join(str(error).split())[:120]
        fix = "download the model's own"
        raise ConfigError(f"{path} is not a tokenizer ({reason}): {fix}") from None


def prepare_tokenizer(
    tokenizer_json: Path, config: PromptConfig, added_tokens: Sequence[str] = ()
) -> str:
    """Return the content of ``tokenizer.json`` for a converted folder.

    The control tokens are flagged as special, and truncation and padding are dropped. Equal
    arguments give equal text.

    Args:
        tokenizer_json: the file of the folder to convert.
        config: spellings of the control tokens.
        added_tokens: special tokens that are named in other files of that folder. Those that
            ``tokenizer.json`` lacks get the next free ids in this order, as in transformers.

    Raises:
        ConfigError: the file is missing, not JSON or not a tokenizer; or the tokenizer is not
            byte-level, loses text, gives a token two ids, or lacks a control token (the image
            placeholder may be missing).
    """
    tokenizer = read_tokenizer(tokenizer_json)
    # Janus-1.3B's file lacks the image placeholder. DeepSeek's processor adds it after the others.
    needed = dict.fromkeys((*added_tokens, config.image))  # without duplicates
    missing = [token for token in needed if tokenizer.token_to_id(token) is None]
    tokenizer.add_special_tokens([_as_special(token, None) for token in missing])
    try:
        # The constructor flags the control tokens, drops truncation and padding, and checks the
        # tokenizer, so that the file can be loaded.
        return PromptTokenizer(tokenizer, config).tokenizer.to_str()
    except ConfigError as error:
        raise ConfigError(f"{tokenizer_json}: {error}") from None


def _copy(tokenizer: Tokenizer) -> Tokenizer:
    """Copy a tokenizer by writing it as JSON and reading that.

    Raises:
        ConfigError: the JSON cannot be read, or the copy's added tokens have other ids. The library
            renumbers added tokens if the vocabulary has unused ids.
    """
    try:
        copy = Tokenizer.from_str(tokenizer.to_str())
    except Exception as error:  # the library raises bare Exceptions
        raise _damaged_error(str(error)[:80]) from None
    if _added_spellings(tokenizer) != _added_spellings(copy):
        raise _damaged_error("ids of added tokens clash")
    return copy


def _damaged_error(reason: str) -> ConfigError:
    """Return the error for a tokenizer that cannot be copied with the same ids."""
    fix = "it is damaged, download it again"
    return ConfigError(f"the tokenizer contradicts itself ({reason}): {fix}")


def _added_spellings(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the spellings of the added tokens, by id."""
    return {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}


def _control_spellings(config: PromptConfig) -> dict[str, str]:
    """Return the spellings of the control tokens, by their names in ``SpecialIds``."""
    return {
        "bos": config.bos,
        "eos": config.eos,
        "pad": config.pad,
        "image_start": config.image_start,
        "image_end": config.image_end,
        "image": config.image,
    }


def _special_ids(tokenizer: Tokenizer, config: PromptConfig) -> SpecialIds:
    """Look up the ids of the control tokens by their spellings.

    Raises:
        ConfigError: a control token is missing.
    """
    ids: dict[str, int] = {}
    for name, spelling in _control_spellings(config).items():
        found = tokenizer.token_to_id(spelling)
        if found is None:
            raise ConfigError(
                f"the tokenizer lacks the {name} token {spelling!r}: it belongs to another model "
                "or is not converted; download the model's own tokenizer, or convert the folder"
            )
        ids[name] = found
    return SpecialIds(**ids)


def _with_special_controls(tokenizer: Tokenizer, config: PromptConfig) -> Tokenizer:
    """Return a tokenizer whose control tokens are special, and which does not truncate or pad.

    The tokenizer itself is returned if nothing has to change, otherwise a changed copy. Control
    tokens are those of ``SpecialIds``, every added token ``<...>``, and the roles if they are added
    tokens. Other added tokens, such as ``ø`` in DeepSeek's vocabulary, stay ordinary characters.
    """
    added = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    controls = set(_control_spellings(config).values())
    for spelling in added:
        in_brackets = spelling[:1] == "<" and spelling[-1:] == ">"
        if in_brackets or spelling in (config.user, config.assistant):
            controls.add(spelling)
    special = {spelling for spelling, token in added.items() if token.special}
    not_special = sorted(controls - special)
    if not (not_special or tokenizer.truncation or tokenizer.padding):
        return tokenizer
    changed = _copy(tokenizer)
    changed.no_truncation()
    changed.no_padding()
    changed.add_special_tokens([_as_special(s, added.get(s)) for s in not_special])
    return changed


def _as_special(spelling: str, token: AddedToken | None) -> AddedToken:
    """Return a special token with this spelling. It keeps the other settings of ``token``.

    ``token`` is None if there is no added token with this spelling so far.
    """
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


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each character in a token: the inverse of GPT-2's ``bytes_to_unicode``.

    A byte-level tokenizer writes every byte as a printable character. A byte that is the code of a
    printable character stands for itself. The other bytes get the codes from 256 on, in order.
    """
    ranges = (range(ord("!"), ord("~") + 1), range(0xA1, 0xAC + 1), range(0xAE, 0xFF + 1))
    printable = [byte for codes in ranges for byte in codes]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        alphabet[chr(256 + i)] = byte
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()


def _token_bytes(token: str) -> bytes:
    """Return the bytes of a token's text.

    Its characters are those of ``_byte_alphabet``. Only an added token may have others, and is then
    encoded as UTF-8.
    """
    try:
        return bytes(_BYTE_OF_CHARACTER[c] for c in token)
    except KeyError:
        return token.encode()
