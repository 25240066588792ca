"""The names that a checkpoint has for a model's parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

_LEAF_NAMES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}
# Where a Gemma 3 that also sees images has its language model, by the version that wrote the file.
_LANGUAGE_MODEL = {
    "language_model.model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "model.language_model.": "model.",
}
_VISION = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")

Stored = TypeVar("Stored")


def tensor_name(names: Sequence[str]) -> str:
    """The checkpoint's name of a parameter: same modules, for some other leaf names, and a prefix on all but the head.

    Args:
        names: the parameter's path in the model, e.g. ``("layers", "0", "mlp", "up_proj", "kernel")``.
    """
    *modules, leaf = names
    prefix = [] if modules[0] == "lm_head" else ["model"]
    return ".".join([*prefix, *modules, _LEAF_NAMES.get(leaf, leaf)])


def of_the_language_model(stored: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of a checkpoint without those of an image encoder, named as in a checkpoint that has none."""
    if not any(name.startswith(tuple(_LANGUAGE_MODEL)) for name in stored):
        return dict(stored)
    kept = {}
    for name, tensor in stored.items():
        if _VISION.match(name) is None:
            prefix = next((prefix for prefix in _LANGUAGE_MODEL if name.startswith(prefix)), "")
            kept[_LANGUAGE_MODEL.get(prefix, "") + name.removeprefix(prefix)] = tensor
    return kept
