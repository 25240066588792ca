"""Every page of a running engine at this moment, for the page that shows them."""

from __future__ import annotations

import secrets
import time
from base64 import b64encode
from hashlib import blake2b
from typing import Any

from engine.memory.page_map import PageMap
from engine.serving.plan.scheduler import Scheduler
from engine.trace.page_code import MOST_TENANTS, about_books, code_pages


class LivePages:
    """Looks at the pages of an engine. Tenants are shown by keyed digests of their salts, which are not told.

    Args:
        scheduler: the engine's.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._key = secrets.token_bytes(32)

    def state(self, steps: int) -> dict[str, Any]:
        """What is so now, for JSON; between two steps. Its size is that of the pages shown, at most ``MOST_PAGES``.

        Args:
            steps: steps run so far.
        """
        running = self._scheduler.running
        requests = [{"id": each.request_id, "tenant": self._tenant(each.scope.tenant_salt)} for each in running]
        numbers = {id(request): number for number, request in enumerate(running, 1)}
        replicas = []
        for replica in self._scheduler.replicas:
            cache, pages = replica.cache, PageMap.of(replica.cache)
            owners = {each.req_pool_idx: numbers[id(each)] for each in replica.running if each.req_pool_idx is not None}
            tenants = {scope: self._tenant(scope.tenant_salt) for scope in pages.scopes}
            about = {"size": cache.size, "page_size": cache.page_size, "windows": cache.page_table.windows}
            coded = code_pages(pages, owners, tenants).astype("<i4").tobytes()
            replicas.append({"about": about_books(about), "counts": pages.counts(), "pages": b64encode(coded).decode()})
        return {
            "step": steps,
            "micros": time.time_ns() // 1000,
            "running": len(running),
            "waiting": len(self._scheduler.waiting),
            "texts": [],
            "requests": requests,
            "replicas": replicas,
        }

    def _tenant(self, salt: str) -> int | None:
        if not salt:
            return None
        digest = blake2b(salt.encode(), key=self._key, digest_size=4).digest()
        return int.from_bytes(digest, "little") % MOST_TENANTS
