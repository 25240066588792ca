"""The data plane of the pool: the fused layout, the buffers and the scatter."""
