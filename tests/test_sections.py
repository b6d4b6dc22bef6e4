"""What a section takes from JSON, and what is said of a file that is none."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from mlx_janus.config import read_model_json
from mlx_janus.errors import ConfigError
from mlx_janus.sections import LATER, JsonError, Section, number_field, read_json, size_field


@dataclass(frozen=True)
class Part(Section):
    """A section in a section."""

    title: ClassVar[str] = "part"
    name: str = "none"


@dataclass(frozen=True)
class Whole(Section):
    """Every kind of hint."""

    title: ClassVar[str] = "whole"
    kind: Literal["one", "other"]
    size: int = size_field(4, high=8)
    share: float = number_field(0.5, high=1)
    free: float = 0.0
    any_length: tuple[int, ...] = size_field((1,), high=3)
    three: tuple[float, float, float] = number_field((0, 0, 0), low=-1, high=1)
    part: Part | None = None
    maybe: float | None = number_field(0.5, high=1)
    new: str = field(default="", metadata=LATER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "third"}, "kind must be 'one' or 'other', got 'third'"),
        ({"size": 9}, "size must be a whole number from 1 to 8, got 9"),
        ({"size": 4.0}, "size must be a int, got 4.0"),
        ({"size": True}, "size must be a int, got True"),
        ({"share": 2}, "share must be a number from 0 to 1, got 2"),
        ({"share": math.nan}, "share must be a number from 0 to 1, got nan"),
        ({"share": "half"}, "share must be a float, got 'half'"),
        ({"share": True}, "share must be a float, got True"),
        ({"free": math.inf}, r"free must be a number from -1e\+30 to 1e\+30, got inf"),
        ({"any_length": []}, r"any_length must be a list of one or more values, got \(\)"),
        ({"any_length": 3}, "any_length must be a list of one or more values, got 3"),
        ({"any_length": [1, 4]}, "any_length must be a whole number from 1 to 3, got 4"),
        ({"three": [0, 0]}, r"three must be a list of 3 values, got \(0, 0\)"),
        ({"three": [0, 0, "x"]}, "three must be a float, got 'x'"),
        ({"maybe": 1.5}, "maybe must be a number from 0 to 1, got 1.5"),
        ({"maybe": math.nan}, "maybe must be a number from 0 to 1, got nan"),
        ({"part": 3}, "part must be a JSON object, got 3"),
        ({"part": {"name": None}}, "part: name must be a str, got None"),
        ({"new": 1}, "new must be a str, got 1"),
        ({"newer": 1}, "whole has an unknown entry 'newer': the folder is of a newer version?"),
        ({"size": "9" * 90}, r"got '9{56}\.\.\.$"),
    ],
)
def test_what_a_section_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Whole.from_dict({"kind": "one"} | change)


def test_what_a_section_takes() -> None:
    data = {
        "kind": "other",
        "share": 1,
        "any_length": [1, 3],
        "three": [0, -1, 0.5],
        "part": {"name": "x"},
    }
    section = Whole.from_dict(data)
    assert section == Whole("other", share=1, any_length=(1, 3), three=(0, -1, 0.5), part=Part("x"))
    defaults = {"size": 4, "free": 0.0, "maybe": 0.5}
    assert section.to_dict() == defaults | data
    assert Whole.from_dict(section.to_dict()) == section
    assert Whole("one", new="x").to_dict()["new"] == "x"
    with pytest.raises(ConfigError, match="whole lacks 'kind'"):
        Whole.from_dict({})
    with pytest.raises(ConfigError, match="part must be a Part, got 3"):
        Whole("one", part=3)  # type: ignore[arg-type]


def _too_large(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)


FAULTS: Mapping[
    str, tuple[Any, str, str]
] = {  # how to make a file, the reason, the advice for a model's folder
    "missing": (lambda path: None, "is missing", ": download the whole model folder"),
    "too large": (_too_large, "is larger than 64 MiB", ": it is no config file"),
    "invalid": (
        lambda path: path.write_text("{"),
        r"is not valid JSON \(.+\)",
        ": download it again",
    ),
    "unreadable": (lambda path: path.mkdir(), "cannot be read: Is a directory", ""),
    "no object": (lambda path: path.write_text("[1]"), r"must hold a JSON object, got \[1\]", ""),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_without_an_object_gives_a_reason_to_which_the_caller_adds_advice(
    fault: str, tmp_path: Path
) -> None:
    make, reason, advice = FAULTS[fault]
    path = tmp_path / "config.json"
    make(path)
    with pytest.raises(JsonError, match=rf"config\.json {reason}$") as plain:
        read_json(path)
    assert plain.value.fault == fault
    assert plain.value.advise({}) == str(plain.value)
    assert plain.value.advise({plain.value.fault: "ask somebody"}) == f"{plain.value}: ask somebody"
    with pytest.raises(ConfigError) as advised:
        read_model_json(path)
    assert str(advised.value) == f"{plain.value}{advice}"


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"ä": [1]}, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"ä": [1]}
