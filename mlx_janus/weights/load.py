"""Loading a converted folder: strictly, lazily, and only if the model fits in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from ..config import DTYPES, Dtype, JanusConfig
from ..errors import CheckpointError, OptionError
from ..memory import weight_stream
from ..models.janus import JanusModel, keeps_type
from ..threads import computing
from .folder import open_converted
from .footprint import check_memory
from .quantize import choose_rule, plan_by_rule, quantize_model


def choose_dtype(config: JanusConfig, dtype: str | mx.Dtype | None) -> Dtype:
    """Choose the type of the float weights in memory.

    If ``dtype`` is None, the type is the config's; on a CPU it is float32, since half precision is
    slow there.

    Raises:
        OptionError: ``dtype`` is not float32, bfloat16 or float16.
    """
    if dtype is None:
        on_cpu = mx.default_device().type == mx.DeviceType.cpu
        return "float32" if on_cpu else config.dtype
    name = str(dtype).removeprefix("mlx.core.")  # the prefix of an mx.Dtype
    if name not in DTYPES:
        raise OptionError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    return name  # type: ignore[return-value]


@computing
def load_model(
    folder: Path,
    *,
    bits: int | None = None,
    recipe: str | None = None,
    dtype: str | mx.Dtype | None = None,
    low_memory: bool = False,
    roles: str | None = None,
) -> JanusModel:
    """Load a model from a converted folder. Its weights are lazy: they are read on first use.

    Args:
        folder: a folder that ``convert`` wrote.
        bits: 4 or 8 to quantize float weights while they are read; None keeps the stored weights.
        recipe: one of ``RECIPES`` to quantize float weights by; not together with ``bits``.
        dtype: type to cast float weights to; None chooses one by ``choose_dtype``. The codec is
            always float32.
        low_memory: whether the caller keeps the weights of only one task at a time in memory. The
            memory check then counts only the largest task.
        roles: one of ``ROLES`` to use in place of the folder's; None keeps these.

    Raises:
        CheckpointError: a file is missing or damaged; a tensor is missing, surplus, misshaped or
            of a wrong type; or the stamp is wrong.
        ConfigError, UnsupportedModelError: the config cannot be used.
        OptionError: the folder is quantized differently from ``bits`` or ``recipe``; both are
            given; one of them, ``dtype`` or ``roles`` is invalid; or no layer is wide enough to
            quantize.
        OutOfMemoryError: the model does not fit in memory.
    """
    stored = JanusConfig.load(folder / "config.json")
    config = with_quantization(stored, bits, folder, recipe)
    chosen = choose_dtype(config, dtype)
    check_memory(
        config,
        chosen,
        folder.name,
        low_memory=low_memory,
        quantized=stored.quantization is not None,
    )
    prompt = config.prompt.with_roles(roles)
    return read_model(folder, replace(config, dtype=chosen, prompt=prompt))


def read_model(folder: Path, config: JanusConfig) -> JanusModel:
    """Build a model with a folder's lazy weights, quantized and cast as ``config`` says.

    The memory is not checked. If the folder is quantized already, ``config`` must have the same
    quantization.

    Raises:
        CheckpointError, ConfigError, UnsupportedModelError: as for ``load_model``.
    """
    stored = JanusConfig.load(folder / "config.json")
    model = JanusModel(config)
    arrays, _ = open_converted(folder)
    shared_stream = weight_stream(mx.default_device().type)  # any thread may evaluate its arrays
    with mx.stream(shared_stream):
        if stored.quantization:
            # Packed weights can be loaded only into quantized layers.
            quantize_model(model, stored.quantization)
        _load_strictly(model, arrays, config.dtype, folder)
        if config.quantization and not stored.quantization:
            quantize_model(model, config.quantization)  # quantizes the loaded float weights
    model.eval()
    return model


@dataclass(frozen=True)
class WeightFiles:
    """The folder that a model was loaded from; freed weights are read from it again."""

    folder: Path
    stamp: Mapping[str, str]  # metadata of the weight files, by which a replaced model is noticed

    @classmethod
    @computing
    def of(cls, folder: Path) -> WeightFiles:
        """Record a converted folder and its present stamp."""
        _, stamp = open_converted(folder)
        return cls(folder, stamp)

    def free(self, model: JanusModel, names: Iterable[str]) -> None:
        """Free the memory of the named weights, and make them lazy again, as after ``load_model``.

        Raises:
            CheckpointError: the folder is missing or damaged, or its stamp has changed.
        """
        _, stamp = open_converted(self.folder)
        if stamp != self.stamp:
            raise CheckpointError(f"{self.folder} was replaced since it was loaded: load it again")
        unread_model = read_model(self.folder, model.config)
        unread = dict(tree_flatten(unread_model.parameters()))
        # Replacing the arrays releases their memory to MLX's cache, which is then emptied.
        model.load_weights([(name, unread[name]) for name in names], strict=False)
        mx.clear_cache()


def with_quantization(
    config: JanusConfig, bits: int | None, folder: Path, recipe: str | None = None
) -> JanusConfig:
    """Return a config with the quantization by ``bits`` or a recipe added.

    The config is returned unchanged if both are None, or if it has this quantization already.

    Args:
        config: the model's config.
        bits: 4 or 8, or None.
        folder: the model's folder, for error messages.
        recipe: one of ``RECIPES``, or None.

    Raises:
        OptionError: bits or recipe is invalid, both are set, the config has another quantization,
            or no layer is wide enough to quantize.
    """
    rule = choose_rule(bits, recipe)
    if rule is None:
        return config
    stored = config.quantization
    if stored is None:
        return replace(config, quantization=plan_by_rule(config, rule, recipe))
    if (stored.recipe or stored.bits) != (recipe or bits):
        wanted = f"the recipe {recipe}" if recipe else f"{bits}"
        raise OptionError(
            f"{folder} has {stored.choice}, not {wanted}: "
            "leave bits and recipe out, or convert the original folder"
        )
    return config


def _load_strictly(
    model: JanusModel, arrays: dict[str, mx.array], dtype: Dtype, folder: Path
) -> None:
    """Check that stored arrays match the model's parameters, then cast and load them.

    Arrays are lazy, so the check reads no weights and the cast happens when they are read. The dict
    ``arrays`` is changed: it gets the cast arrays.

    Raises:
        CheckpointError: an array is missing, surplus, misshaped or of a wrong type.
    """
    expected = dict(tree_flatten(model.parameters()))
    for name, wanted in expected.items():
        if name not in arrays:
            raise CheckpointError(f"{folder} lacks {name}: convert the original folder again")
        stored = arrays[name]
        if stored.shape != wanted.shape:
            raise CheckpointError(
                f"{folder}: {name} has the shape {stored.shape}, config.json says {wanted.shape}"
            )
        if not _can_become(stored.dtype, wanted.dtype):
            raise CheckpointError(
                f"{folder}: {name} is stored as {stored.dtype}: convert the original folder again"
            )
    if surplus := sorted(set(arrays) - set(expected)):
        raise CheckpointError(f"{folder} holds {surplus[0]}, which config.json does not speak of")
    # Weights that conversion does not cast (``keeps_type``) are computed in float32.
    for name, array in arrays.items():
        arrays[name] = _cast(array, "float32" if keeps_type(model.config, name) else dtype)
    model.load_weights(list(arrays.items()), strict=True)


def _can_become(stored: mx.Dtype, wanted: mx.Dtype) -> bool:
    """Return whether a stored type equals the wanted one, or both are floats."""
    if mx.issubdtype(wanted, mx.floating):
        return mx.issubdtype(stored, mx.floating)
    return stored == wanted


def _cast(array: mx.array, dtype: Dtype) -> mx.array:
    """Cast an array of floats; return any other, such as packed weights, unchanged."""
    return array.astype(getattr(mx, dtype)) if mx.issubdtype(array.dtype, mx.floating) else array
