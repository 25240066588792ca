"""What programs of this room say about engines: how answers compare, and where memory lies."""

import sys

import jax

TIE = 1e-5  # of logits of order 0.1 to 1 in float32, summed in another order by another number of devices


def unlike(one, many):
    """How many answers, siblings too, differ otherwise than by a tie of two tokens on one device."""
    count = 0
    for a, b in zip(one, many, strict=True):
        differs = [i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids, strict=True)) if x != y]
        if differs:
            logits = a.logits[differs[0]]
            tie = abs(logits[a.token_ids[differs[0]]] - logits[b.token_ids[differs[0]]]) < TIE
            print(f"answers differ at {differs[0]}, tie: {tie}", file=sys.stderr)
            count += not tie
        count += unlike(a.siblings, b.siblings)
    return count


def pointers(pool):
    return [[shard.data.unsafe_buffer_pointer() for shard in buffer.addressable_shards] for buffer in pool.buffers]


def bytes_on(device, tree):
    shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
    return sum(shard.data.nbytes for shard in shards if shard.device == device)
