"""Runs steps of a model of unlike layers over meshes; one line of JSON per case."""

from __future__ import annotations

import json
import sys

from windowed_steps import play, relative_error

WINDOWS = (8, None, 8, 12)

for axes in json.loads(sys.argv[1]):
    error, rows = relative_error(play(WINDOWS, steps=6, **axes))
    print(json.dumps({"axes": axes, "error": error, "rows": rows}), flush=True)
