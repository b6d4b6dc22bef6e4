"""Images of ``/v1/responses``: the settings of the tool ``image_generation`` for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ...engine.messages import DrawingRequest, edit_arguments
from ...inference.pathway import EditingPathway
from ..errors import APIError
from ..image_replies import choose_format, image_numbers, size_text
from ..images import ReplyFormat
from ..schema import ImageRequest
from .conversation import ResponsesInput
from .schema import ImageTool, ResponsesRequest

if TYPE_CHECKING:
    from ...inference.input_records import InputImage
    from ..service import Service

_SAMPLING_FIELDS = ("cfg_weight", "temperature", "top_p", "steps")
_Image = TypeVar("_Image")


@dataclass(frozen=True)
class Drawing:
    """An image to draw.

    Args:
        request: for the engine.
        file_format: the format of the image and its previews.
        size: width and height as text, such as "384x384".
    """

    request: DrawingRequest
    file_format: ReplyFormat
    size: str

    @property
    def action(self) -> Literal["generate", "edit"]:
        """The kind of drawing: from a prompt only, or a change to images."""
        return "edit" if self.request.images else "generate"


def images_to_change(
    tool: ImageTool, found: ResponsesInput, images: Sequence[_Image], service: Service
) -> tuple[_Image, ...]:
    """Return the images of the input that the drawing changes; () if it uses the prompt only.

    These are the images of the last question. If the question has none, the action "edit" changes
    the last image before it.

    Args:
        tool: the settings.
        found: the input.
        images: all images of the input, or only those that may be changed, in order.
        service: the server's parts.

    Raises:
        APIError: there is no image to change, or the model cannot change images.
    """
    can_edit = isinstance(service.engine.pathway, EditingPathway)
    if tool.action == "edit":
        if not can_edit:
            message = "this model cannot change images: it generates them from prompts only"
            raise APIError(400, message, param="tools")
        if not images:
            raise APIError(400, "there is no image to change: send one", param="input")
        # The images of the last question come last in ``images``. If it has none, take one image.
        count = max(len(found.images), 1)
        return tuple(images[-count:])
    if tool.action == "generate" or not can_edit or not found.images:
        return ()
    return tuple(images[-len(found.images) :])


def make_drawing(
    body: ResponsesRequest,
    tool: ImageTool,
    prompt: str,
    images: Sequence[InputImage],
    service: Service,
) -> Drawing:
    """Return the drawing that a request asks for.

    Args:
        body: the request.
        tool: the settings of the image.
        prompt: the description of the image or of the change.
        images: the images to change.
        service: the server's parts.

    Raises:
        APIError: the size is not supported, or the seed is too large.
        OptionError: the model does not support an option.
    """
    sampling: dict[str, Any] = {name: getattr(tool, name) for name in _SAMPLING_FIELDS}
    pathway = service.engine.pathway
    if images:
        assert isinstance(pathway, EditingPathway)  # ``images_to_change`` has checked it
        options = pathway.edit_options({**sampling, "cfg_weight2": tool.cfg_weight2})
    else:
        options = pathway.options(sampling)  # a None takes the model's default
    numbers, file_format = _numbers_and_format(body, tool, pathway.steps(options), service)
    request = DrawingRequest(prompt, options, **numbers, **edit_arguments(images))
    side = file_format.side or service.engine.config.image_size
    return Drawing(request, file_format, size_text(side, side))


def check_drawing(body: ResponsesRequest, tool: ImageTool, service: Service) -> None:
    """Check the settings of an image before the model decides whether to draw it.

    Raises:
        APIError: the size is not supported, or the seed is too large.
        OptionError: the model does not support an option.
    """
    make_drawing(body, tool, "an image", (), service)


def _numbers_and_format(
    body: ResponsesRequest, tool: ImageTool, steps: int, service: Service
) -> tuple[dict[str, Any], ReplyFormat]:
    """Return the seed and other numbers of the engine's request, by field; and the image's format.

    Args:
        body: the request.
        tool: the settings of the image.
        steps: the number of steps of the image.
        service: the server's parts.

    Raises:
        APIError: the size is not supported, or the seed is too large.
    """
    fields = ImageRequest(
        prompt="an image",  # it is not used
        size=tool.size,
        output_format=tool.output_format,
        output_compression=tool.output_compression,
        stream=body.stream,
        partial_images=tool.partial_images,
        seed=body.seed,
    )
    try:
        return asdict(image_numbers(fields, steps)), choose_format(fields, service)
    except APIError as error:
        if error.param == "size":  # here, the size is a field of the tool
            error.param = "tools"
        raise
