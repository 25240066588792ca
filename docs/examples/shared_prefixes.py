"""Prompts that begin alike share pages, and tenants do not. Only the books on the host: jax is never loaded."""

import numpy as np
import numpy.typing as npt

from engine import CacheManager, CacheScope, LayoutKey

PAGE = 16
LAYOUT = LayoutKey.of({"head_num": 2, "head_dim": 64, "page_size": PAGE})  # with a pool: pool.layout.to_dict()
INSTRUCTIONS = list(range(100))  # what every prompt begins with: 6 full pages and 4 tokens


def scope_of(tenant: str) -> CacheScope:
    """The scope of a tenant: requests share where their scopes are equal."""
    return CacheScope("my weights", weights_epoch=0, adapter=None, tenant_salt=tenant, layout=LAYOUT)


def prompt_of(number: int) -> npt.NDArray[np.int32]:
    """The instructions and a question of 20 tokens."""
    return np.array([*INSTRUCTIONS, *range(1000 * number, 1000 * number + 20)], np.int32)


def begin(cache: CacheManager, tenant: str, number: int) -> int:
    """Admits a prompt, computes what is not cached of it, and publishes its full pages; returns its row."""
    scope, prompt, table = scope_of(tenant), prompt_of(number), cache.page_table
    admission = cache.admit(scope, prompt)
    if admission is None:
        raise SystemExit("there is no room now: an engine lets the request wait")
    row = admission.row
    cache.grow([row], [len(prompt) - admission.cached_tokens])
    cache.mark_computed([row], [len(prompt)])  # after the step in which the model has computed them
    cache.publish(row, scope, prompt)
    pages = " ".join(f"{page:2}" for page in table.row_pages(row))
    print(
        f"tenant {tenant}, question {number}: {admission.cached_tokens:2} of {len(prompt)} tokens cached; pages {pages}"
    )
    return row


def main() -> None:
    """Three questions of one tenant and one of another, all with the same instructions."""
    cache = CacheManager(size=64 * PAGE, page_size=PAGE, max_requests=8, max_context_tokens=512)
    requests = [("a", 1), ("a", 2), ("a", 3), ("b", 4)]
    rows = [begin(cache, tenant, number) for tenant, number in requests]
    in_use = (cache.size - cache.allocator.available_size()) // PAGE
    print(f"{in_use} pages in use; without sharing, {len(rows)} prompts of 120 tokens take {8 * len(rows)}")
    for row, (tenant, number) in zip(rows, requests, strict=True):
        cache.release(row, scope_of(tenant), prompt_of(number))
    print(f"after the requests: {cache.prefix.cached_pages} pages are cached for the next ones, none is held")
    cache.check_integrity()


if __name__ == "__main__":
    main()
