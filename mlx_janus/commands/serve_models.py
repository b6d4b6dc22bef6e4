"""The models that ``serve`` offers: the values of --model, and the folders of --models-from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import JanusError
from .arguments import LoadArguments
from .runner import import_mlx, note

if TYPE_CHECKING:
    from ..weights.elsewhere import FoundFolder

_RESERVED_NAME = "default"  # every server's name for its first model


@dataclass(frozen=True)
class OfferedModel:
    """A model that the server offers.

    Args:
        arguments: how to load the model.
        name: its name in lists and replies; "": its own, which is known when it is loaded.
        aliases: further names that requests may use.
        prepared: whether it is downloaded and converted before the server starts. Otherwise it is
            converted when it is loaded.
    """

    arguments: LoadArguments
    name: str = ""
    aliases: tuple[str, ...] = ()
    prepared: bool = True


def offered_models(options: Mapping[str, Any]) -> list[OfferedModel]:
    """Return the models that a command line names, the default model first.

    Args:
        options: the values of the command's options, by name.

    Raises:
        click.UsageError: two models have the same name, or an option does not go with several.
        JanusError: a name is not a model's, or a folder holds no model.
    """
    arguments = LoadArguments.from_options({**options, "model": None})
    given: tuple[str, ...] = options["model"]
    folder = options["models_from"]
    if folder is None and len(given) <= 1 and not any("=" in value for value in given):
        source = given[0] if given else None
        aliases = given  # such as a short name, which is not the model's own
        return [OfferedModel(replace(arguments, model=source), aliases=aliases)]
    models = [_named_model(arguments, value) for value in given]
    if folder is not None:
        models += _models_in(arguments, folder, models)
    _check_names(models, [*options["served_names"], *options["model_aliases"]])
    if len(models) > 1:
        for option in ("revision", "vae"):
            if options[option]:
                fix = "give one model, or convert the model first with `mlx-janus models add`"
                raise click.UsageError(f"--{option} does not go with several models: {fix}.")
    return models


def _named_model(arguments: LoadArguments, value: str) -> OfferedModel:
    """Return the model of a value of --model: MODEL, or NAME=MODEL.

    Args:
        arguments: how to load every model, without the model itself.
        value: the option's value.

    Raises:
        click.UsageError: the name is empty or reserved.
        JanusError: MODEL is not the name of a model.
    """
    import_mlx()
    from ..weights.names import understand_name

    name, equals, source = value.partition("=")
    if not equals or Path(value).exists():  # a path may have the sign in it
        shown = understand_name(value, arguments.revision).shown
        return OfferedModel(replace(arguments, model=value), shown, (value,))
    name = name.strip()
    if not name or not source:
        raise click.UsageError(f"--model {value} must be MODEL or NAME=MODEL.")
    understand_name(source, arguments.revision)  # refuses a name that is not a model's
    return OfferedModel(replace(arguments, model=source), name)


def _models_in(
    arguments: LoadArguments, folder: Path, named: list[OfferedModel]
) -> list[OfferedModel]:
    """Return the models in a folder, in the order of their names.

    A model that --model names too is left out, and so is an incomplete one, with a note.

    Args:
        arguments: how to load every model, without the model itself.
        folder: the folder.
        named: the models that --model names.

    Raises:
        JanusError: there is no model.
    """
    import_mlx()
    from ..weights.elsewhere import list_in

    known = {Path(model.arguments.model or "").resolve() for model in named}
    found = [entry for entry in list_in(folder) if entry.folder.resolve() not in known]
    usable = [entry for entry in found if _is_usable(entry)]
    if not usable and not named:
        raise JanusError(f"{folder} holds no Janus model: name a folder of model folders")
    return [
        OfferedModel(replace(arguments, model=str(entry.folder)), entry.name, prepared=False)
        for entry in sorted(usable, key=lambda entry: entry.name)
    ]


def _is_usable(entry: FoundFolder) -> bool:
    """Return whether a model folder is complete; print a note if it is not."""
    from ..weights.checkup import find_faults

    faults = find_faults(entry.folder)
    if faults:
        note(f"{entry.name} is left out: {faults[0]}")
    return not faults


def _check_names(models: Sequence[OfferedModel], names_of_first: Sequence[str]) -> None:
    """Refuse names by which a request could not choose a model.

    Args:
        models: the models.
        names_of_first: further names of the first model.

    Raises:
        click.UsageError: a name is reserved, or belongs to two models.
    """
    # The model of each name.
    places = dict.fromkeys(names_of_first, str(models[0].arguments.model))
    places.pop(models[0].name, None)  # its own name may be given twice
    for model in models:
        place = str(model.arguments.model)
        if model.name == _RESERVED_NAME:
            reason = f"the name {_RESERVED_NAME!r} stands for the first model: choose another"
            raise click.UsageError(f"--model {model.name}={place}: {reason}.")
        if model.name in places:
            fix = f"give one of them another name, --model NAME={place}"
            raise click.UsageError(
                f"{places[model.name]} and {place} have the same name, {model.name!r}: {fix}."
            )
        places[model.name] = place
