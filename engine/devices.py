"""Whether jax has a device to run on."""

from __future__ import annotations


def why_no_device() -> str | None:
    """Why jax has no device to run on, in one line; None where it has one."""
    import jax  # here, so that commands that need no device do not load it

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where JAX_PLATFORMS names no platform that is there
        reason = (str(error).splitlines() or ["there is no such platform here"])[0]
        named = getattr(jax.config, "jax_platforms", None) or ""
        return f"jax has no device to run on: JAX_PLATFORMS={named!r}: {reason}"
    return None
