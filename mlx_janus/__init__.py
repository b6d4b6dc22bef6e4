"""Janus and Janus-Pro on MLX: one model that answers questions about images and generates images.

``load`` returns a ``JanusPipeline``, and its methods do everything else. Importing this package
only defines names and, on Linux, loads OpenBLAS if it is installed. MLX is imported with the first
name that needs it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from .version import __version__

if sys.platform == "linux":
    # MLX's Linux wheel links reference BLAS. OpenBLAS is tens of times faster on float32 products.
    # MLX uses OpenBLAS's symbols if OpenBLAS is loaded globally before MLX.
    import contextlib
    import ctypes

    with contextlib.suppress(OSError):
        ctypes.CDLL("libopenblas.so.0", mode=ctypes.RTLD_GLOBAL)

if TYPE_CHECKING:
    from .errors import JanusError
    from .inference.conversation import Conversation
    from .inference.results import GeneratedImage, ImageStep, TextChunk, TextResult, TokenLogprob
    from .inference.scoring import AnswerScore
    from .pipeline import JanusPipeline, load

_MODULES = {  # public name -> its module, imported on first use
    "AnswerScore": "inference.scoring",
    "Conversation": "inference.conversation",
    "GeneratedImage": "inference.results",
    "ImageStep": "inference.results",
    "JanusError": "errors",
    "JanusPipeline": "pipeline",
    "TextChunk": "inference.results",
    "TextResult": "inference.results",
    "TokenLogprob": "inference.results",
    "load": "pipeline",
}
__all__ = [
    "AnswerScore",
    "Conversation",
    "GeneratedImage",
    "ImageStep",
    "JanusError",
    "JanusPipeline",
    "TextChunk",
    "TextResult",
    "TokenLogprob",
    "__version__",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import and return a public name on its first use (PEP 562).

    Raises:
        AttributeError: the package has no such name.
    """
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(f".{_MODULES[name]}", __name__)
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
