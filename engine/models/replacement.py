"""Whether new weights can replace those served: every shape that a compiled program depends on must be the same."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from engine.errors import ConfigError
from engine.models.decoder import Decoder
from engine.models.sharding import abstract_model, key_names, split_config


def require_replaceable(new: Decoder, served: Decoder, tp: int) -> None:
    """Refuses weights that the programs compiled for ``served`` cannot take.

    Args:
        new: the new model, not split over devices.
        served: the model as served: over the devices, with KV heads repeated where they are fewer than ``tp``.
        tp: devices that divide the heads among them.

    Raises:
        ConfigError: the geometry or dtype differs, or a parameter does not have the shape of its geometry; the message
            has both values, for a parameter both whole shapes.
    """
    theirs, ours = dataclasses.asdict(split_config(new.config, tp)), dataclasses.asdict(served.config)
    theirs["dtype"], ours["dtype"] = new.dtype.name, served.dtype.name
    wrong = [
        f"{name}={value!r} where {ours[name]!r} is served" for name, value in theirs.items() if value != ours[name]
    ]
    if not wrong:
        given, due = _shapes(new), _shapes(abstract_model(new.config, new.dtype))
        wrong = [
            f"{name} is {given.get(name, 'absent')} and must be {due.get(name, 'absent')}"
            for name in given | due
            if given.get(name) != due.get(name)
        ]
    if wrong:
        raise ConfigError(f"the new weights have another geometry: {'; '.join(wrong)}; make a new LLM for them")


def _shapes(model: Decoder) -> dict[str, str]:
    """Dtype and whole shape of each parameter, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(key_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
