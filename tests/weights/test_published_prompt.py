"""Roles by every combination of signs, control tokens by every file that names them."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import mlx_janus
from mlx_janus.config import ROLES, SYSTEM_PROMPT
from mlx_janus.errors import ConfigError, OptionError, UnsupportedModelError
from mlx_janus.processing.prompts import Turn
from mlx_janus.processing.tokenizer import prepare_tokenizer
from mlx_janus.weights.published import Published, read_published
from tests.support.configs import published_1b
from tests.support.golden import FIXTURES

JANUS = FIXTURES / "deepseek-janus-safetensors"
PLACEHOLDER = "<image_placeholder>"
OTHERS = ["<patch_placeholder>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>"]
USER, ASSISTANT = ROLES["pro"]
NINE = [PLACEHOLDER, *OTHERS, USER, ASSISTANT]  # as Janus-Pro-7B's map has them

MAPS: dict[str, list[str] | None] = {
    "no map": None,
    "map of a 1.3B": [],
    "map of a 1.3B saved again": [PLACEHOLDER],
    "map of Pro": NINE,
    "map of Pro without placeholder": NINE[1:],
}
TOKENIZERS: dict[str, list[str]] = {  # the last tokens of tokenizer.json
    "no tokens": [],
    "placeholder": [PLACEHOLDER],
    "roles": [USER, ASSISTANT],
    "roles, then placeholder": [USER, ASSISTANT, PLACEHOLDER],
    "placeholder, then roles": [PLACEHOLDER, USER, ASSISTANT],
}
FORMATS = (None, "deepseek", "deepseek_old")
WIDTHS = {"1.3B": 2048, "7B": 4096}


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of a JSON file; a missing one counts as empty."""
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    change(data)
    write_json(path, data)


def end_tokenizer(path: Path, tokens: Sequence[str]) -> None:
    """Let the added tokens of the fixture's tokenizer end with these, after <|grounding|>."""

    def change(data: dict[str, Any]) -> None:
        kept = [
            token for token in data["added_tokens"] if token["content"] not in (USER, ASSISTANT)
        ]
        first_id = kept[-1]["id"] + 1
        for place, token in enumerate(tokens):
            kept.append({**kept[-1], "id": first_id + place, "content": token})
        data["added_tokens"] = kept

    edit(path, change)


@pytest.fixture
def deepseek(tmp_path: Path) -> Callable[..., Path]:
    """Make the small files of a model in DeepSeek's layout, with the given signs."""

    def make(
        map: list[str] | None = None,
        tokens: Sequence[str] = (),
        sft_format: str | None = "deepseek",
        hidden_size: int = 2048,
        **processor: Any,
    ) -> Path:
        for file in JANUS.glob("*.json"):
            shutil.copy(file, tmp_path)
        (tmp_path / "special_tokens_map.json").unlink()
        if map is not None:
            content = {"additional_special_tokens": map} if map else {"bos_token": "x"}
            write_json(tmp_path / "special_tokens_map.json", content)
        end_tokenizer(tmp_path / "tokenizer.json", tokens)
        if sft_format is not None:
            processor["sft_format"] = sft_format
        write_json(tmp_path / "processor_config.json", {"image_tag": PLACEHOLDER, **processor})
        sizes = {"hidden_size": hidden_size, "num_attention_heads": 16}
        write_json(tmp_path / "config.json", published_1b(sizes))
        return tmp_path

    return make


@pytest.mark.parametrize(
    ("map", "tokens", "sft_format", "size"),
    list(itertools.product(MAPS, TOKENIZERS, FORMATS, WIDTHS)),
)
def test_every_combination_of_signs(
    deepseek: Callable[..., Path], map: str, tokens: str, sft_format: str | None, size: str
) -> None:
    folder = deepseek(MAPS[map], TOKENIZERS[tokens], sft_format, WIDTHS[size])
    published = read_published(folder)
    surely_pro = map == "map of Pro" or tokens == "placeholder, then roles"
    named = surely_pro or map == "map of Pro without placeholder" or "roles" in tokens
    old = sft_format == "deepseek_old"
    if surely_pro:
        wanted = "pro"
    elif old:
        wanted = "plain"
    else:
        wanted = "pro" if named or size == "7B" else "plain"
    prompt = published.config.prompt
    assert published.roles.roles == prompt.roles == wanted
    assert (prompt.user, prompt.assistant) == ROLES[published.roles.roles]
    contradicted = (old and named) or (wanted == "pro" and not named)
    assert bool(published.roles.doubt) == contradicted
    assert len(published.roles.notes()) == int(contradicted)


KNOWN: dict[str, tuple[dict[str, Any], str]] = {
    "Pro-1B": ({"map": NINE, "tokens": NINE[-2:]}, "pro"),
    "Pro-7B without the nine tokens": ({"map": NINE, "hidden_size": 4096}, "pro"),
    "Pro saved by transformers 5": ({"tokens": [PLACEHOLDER, USER, ASSISTANT]}, "pro"),
    "1.3B": ({"map": [], "sft_format": "deepseek_old"}, "plain"),
    "old copy of 1.3B": ({"map": [], "sft_format": "deepseek"}, "plain"),
    "1.3B saved again": (
        {"map": [PLACEHOLDER], "tokens": [PLACEHOLDER], "sft_format": "deepseek_old"},
        "plain",
    ),
    "old copy of 1.3B saved again": ({"map": [PLACEHOLDER], "tokens": [PLACEHOLDER]}, "plain"),
}


@pytest.mark.parametrize(("signs", "roles"), KNOWN.values(), ids=KNOWN)
def test_known_folders(deepseek: Callable[..., Path], signs: dict[str, Any], roles: str) -> None:
    published = read_published(deepseek(**signs))
    assert (published.roles.roles, published.roles.doubt) == (roles, "")


def test_the_list_of_transformers_5_is_a_sign(deepseek: Callable[..., Path]) -> None:
    folder = deepseek()
    tokens = [{"content": token, "special": True} for token in NINE]
    edit(folder / "tokenizer_config.json", lambda c: c.update(extra_special_tokens=tokens))
    published = read_published(folder)
    assert published.roles.text == f"{USER} and {ASSISTANT} (tokenizer_config.json has {USER})"
    assert published.added_tokens == ("<｜▁pad▁｜>", *NINE)


def test_another_image_tag_precedes_the_roles_too(deepseek: Callable[..., Path]) -> None:
    folder = deepseek(["<img>", USER, ASSISTANT], sft_format="deepseek_old", image_tag="<img>")
    assert read_published(folder).roles.roles == "pro"


@pytest.mark.parametrize("roles", ROLES)
def test_requested_roles_win(deepseek: Callable[..., Path], roles: str) -> None:
    for signs in ({"map": NINE}, {"map": [], "sft_format": "deepseek_old"}):
        published = read_published(deepseek(**signs), roles)
        assert published.config.prompt.roles == roles
        assert published.roles.text.endswith("(as requested)")
        assert not published.roles.notes()


@pytest.mark.parametrize("roles", ["Pro", "", "<|User|>", 1, ["pro"]])
def test_unknown_roles_are_refused(deepseek: Callable[..., Path], roles: Any) -> None:
    with pytest.raises(OptionError, match="roles must be 'pro' or 'plain'"):
        read_published(deepseek(), roles)
    with pytest.raises(OptionError, match="roles must be 'pro' or 'plain'"):
        mlx_janus.load("nobody/nothing", roles=roles)


# Tokens that tokenizer.json lacks


def added(folder: Path) -> dict[str, int]:
    """The added tokens of the converted tokenizer by their ids, from <|grounding|> on."""
    published = read_published(folder)
    text = prepare_tokenizer(
        folder / "tokenizer.json", published.config.prompt, published.added_tokens
    )
    tokens = {token["content"]: token["id"] for token in json.loads(text)["added_tokens"]}
    return {token: id for token, id in tokens.items() if id > tokens["<|grounding|>"]}


def test_tokens_of_the_map_come_in_its_order_before_the_placeholder(
    deepseek: Callable[..., Path],
) -> None:
    assert added(deepseek(NINE)) == {PLACEHOLDER: 535, USER: 536, ASSISTANT: 537}
    assert added(deepseek(NINE[1:])) == {USER: 535, ASSISTANT: 536, PLACEHOLDER: 537}
    assert added(deepseek([])) == added(deepseek(None)) == {PLACEHOLDER: 535}
    assert added(deepseek([PLACEHOLDER])) == {PLACEHOLDER: 535}
    folder = deepseek(NINE)
    options = {"unk_token": {"content": "<unk>"}, "additional_special_tokens": ["<first>"]}
    edit(folder / "tokenizer_config.json", lambda content: content.update(options))
    assert list(added(folder)) == ["<unk>", "<first>", PLACEHOLDER, USER, ASSISTANT]
    twice = [*NINE, *NINE, {"content": "<last>"}]
    assert added(deepseek(twice))["<last>"] == 538


def test_a_fine_tune_of_the_1_3b_is_asked_as_the_1_3b(tmp_path: Path) -> None:
    """Its processor has written the placeholder into tokenizer.json; nothing else differs."""
    shutil.copytree(JANUS, tmp_path / "again")
    end_tokenizer(tmp_path / "again" / "tokenizer.json", [USER, ASSISTANT, PLACEHOLDER])
    one, again = (mlx_janus.load(folder).prompts for folder in (JANUS, tmp_path / "again"))
    assert again.drawing("a fox") == one.drawing("a fox")
    turns = [Turn("user", "What is it?", images=1)]
    assert again.answering(turns) == one.answering(turns)
    assert again.render_drawing("a fox") == "User: a fox\n\nAssistant:<begin_of_image>"


# Tags and options


def test_tags_of_the_processor_are_taken(deepseek: Callable[..., Path]) -> None:
    tags = {
        "image_tag": "<|ref|>",
        "image_start_tag": "<|/ref|>",
        "image_end_tag": "<|det|>",
        "pad_tag": "<|/det|>",
    }
    prompt = read_published(deepseek(**tags)).config.prompt
    spelled = (prompt.image, prompt.image_start, prompt.image_end, prompt.pad)
    assert spelled == tuple(tags.values())
    unchanged = read_published(deepseek(image_start_tag=None)).config.prompt
    assert unchanged.image_start == "<begin_of_image>"


@pytest.mark.parametrize("tag", ["image_tag", "image_start_tag", "image_end_tag", "pad_tag"])
@pytest.mark.parametrize("value", [3, "", ["<x>"], True])
def test_tags_that_are_no_text(deepseek: Callable[..., Path], tag: str, value: Any) -> None:
    folder = deepseek(**{tag: value})
    with pytest.raises(ConfigError, match=rf"processor_config\.json: {tag} must be text"):
        read_published(folder)


@pytest.mark.parametrize(
    ("option", "value"),
    [("sft_format", "plain"), ("sft_format", ["x"]), ("add_special_token", True)],
)
def test_options_that_change_prompts_are_refused_by_name(
    deepseek: Callable[..., Path], option: str, value: Any
) -> None:
    folder = deepseek(**{"sft_format": "deepseek", option: value})
    with pytest.raises(UnsupportedModelError) as caught:
        read_published(folder)
    assert str(caught.value).startswith(f"{folder / 'processor_config.json'} has {option} ")
    assert "\n" not in str(caught.value)


def test_an_eos_after_the_prompt_is_refused(deepseek: Callable[..., Path]) -> None:
    folder = deepseek()
    edit(folder / "tokenizer_config.json", lambda c: c.update(add_eos_token=True))
    with pytest.raises(UnsupportedModelError, match=r"tokenizer_config\.json has add_eos_token"):
        read_published(folder)


def test_bos_and_eos_of_the_map_fill_gaps(deepseek: Callable[..., Path]) -> None:
    folder = deepseek()
    write_json(folder / "special_tokens_map.json", {"bos_token": "<|det|>", "eos_token": "<|ref|>"})
    edit(folder / "tokenizer_config.json", lambda c: c.pop("eos_token"))
    prompt = read_published(folder).config.prompt
    assert (prompt.bos, prompt.eos) == ("<｜begin▁of▁sentence｜>", "<|ref|>")


# transformers' layout


@pytest.fixture
def transformers(tmp_path: Path) -> Path:
    """A copy of the small files in transformers' layout."""
    for file in (FIXTURES / "transformers").iterdir():
        if file.suffix in (".json", ".jinja"):
            shutil.copy(file, tmp_path)
    return tmp_path


def read_with(folder: Path, file: str, **options: Any) -> Published:
    edit(folder / file, lambda content: content.update(options))
    return read_published(folder)


TEMPLATES = [
    ("{{'<|User|>: '}}", "pro"),
    ("{{'<|Assistant|>: '}}", "pro"),
    ("{{role.capitalize()}}: ", "plain"),
    ("", "pro"),
]


@pytest.mark.parametrize(("template", "roles"), TEMPLATES)
@pytest.mark.parametrize(
    "file", ["chat_template.json", "processor_config.json", "tokenizer_config.json"]
)
def test_the_template_tells_the_roles_wherever_it_is(
    transformers: Path, file: str, template: str, roles: str
) -> None:
    (transformers / "chat_template.jinja").unlink()
    published = read_with(transformers, file, chat_template=template)
    assert published.config.prompt.roles == published.roles.roles == roles
    assert read_published(transformers, "plain").config.prompt.roles == "plain"


def test_a_1_3b_of_transformers_converter_is_doubted(transformers: Path) -> None:
    end_tokenizer(transformers / "tokenizer.json", [])
    published = read_published(transformers)
    assert (published.roles.roles, published.roles.doubt) == ("pro", f"tokenizer.json lacks {USER}")
    assert published.notes[0].endswith('pass roles="plain" for the others')


def test_tokens_of_the_tokenizer_config_are_taken(transformers: Path) -> None:
    tokens = {"image_token": "<|ref|>", "boi_token": "<|/ref|>", "eoi_token": "<|det|>"}
    prompt = read_with(transformers, "tokenizer_config.json", **tokens).config.prompt
    assert (prompt.image, prompt.image_start, prompt.image_end) == tuple(tokens.values())


def test_the_system_prompt_is_left_out_if_the_processor_says_so(transformers: Path) -> None:
    assert read_published(transformers).config.prompt.system == SYSTEM_PROMPT
    without = read_with(transformers, "processor_config.json", use_default_system_prompt=False)
    assert without.config.prompt.system == ""


@pytest.mark.parametrize(
    ("eos", "stop_ids"),
    [
        (521, None),
        ([521], None),
        (None, None),
        (-1, None),
        ([521, 5], (5,)),
        ([7, 5, 7, None], (7, 5)),
        (9, (9,)),
    ],
)
def test_all_ids_that_end_an_answer_are_kept(
    transformers: Path, eos: Any, stop_ids: tuple[int, ...] | None
) -> None:
    published = read_with(transformers, "generation_config.json", eos_token_id=eos)
    config = published.config
    assert config.prompt.stop_ids == stop_ids
    assert len(published.notes) == len(stop_ids or ())  # these are words, perhaps by mistake
    config.dump(transformers / "config.json")
    assert type(config).load(transformers / "config.json") == config


def test_without_a_generation_config_a_list_of_the_language_model_counts(
    transformers: Path,
) -> None:
    (transformers / "generation_config.json").unlink()
    language = json.loads((transformers / "config.json").read_text(encoding="utf-8"))["text_config"]
    for eos, stop_ids in ((2, None), ([521, 4], (4,))):
        published = read_with(
            transformers, "config.json", text_config={**language, "eos_token_id": eos}
        )
        assert published.config.prompt.stop_ids == stop_ids


def test_control_tokens_that_end_an_answer_are_no_mistake(transformers: Path) -> None:
    published = read_with(transformers, "generation_config.json", eos_token_id=[521, 536, 99_999])
    assert published.config.prompt.stop_ids == (536, 99_999)
    assert published.notes == (
        "generation_config.json: eos_token_id has 99999, which ends answers too",
    )


@pytest.mark.parametrize("eos", ["</s>", [1.5], [True], {"a": 1}])
def test_ids_that_are_no_numbers(transformers: Path, eos: Any) -> None:
    with pytest.raises(ConfigError, match=r"generation_config\.json: eos_token_id must be"):
        read_with(transformers, "generation_config.json", eos_token_id=eos)


def test_the_pad_of_guidance_is_the_generation_configs(transformers: Path) -> None:
    published = read_with(transformers, "generation_config.json", pad_token_id=521)
    assert (published.config.prompt.pad, published.notes) == ("<｜end▁of▁sentence｜>", ())
    nothing = read_with(transformers, "generation_config.json", pad_token_id=99_999)
    assert nothing.config.prompt.pad == "<｜▁pad▁｜>"
    assert "pad_token_id is 99999" in nothing.notes[0]


def test_ids_that_contradict_the_tokenizer_are_noted(transformers: Path) -> None:
    assert read_published(transformers).notes == ()
    edit(transformers / "config.json", lambda content: content.update(image_token_id=3))
    published = read_with(
        transformers, "generation_config.json", generation_kwargs={"boi_token_id": 4}
    )
    assert published.notes == (
        "generation_config.json: boi_token_id is 4; <begin_of_image>, which is 523, is used",
        "config.json: image_token_id is 3; <image_placeholder>, which is 529, is used",
    )
