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
_GENERATION_TAG = "<｜begin▁of▁generation｜>"  # of JanusFlow, if its processor names no other
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
    tokens = config.understanding.tokens
    notes = notes_on_others(processor, "num_image_tokens", tokens, PROCESSOR_FILE)
    with errors_about(folder / TOKENIZER_CONFIG_FILE):
        refuse_others(tokenizer_config, "add_eos_token", (False,))
    prompt = _with_tokens(config.prompt, special_tokens, _BOS_AND_EOS)
    prompt = _with_tokens(prompt, tokenizer_config, _BOS_AND_EOS)  # this file takes precedence
    additional = _additional_tokens(tokenizer_config, special_tokens)
    if layout == "janusflow":
        with errors_about(folder / PROCESSOR_FILE):
            prompt = _with_flow_pad(_with_tags(prompt, processor), folder)
            additional[PROCESSOR_FILE] = _tags_of_flow(prompt, processor)
        choice = RolesChoice("plain", "the roles of JanusFlow")
    elif layout == "deepseek":
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
    prompt = prompt.with_roles(choice.roles)
    return PublishedPrompt(prompt, choice, tuple(added), (*choice.notes(), *notes))


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
    """Return the special tokens that have a key of their own, in the order of transformers' code.

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
    """Return the additional special tokens that a folder names, by file, in the file's order.

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


def _with_flow_pad(prompt: PromptConfig, folder: Path) -> PromptConfig:
    """Take eos as the pad token if the tokenizer has no pad token, as JanusFlow's processor does.

    Raises:
        ConfigError: ``tokenizer.json`` is missing or malformed.
    """
    return prompt if prompt.pad in _token_ids(folder) else replace(prompt, pad=prompt.eos)


def _tags_of_flow(prompt: PromptConfig, processor: Mapping[str, Any]) -> list[str]:
    """Return the tags of JanusFlow's processor, in the order in which it adds missing ones.

    The processor gives each tag that ``tokenizer.json`` lacks the next free id. The model was
    trained with these ids, so the order counts.

    Raises:
        ConfigError: the tag of generation is not text.
    """
    generation_tag = processor.get("image_gen_tag") or _GENERATION_TAG
    if not isinstance(generation_tag, str):
        raise ConfigError(f"image_gen_tag must be text, got {shorten(generation_tag)}")
    return [prompt.image, generation_tag, prompt.image_start, prompt.image_end]


def _with_ids(prompt: PromptConfig, folder: Path) -> tuple[PromptConfig, list[str]]:
    """Take ``stop_ids`` and the pad token from the ids in transformers' ``generation_config.json``.

    The ids of ``eos_token_id`` end an answer in addition to eos. The token of ``pad_token_id``
    fills the unconditional row of guidance.

    Returns:
        The prompt facts, and notes for the user about doubtful ids.

    Raises:
        ConfigError: an id is not a whole number, or a file is malformed or missing.
    """
    ids = _token_ids(folder)
    generation = json_or_empty(folder / GENERATION_FILE)
    # A negative id means "none" to some tools.
    ends = [id for id in _whole_numbers("eos_token_id", _end_ids(folder)) if id >= 0]
    further_ends = dict.fromkeys(id for id in ends if id != ids.get(prompt.eos))  # no duplicates
    prompt = replace(prompt, stop_ids=tuple(further_ends) or None)
    for pad_id in _whole_numbers("pad_token_id", generation.get("pad_token_id")):
        texts = [text for text, id in ids.items() if id == pad_id]  # tokens may share an id
        if texts and prompt.pad not in texts:
            prompt = replace(prompt, pad=texts[0])
    return prompt, _id_notes(folder, prompt, ids)


def _id_notes(folder: Path, prompt: PromptConfig, ids: Mapping[str, int]) -> list[str]:
    """Return notes for the user about doubtful token ids.

    An id that a file gives to a control token is doubtful if the tokenizer has another id for this
    token. An id that ends answers is doubtful if it is not a control token's.

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
    notes = []
    texts = {id: token for token, id in ids.items()}
    for stop_id in prompt.stop_ids or ():
        text = texts.get(stop_id, "")
        if not text.startswith("<"):  # an ordinary word or no token, perhaps by mistake
            shown = f"{stop_id} ({text!r})" if text else str(stop_id)
            notes.append(f"{GENERATION_FILE}: eos_token_id has {shown}, which ends answers too")
    given_ids = (  # file, key, id in the file, and the token whose id it should be
        (GENERATION_FILE, "bos_token_id", generation.get("bos_token_id"), prompt.bos),
        (GENERATION_FILE, "pad_token_id", generation.get("pad_token_id"), prompt.pad),
        (GENERATION_FILE, "boi_token_id", image_start_id, prompt.image_start),
        ("config.json", "image_token_id", config.get("image_token_id"), prompt.image),
    )
    for file, key, id, token in given_ids:
        if id is not None and id != ids.get(token):
            used = f"{token}, which is {ids.get(token)}, is used"
            notes.append(f"{file}: {key} is {shorten(id)}; {used}")
    return notes


def _end_ids(folder: Path) -> Any:
    """Read the ids that end an answer, unchecked, from a folder in transformers' layout.

    Without ``generation_config.json``, transformers takes the ids from the language model's config.
    A list there is returned. A single id there may be the default of LlamaConfig, which ends no
    answer of Janus, so None is returned instead.
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

    The signs, from the strongest to the weakest:

    1. ``<|User|>`` after the placeholder: Janus-Pro. In Janus-1.3B, the processor puts the
       placeholder last.
    2. The format ``deepseek_old``: Janus-1.3B.
    3. ``<|User|>`` in any place: Janus-Pro.
    4. The sizes of the language model.

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
    # The places of tokens by file: in a list of tokens the index, in ``tokenizer.json`` the id.
    places: dict[str, dict[str, int]] = {}
    for file, tokens in additional.items():
        places[file] = {token: place for place, token in enumerate(tokens)}
    places[TOKENIZER_FILE] = _token_ids(folder)
    with_user = [file for file, tokens in places.items() if _PRO_USER in tokens]
    for file in with_user:
        user_place = places[file][_PRO_USER]
        placeholder_place = places[file].get(placeholder)
        is_after_placeholder = placeholder_place is not None and placeholder_place < user_place
        if is_after_placeholder or not is_old:  # sign 1; or sign 3, if sign 2 is absent
            return RolesChoice("pro", f"{file} has {_PRO_USER}", says_old if is_old else "")
    if is_old:
        doubt = f"{with_user[0]} has {_PRO_USER}" if with_user else ""
        return RolesChoice("plain", says_old, doubt)
    if config.language.hidden_size <= _WIDTH_OF_1_3B:
        return RolesChoice("plain", f"no file has {_PRO_USER}, and the sizes are Janus-1.3B's")
    return RolesChoice("pro", "the sizes are Janus-Pro-7B's", f"no file has {_PRO_USER}")


def _roles_of_template(folder: Path, template: str) -> RolesChoice:
    """Choose the roles of a model in transformers' layout by its chat template.

    transformers' converter writes the template of Janus-Pro for Janus-1.3B too. So a template with
    ``<|User|>`` leaves a doubt if the tokenizer lacks this token.

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
