"""Whether jax has anything to run on."""

from __future__ import annotations


def why_no_device() -> str | None:
    """Why jax has no device to run on, in a line; None where it has one."""
    import jax  # here: commands that need no device, and messages, do without it

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where nothing is there that JAX_PLATFORMS names
        reason = (str(error).splitlines() or ["there is no such platform here"])[0]
        named = getattr(jax.config, "jax_platforms", None) or ""
        return f"jax has no device to run on: JAX_PLATFORMS={named!r}: {reason}"
    return None
