"""Pages that the pool has no room for go to host memory, and come back with the same bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from engine import (
    CacheManager,
    CacheScope,
    EvictedPages,
    HostTier,
    LayoutKey,
    PageCopy,
    PageFormat,
    PageLoad,
    TokenToKVPool,
    copy_pages,
    read_pages,
    write_pages,
)

PAGE, POOL_PAGES, LAYERS = 16, 12, 2


def make_moves(cache: CacheManager, pool: TokenToKVPool, tier: HostTier) -> None:
    """Makes the page moves of the plan, before the step and in their order."""
    for move in cache.take_moves():
        if isinstance(move, EvictedPages):
            tier.put(move.scope, move.token_ids, move.first_page, read_pages(pool, move.pages))
        elif isinstance(move, PageLoad):
            write_pages(pool, move.pages, move.data)
        elif isinstance(move, PageCopy):
            copy_pages(pool, move.sources, move.targets)


class Demo:
    """A pool of 12 pages, a host tier of 64, and a "model" whose keys and values are random numbers."""

    def __init__(self) -> None:
        self.pool = TokenToKVPool(POOL_PAGES * PAGE, PAGE, jnp.float32, head_num=2, head_dim=64, layer_num=LAYERS)
        self.cache = CacheManager(POOL_PAGES * PAGE, PAGE, max_requests=4, max_context_tokens=POOL_PAGES * PAGE)
        layout = self.pool.layout.to_dict()
        page_format = PageFormat(LAYERS, self.pool.dtype, layout)
        self.tier = HostTier(64 * page_format.page_bytes, page_format)
        self.cache.attach_host_tier(self.tier)
        self.scope = CacheScope("random numbers", 0, None, "", LayoutKey.of(layout))

    def run(self, name: str, prompt: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
        """Serves a prompt; returns the bytes of its full pages, ``[pages, layers, page, 2H, D]``."""
        cache, table = self.cache, self.cache.page_table
        admission = cache.admit(self.scope, prompt)
        if admission is None:
            raise SystemExit("there is no room now: an engine lets the request wait")
        row, start = admission.row, table.kv_len(admission.row)
        cache.grow([row], [len(prompt) - start])
        make_moves(cache, self.pool, self.tier)
        slots = table.slots(row, start, len(prompt))
        for layer_id in range(LAYERS):
            seed = jax.random.fold_in(jax.random.key(layer_id), prompt[0])
            keys, values = jax.random.normal(seed, (2, len(slots), 2, 64))
            self.pool.set_kv_buffer(layer_id, jnp.asarray(slots), keys, values)
        cache.mark_computed([row], [len(prompt)])
        pages = np.asarray(read_pages(self.pool, table.row_pages(row)[: len(prompt) // PAGE]))
        cache.release(row, self.scope, prompt)
        print(
            f"{name}: {admission.cached_tokens} tokens cached in the pool, {admission.loaded_tokens} loaded from the "
            f"host, {len(prompt) - start} computed; the host holds {self.tier.held_pages} pages"
        )
        return pages


def main() -> None:
    """Serves a prompt, two others that need its pages, and the prompt again."""
    demo = Demo()
    prompt = np.arange(100, dtype=np.int32)
    before = demo.run("first ", prompt)
    for start in (1000, 2000):
        demo.run("others", np.arange(start, start + 170, dtype=np.int32))
    after = demo.run("again ", prompt)
    print(f"the bytes of its {len(before)} pages are the same: {np.array_equal(before, after)}")
    demo.cache.check_integrity()


if __name__ == "__main__":
    main()
