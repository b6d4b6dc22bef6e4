"""The model and the images of the engine's tests."""

from __future__ import annotations

import pytest
from PIL import Image

from mlx_janus.pipeline import JanusPipeline
from tests.support.engines import some_pictures, tiny


@pytest.fixture(scope="module")
def janus() -> JanusPipeline:
    """What each request is compared with."""
    return tiny()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return some_pictures()
