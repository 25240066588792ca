"""A pretend host for models of unlike layers, and an independent statement of what their steps compute."""

import jax.numpy as jnp
import numpy as np
from serving_support import VOCAB, make_llama

from engine import make_mesh
from engine.attention import FlashAttentionBackend
from engine.kv.pool import TokenToKVPool
from engine.layer_groups import first_kept_page, most_pages_held
from engine.models.sharding import shard_model
from engine.serving.device.batcher import parcel_shapes
from engine.serving.device.layer_attention import LayerAttention
from engine.serving.device.parcel import StepParcel
from engine.serving.device.runner import ModelRunner

PAGE, ROWS, COLUMNS, TOKENS = 4, 3, 20, 32
CONTEXT = PAGE * COLUMNS


class WindowedHost:
    """Plays the control plane: pages of each row and group, given back as soon as no further token can see them.

    Args:
        rng: decides which free page is taken.
        groups: the groups of the layers.
        pages: pages of the pool, the null page included.
    """

    def __init__(self, rng, groups, pages):
        self.rng, self.windows = rng, groups.windows
        self.table = np.zeros((ROWS, groups.num_groups, COLUMNS), np.int32)
        self.texts = [[] for _ in range(ROWS)]
        self.free = set(range(1, pages))

    def parcel(self, shape, tokens):
        """The parcel of a step in which row ``r`` computes ``tokens[r]``, perhaps none, and the rows that do."""
        parcel, places, token_ids = StepParcel.padding(shape), [], []
        live = [row for row, new in enumerate(tokens) if new]
        for index, row in enumerate(live):
            places += self._grow(row, len(tokens[row]))
            token_ids += tokens[row]
            self.texts[row] += tokens[row]
            parcel.req_pool_idx[index], parcel.kv_lens[index] = row, len(self.texts[row])
            parcel.cu_q_lens[index + 1 :] = len(token_ids)
        parcel.token_ids[: len(token_ids)] = token_ids
        parcel.update_at[: len(places)] = places
        parcel.update_page[: len(places)] = self.table.reshape(-1)[places]
        return parcel, live

    def end(self, row):
        """Gives back the pages of a row."""
        self.free |= set(self.table[row].ravel().tolist()) - {0}
        self.table[row], self.texts[row] = 0, []

    def random_tokens(self):
        """Tokens for each row: a chunk longer than most windows, a decode, and any number between."""
        counts = self.rng.permutation([self.rng.integers(10, 21), 1, self.rng.integers(0, 11)])
        return [
            self.rng.integers(0, VOCAB, count).tolist()[: CONTEXT - len(text)]
            for count, text in zip(counts, self.texts, strict=True)
        ]

    def _grow(self, row, count):
        computed, (_, groups, columns) = len(self.texts[row]), self.table.shape
        places = []
        for group, window in enumerate(self.windows):
            pages = self.table[row, group]
            if window is not None:
                behind = pages[: first_kept_page(window, computed, PAGE)]
                self.free |= set(behind.tolist()) - {0}
                behind[:] = 0
            for column in range(-(-computed // PAGE), -(-(computed + count) // PAGE)):
                pages[column] = self.rng.choice(sorted(self.free))
                self.free.remove(int(pages[column]))
                places.append((row * groups + group) * columns + column)
        return places


def make_runner(model, windows, impl="auto", *, pages=None, **axes):
    """A runner over a mesh of ``axes``, with pages for every row at its longest, and the shape of its steps."""
    sizes = {"page_size": PAGE, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 12, "impl": impl}
    mesh = make_mesh(**axes)
    attention = LayerAttention.of([FlashAttentionBackend(sliding_window=w, **sizes) for w in windows], mesh)
    groups = attention.groups
    pages = pages or ROWS * sum(most_pages_held(w, CONTEXT, PAGE, TOKENS) for w in groups.windows)
    pool = TokenToKVPool(pages * PAGE, PAGE, "float32", 2, 12, groups.num_buffers, mesh)
    shape = parcel_shapes(ROWS, TOKENS, PAGE, groups.num_groups)[-1]
    sharded = model if mesh is None else shard_model(model, mesh)
    runner = ModelRunner(sharded, pool, attention, [shape], max_pages=COLUMNS, moves_pages=False)
    runner.compile_all(None)
    return runner, shape, groups


def play(windows, impl="auto", steps=12, **axes):
    """Runs random steps over a mesh of ``axes``; all that no row holds is NaN before each.

    Yields:
        The logits of a row after a step, and those that dense layers give for its tokens.
    """
    rng = np.random.default_rng()
    model = make_llama(num_hidden_layers=len(windows))
    runner, shape, groups = make_runner(model, windows, impl, **axes)
    hosts = [WindowedHost(rng, groups, 1 + runner.pool.size // PAGE) for _ in range(runner.pool.replicas)]
    for step in range(steps):
        filled = []
        for host in hosts:
            longest = int(np.argmax([len(text) for text in host.texts]))
            if step % 4 == 3 or len(host.texts[longest]) == CONTEXT:
                host.end(longest)
            filled.append(host.parcel(shape, host.random_tokens()))
        poison(runner.pool, [host.free for host in hosts])
        parcels = [parcel for parcel, _ in filled]
        parcel = parcels[0] if len(hosts) == 1 else StepParcel.joined(parcels, shape)
        logits = np.asarray(runner.to_read(runner.step(parcel, shape).logits)).reshape(len(hosts), ROWS, VOCAB)
        for host, own, (_, live) in zip(hosts, logits, filled, strict=True):
            for index, row in enumerate(live):
                yield own[index], dense_logits(model, windows, host.texts[row])


def poison(pool, pages):
    """Fills the null page and each replica's ``pages`` of every buffer with NaN."""
    loc = np.full((pool.replicas, pool.size + PAGE), -1, np.int32)
    for own, free in zip(loc, pages, strict=True):
        slots = (np.array(sorted(free | {0}))[:, None] * PAGE + np.arange(PAGE)).ravel()
        own[: slots.size] = slots
    nothing = np.full((loc.size, pool.layout.head_num, pool.layout.head_dim), np.nan, np.float32)
    for buffer in range(pool.layer_num):
        pool.set_kv_buffer(buffer, jnp.asarray(loc.reshape(-1)), jnp.asarray(nothing), jnp.asarray(nothing))


def dense_logits(model, windows, text):
    """The logits after ``text`` without cache or pages: each layer's attention in float64 with its own window."""
    tokens = np.zeros(CONTEXT, np.int32)  # of one length, so that each operation compiles once; none sees the end
    tokens[: len(text)] = text
    position = np.arange(CONTEXT)

    def attend(layer_id, q, k, v, sinks=None):
        q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
        k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
        logits = np.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
        behind = position[:, None] - position[None, :]
        seen = (behind >= 0) & (behind < (windows[layer_id] or CONTEXT))
        weights = np.where(seen, np.exp(logits - logits.max(axis=-1, keepdims=True)), 0.0)
        return jnp.asarray(np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v), jnp.float32)

    hidden = model(jnp.asarray(tokens), jnp.asarray(position, jnp.int32), attend)
    return np.asarray(model.logits(hidden))[len(text) - 1]


def relative_error(pairs):
    """The largest difference of any pair over the largest magnitude, and how many pairs there are."""
    errors = [np.abs(got - expected).max() / np.abs(expected).max() for got, expected in pairs]
    return float(np.max(errors)), len(errors)
