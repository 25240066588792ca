"""A compact continuous-batching engine: the proof that the subsystem embeds."""
