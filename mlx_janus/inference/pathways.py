"""The image pathways, by the kind in the config."""

from __future__ import annotations

from collections.abc import Callable

from .flow_pathway import FlowPathway
from .loaded import LoadedModel
from .pathway import ImagePathway
from .vq_pathway import VQPathway

PATHWAYS: dict[str, Callable[[LoadedModel], ImagePathway]] = {
    "flow": FlowPathway,
    "vq": VQPathway,
}


def pathway_of(janus: LoadedModel) -> ImagePathway:
    """Return the pathway of a model."""
    return PATHWAYS[janus.config.generation.kind](janus)
