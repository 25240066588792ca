"""Whether weights can take the place of others: every shape that a compiled program has seen must be the same."""

from __future__ import annotations

import dataclasses

import jax
from flax import nnx

from engine.errors import ConfigError
from engine.models.llama import Llama
from engine.models.sharding import abstract_llama, key_names, split_config


def require_replaceable(new: Llama, served: Llama, tp: int) -> None:
    """Refuses weights that the programs compiled for ``served`` cannot take.

    Args:
        new: whole, as its user has it.
        served: as it is served: over the devices, with KV heads repeated where they are fewer than ``tp``.
        tp: devices that share the heads.

    Raises:
        ConfigError: the geometry or the dtype differs, or a parameter has not the shape that its geometry says; the
            message names what, with both values, of a parameter both whole shapes.
    """
    theirs, ours = dataclasses.asdict(split_config(new.config, tp)), dataclasses.asdict(served.config)
    theirs["dtype"], ours["dtype"] = new.dtype.name, served.dtype.name
    wrong = [
        f"{name}={value!r} where {ours[name]!r} is served" for name, value in theirs.items() if value != ours[name]
    ]
    if not wrong:
        given, due = _shapes(new), _shapes(abstract_llama(new.config, new.dtype))
        wrong = [
            f"{name} is {given.get(name, 'absent')} and must be {due.get(name, 'absent')}"
            for name in given | due
            if given.get(name) != due.get(name)
        ]
    if wrong:
        raise ConfigError(f"the new weights have another geometry: {'; '.join(wrong)}; make a new LLM for them")


def _shapes(model: Llama) -> dict[str, str]:
    """Dtype and whole shape of each parameter, by its path."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {".".join(key_names(path)): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}
