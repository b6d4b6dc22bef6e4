"""Reading the roles and control tokens of a published model.

Unusual here: no file of DeepSeek's layout tells the roles for sure, so several signs decide.
``sft_format`` is wrong in old copies of Janus-1.3B. The processor adds ``<image_placeholder>`` to
the tokenizer when a fine-tune is saved, and Janus-Pro-7B's ``tokenizer.json`` may lack that token.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ROLES, JanusConfig, PromptConfig, Roles, check_roles, read_model_json
from ..errors import ConfigError
from ..files import MAX_TEMPLATE_FILE, POINTER_ADVICE, is_git_pointer, read_bounded
from ..processing.tokenizer import TOKENIZER_FILE
from ..sections import shorten
from .published_values import (
    Layout,
    errors_about,
    json_or_empty,
    notes_on_others,
    refuse_others,
    token_text,
)

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PROCESSOR_FILE = "processor_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

_PRO_USER = ROLES["pro"][0]  # <|User|>
_OLD_FORMAT = "deepseek_old"
_FORMATS = ("deepseek", _OLD_FORMAT)
_WIDTH_OF_1_3B = 2048  # of the language model; Janus-Pro-1B's is the same, Janus-Pro-7B's 4096
# Keys of control tokens, by field of ``PromptConfig``.
# In both layouts: in ``tokenizer_config.json`` and ``special_tokens_map.json``.
_BOS_AND_EOS = {"bos": "bos_token", "eos": "eos_token"}
# In DeepSeek's layout: in ``processor_config.json``.
_TAGS = {
    "image": "image_tag",
    "image_start": "image_start_tag",
    "image_end": "image_end_tag",
    "pad": "pad_tag",
}
# In transformers' layout: in ``tokenizer_config.json``.
_TOKENS = {"image": "image_token", "image_start": "boi_token", "image_end": "eoi_token"}


@dataclass(frozen=True)
class RolesChoice:
    """The roles of a model, and the sign in its files that decided.

    ``doubt`` is a sign of the other roles; "": there is none.
    """

    roles: Roles
    sign: str
    doubt: str = ""

    @property
    def pair(self) -> str:
        """Both roles as text: "User and Assistant"."""
        return " and ".join(ROLES[self.roles])

    @property
    def text(self) -> str:
        """The roles and the sign as text: "User and Assistant (...)"."""
        return f"{self.pair} ({self.sign})"

    def notes(self) -> list[str]:
        """Return a note for the user if there is a doubt."""
        if not self.doubt:
            return []
        other = "plain" if self.roles == "pro" else "pro"
        note = f'the roles are {self.text}, but {self.doubt}: pass roles="{other}" for the others'
        return [note]


@dataclass(frozen=True)
class PublishedPrompt:
    """The prompt facts of a model folder."""

    prompt: PromptConfig
    roles: RolesChoice
    added_tokens: tuple[str, ...]  # special tokens that the files name, in the order of their ids
    notes: tuple[str, ...]  # for the user


def read_prompt(
    folder: Path, layout: Layout, config: JanusConfig, roles: str | None = None
) -> PublishedPrompt:
    """Read a folder's roles and control tokens; a missing file leaves the defaults.

    Args:
        folder: the model folder.
        layout: its layout.
        config: the model's sizes.
        roles: one of ``ROLES`` to use in place of the folder's, or None.

    Raises:
        ConfigError: a file is malformed, or ``tokenizer.json`` is missing.
        UnsupportedModelError: an option is not supported.
        OptionError: ``roles`` is not one of ``ROLES``.
    """
    given = check_roles(roles)
    tokenizer_config = json_or_empty(folder / TOKENIZER_CONFIG_FILE)
    special_tokens = json_or_empty(folder / SPECIAL_TOKENS_FILE)
    processor = json_or_empty(folder / PROCESSOR_FILE)
    notes = notes_on_others(
        processor, "num_image_tokens", config.understanding.tokens, PROCESSOR_FILE
    )
    with errors_about(folder / TOKENIZER_CONFIG_FILE):
        refuse_others(tokenizer_config, "add_eos_token", (False,))
    prompt = _with_tokens(config.prompt, special_tokens, _BOS_AND_EOS)
    prompt = _with_tokens(prompt, tokenizer_config, _BOS_AND_EOS)  # takes precedence
    additional = _additional_tokens(tokenizer_config, special_tokens)
    if layout == "deepseek":
        with errors_about(folder / PROCESSOR_FILE):
            prompt = _with_tags(prompt, processor)
        choice = _roles_by_signs(folder, prompt.image, processor, additional, config)
    else:
        prompt = _with_tokens(prompt, tokenizer_config, _TOKENS)
        if processor.get("use_default_system_prompt") is False:
            prompt = replace(prompt, system="")
        with errors_about(folder / GENERATION_FILE):
            prompt, id_notes = _with_ids(prompt, folder)
        notes += id_notes
        choice = _roles_of_template(folder, _chat_template(folder, tokenizer_config))
    if given is not None:
        choice = RolesChoice(given, "as requested")
    named = _named_tokens(tokenizer_config, special_tokens)
    added = dict.fromkeys(itertools.chain(named, *additional.values()))  # without duplicates
    return PublishedPrompt(
        prompt=prompt.with_roles(choice.roles),
        roles=choice,
        added_tokens=tuple(added),
        notes=(*choice.notes(), *notes),
    )


# Control tokens


def _with_tokens(
    prompt: PromptConfig, data: Mapping[str, Any], keys: Mapping[str, str]
) -> PromptConfig:
    """Replace control tokens by those that a file names; keep the others.

    Args:
        prompt: the prompt facts so far.
        data: the content of the file.
        keys: the key in ``data`` by the name of the field in ``PromptConfig``.
    """
    texts: dict[str, Any] = {}
    for field, key in keys.items():
        text = token_text(data.get(key))
        if text:
            texts[field] = text
    return replace(prompt, **texts)


def _named_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, Any]
) -> list[str]:
    """Return the special tokens that have a key of their own, in the order of transformers.

    bos and eos are left out. They are never added, because a tokenizer that lacks them is another
    model's.
    """
    found = []
    for name in ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token"):
        text = token_text(special_tokens.get(name)) or token_text(tokenizer_config.get(name))
        if text:
            found.append(text)
    return found


def _additional_tokens(
    tokenizer_config: Mapping[str, Any], special_tokens: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Return the additional special tokens that a folder names, by file, in the order there.

    transformers 5 calls them ``extra_special_tokens``, and writes them into
    ``tokenizer_config.json`` only.
    """
    lists = (
        (TOKENIZER_CONFIG_FILE, tokenizer_config.get("additional_special_tokens")),
        (TOKENIZER_CONFIG_FILE, tokenizer_config.get("extra_special_tokens")),
        (SPECIAL_TOKENS_FILE, special_tokens.get("additional_special_tokens")),
    )
    found: dict[str, list[str]] = {TOKENIZER_CONFIG_FILE: [], SPECIAL_TOKENS_FILE: []}
    for file, tokens in lists:
        # Skip a dict: each of its tokens also stands in the file under a key of its own, such as
        # ``image_token``.
        texts = map(token_text, tokens if isinstance(tokens, list) else [])
        found[file] += [text for text in texts if text]
    return found


def _with_tags(prompt: PromptConfig, processor: Mapping[str, Any]) -> PromptConfig:
    """Replace control tokens by those of DeepSeek's ``processor_config.json``.

    Raises:
        ConfigError: a tag is not text.
        UnsupportedModelError: an option is not supported.
    """
    refuse_others(processor, "sft_format", _FORMATS)
    refuse_others(processor, "add_special_token", (False,))
    for tag in _TAGS.values():
        value = processor.get(tag)
        if value is not None and not (isinstance(value, str) and value):
            raise ConfigError(f"{tag} must be text, got {shorten(value)}")
    return _with_tokens(prompt, processor, _TAGS)


def _with_ids(prompt: PromptConfig, folder: Path) -> tuple[PromptConfig, list[str]]:
    """Replace control tokens by those whose ids are in transformers' ``generation_config.json``.

    The ids of ``eos_token_id`` end an answer in addition to eos. The token of ``pad_token_id``
    fills the unconditional row of guidance.

    Returns:
        The prompt facts, and notes for the user about ids that are not used.

    Raises:
        ConfigError: an id is not a whole number, or a file is malformed or missing.
    """
    ids = _token_ids(folder)
    generation = json_or_empty(folder / GENERATION_FILE)
    # A negative id means "none" to some tools.
    ends = [id for id in _whole_numbers("eos_token_id", _end_ids(folder)) if id >= 0]
    further_ends = dict.fromkeys(id for id in ends if id != ids.get(prompt.eos))
    prompt = replace(prompt, stop_ids=tuple(further_ends) or None)
    for pad_id in _whole_numbers("pad_token_id", generation.get("pad_token_id")):
        texts = [text for text, id in ids.items() if id == pad_id]  # several may have one id
        if texts and prompt.pad not in texts:
            prompt = replace(prompt, pad=texts[0])
    return prompt, _id_notes(folder, prompt, ids)


def _id_notes(folder: Path, prompt: PromptConfig, ids: Mapping[str, int]) -> list[str]:
    """Return notes for the user about doubtful token ids.

    An id is doubtful if the tokenizer has another id for this token, or if it ends answers but is
    not a control token's.

    Args:
        folder: the model folder, in transformers' layout.
        prompt: the prompt facts.
        ids: the ids of the tokenizer, by token.

    Raises:
        ConfigError: a file is malformed.
    """
    config = read_model_json(folder / "config.json")
    generation = json_or_empty(folder / GENERATION_FILE)
    kwargs = generation.get("generation_kwargs")
    image_start_id = kwargs.get("boi_token_id") if isinstance(kwargs, dict) else None
    given_ids = (
        (GENERATION_FILE, "bos_token_id", generation.get("bos_token_id"), prompt.bos),
        (GENERATION_FILE, "pad_token_id", generation.get("pad_token_id"), prompt.pad),
        (GENERATION_FILE, "boi_token_id", image_start_id, prompt.image_start),
        ("config.json", "image_token_id", config.get("image_token_id"), prompt.image),
    )
    notes = []
    texts = {id: token for token, id in ids.items()}
    for stop_id in prompt.stop_ids or ():
        text = texts.get(stop_id, "")
        if not text.startswith("<"):  # an ordinary word or no token, perhaps by mistake
            shown = f"{stop_id} ({text!r})" if text else str(stop_id)
            notes.append(f"{GENERATION_FILE}: eos_token_id has {shown}, which ends answers too")
    for file, key, id, token in given_ids:
        if id is not None and id != ids.get(token):
            used = f"{token}, which is {ids.get(token)}, is used"
            notes.append(f"{file}: {key} is {shorten(id)}; {used}")
    return notes


def _end_ids(folder: Path) -> Any:
    """Return the ids that end an answer in transformers' layout, an unchecked JSON value.

    Without ``generation_config.json``, transformers takes the language model's. If these are a
    list, it is returned. A single number may be the default of LlamaConfig, which ends no answer of
    Janus, so None is returned instead.
    """
    if (folder / GENERATION_FILE).exists():
        return read_model_json(folder / GENERATION_FILE).get("eos_token_id")
    language = read_model_json(folder / "config.json").get("text_config")
    ends = language.get("eos_token_id") if isinstance(language, dict) else None
    return ends if isinstance(ends, list) else None


def _whole_numbers(key: str, value: Any) -> list[int]:
    """Return the numbers of an option that has one number, a list of them, or null.

    Args:
        key: the option's name, for the error.
        value: its unchecked JSON value.

    Raises:
        ConfigError: the value is none of these.
    """
    values = value if isinstance(value, list) else [value]
    numbers = [number for number in values if number is not None]
    for number in numbers:
        if type(number) is not int:
            raise ConfigError(f"{key} must be a whole number or several, got {shorten(value)}")
    return numbers


def _token_ids(folder: Path) -> dict[str, int]:
    """Return the id of every token in ``tokenizer.json``: of the vocabulary and the added tokens.

    Raises:
        ConfigError: the file is missing or malformed.
    """
    data = read_model_json(folder / TOKENIZER_FILE)
    ids: dict[str, int] = {}
    bpe_model = data.get("model")
    vocabulary = bpe_model.get("vocab") if isinstance(bpe_model, dict) else None
    if isinstance(vocabulary, dict):
        ids |= {token: id for token, id in vocabulary.items() if type(id) is int}
    added = data.get("added_tokens")
    for token in added if isinstance(added, list) else []:
        text = token_text(token)
        if text is not None and isinstance(token, dict) and type(token.get("id")) is int:
            ids[text] = token["id"]
    return ids


# Roles


def _roles_by_signs(
    folder: Path,
    placeholder: str,
    processor: Mapping[str, Any],
    additional: Mapping[str, Sequence[str]],
    config: JanusConfig,
) -> RolesChoice:
    """Choose the roles of a model in DeepSeek's layout.

    The signs, from the strongest: ``<|User|>`` after the placeholder is Janus-Pro's, since the
    processor of 1.3B puts the placeholder last; ``deepseek_old`` is 1.3B's; ``<|User|>`` anywhere
    is Janus-Pro's; the sizes.

    Args:
        folder: the model folder, for its ``tokenizer.json``.
        placeholder: the token of an image.
        processor: the content of ``processor_config.json``.
        additional: the additional special tokens by the file that names them.
        config: the model's sizes.

    Raises:
        ConfigError: ``tokenizer.json`` is missing or malformed.
    """
    is_old = processor.get("sft_format") == _OLD_FORMAT
    says_old = f"{PROCESSOR_FILE} says {_OLD_FORMAT}"
    places: dict[str, dict[str, int]] = {}  # by file and token; in ``tokenizer.json``, the id
    for file, tokens in additional.items():
        places[file] = {token: place for place, token in enumerate(tokens)}
    places[TOKENIZER_FILE] = _token_ids(folder)
    with_user = [file for file, tokens in places.items() if _PRO_USER in tokens]
    for file in with_user:
        place = places[file][_PRO_USER]
        is_after_placeholder = places[file].get(placeholder, place) < place
        if is_after_placeholder or not is_old:
            return RolesChoice("pro", f"{file} has {_PRO_USER}", says_old if is_old else "")
    if is_old:
        doubt = f"{with_user[0]} has {_PRO_USER}" if with_user else ""
        return RolesChoice("plain", says_old, doubt)
    if config.language.hidden_size <= _WIDTH_OF_1_3B:
        return RolesChoice("plain", f"no file has {_PRO_USER}, and the sizes are Janus-1.3B's")
    return RolesChoice("pro", "the sizes are Janus-Pro-7B's", f"no file has {_PRO_USER}")


def _roles_of_template(folder: Path, template: str) -> RolesChoice:
    """Choose the roles of a model in transformers' layout by its chat template.

    transformers' converter writes the template of Janus-Pro for Janus-1.3B too. So ``<|User|>`` in
    the template is in doubt if the tokenizer lacks it.

    Args:
        folder: the model folder, for its ``tokenizer.json``.
        template: the template; "": there is none.

    Raises:
        ConfigError: ``tokenizer.json`` is missing or malformed.
    """
    if template and not any(role in template for role in ROLES["pro"]):
        return RolesChoice("plain", f"its chat template lacks {_PRO_USER}")
    sign = f"its chat template has {_PRO_USER}" if template else "it has no chat template"
    lacks_user = _PRO_USER not in _token_ids(folder)
    return RolesChoice("pro", sign, f"{TOKENIZER_FILE} lacks {_PRO_USER}" if lacks_user else "")


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str:
    """Return a folder's chat template; "" if it has none.

    It is read from the first of ``chat_template.jinja``, ``chat_template.json``,
    ``processor_config.json`` and ``tokenizer_config.json`` that has one.

    Raises:
        ConfigError: a file cannot be read.
    """
    own_file, own_json = (folder / name for name in TEMPLATE_FILES)
    if own_file.exists():
        try:
            template = read_bounded(own_file, MAX_TEMPLATE_FILE).decode()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{own_file} cannot be read ({reason}): download it again") from None
        if is_git_pointer(template.encode()):
            raise ConfigError(
                f"{own_file} is a Git LFS pointer and not the file itself: {POINTER_ADVICE}"
            )
        return template
    in_json = json_or_empty(own_json).get("chat_template")
    in_processor = json_or_empty(folder / PROCESSOR_FILE).get("chat_template")
    found = in_json or in_processor or tokenizer_config.get("chat_template") or ""
    return found if isinstance(found, str) else str(found)  # several templates in a list
