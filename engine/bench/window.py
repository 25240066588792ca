"""A layer with a window in a long context: against the same layer in a context of one window, and full attention.

Each sequence decodes one token, or computes one chunk of its prompt at the end of its context. What a step does once
for all layers of a group is timed apart: it looks up the group's pages and the slots of the new tokens.
"""

from __future__ import annotations
