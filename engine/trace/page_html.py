"""The page that shows pages: one file of HTML with all that it needs, which asks nobody for anything.

The same page is filled with a trace, or asks a server for what is so now.
"""

from __future__ import annotations

import gzip
import json
import struct
from base64 import b64encode
from pathlib import Path
from typing import Any

import numpy as np

from engine.trace.page_history import PageHistory, joined_changes

FOLDER = Path(__file__).parent / "page"
SCRIPTS = ("film.js", "paint.js", "map.js", "tree.js", "curves.js", "main.js")
COMPRESSION = 6
LIVE_SECONDS = 1.0


def trace_page(history: PageHistory, started: str) -> str:
    """The page of a trace.

    Args:
        history: every page at every moment.
        started: when it was recorded.
    """
    return _filled({"live": None}, b64encode(gzip.compress(_packed(history, started), COMPRESSION)).decode())


def live_page(url: str) -> str:
    """The page of a running engine, which asks ``url`` for its pages."""
    return _filled({"live": url, "seconds": LIVE_SECONDS}, "")


def _packed(history: PageHistory, started: str) -> bytes:
    """The size of the JSON (uint32), the JSON, padding to a multiple of 4, the changes of each replica (int32)."""
    replicas, words = list[dict[str, Any]](), [np.zeros(0, np.int32)]
    for replica in history.replicas:
        sizes, changes = joined_changes(replica.changes)
        replicas.append({"about": replica.about, "sizes": sizes, "counts": replica.counts})
        words.append(changes.reshape(-1))
    facts = {
        "started": started,
        "failure": history.failure and history.failure.describe(),
        "replicas": replicas,
        "requests": history.requests,
        **{name: getattr(history, name) for name in ("steps", "micros", "waiting", "running", "texts")},
    }
    text = json.dumps(facts, separators=(",", ":")).encode()
    return struct.pack("<I", len(text)) + text + bytes(-len(text) % 4) + np.concatenate(words).astype("<i4").tobytes()


def _filled(how: dict[str, Any], data: str) -> str:
    parts = {
        "/*CSS*/": (FOLDER / "view.css").read_text(encoding="utf-8"),
        "/*JS*/": "\n".join((FOLDER / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "/*CONNECT*/": "'self'" if how["live"] else "'none'",
        "/*HOW*/": json.dumps(how),
        "/*DATA*/": data,
    }
    page = (FOLDER / "view.html").read_text(encoding="utf-8")
    for mark, text in parts.items():
        page = page.replace(mark, text)
    return page
