"""The implementations of attention, one signature; none of them checks arguments or chooses another.

implementation   the signature, and what it promises
reference        written as the definition reads, one query at a time; slow
xla              for every platform
cpu              the native CPU kernel of ``engine.native``
tpu/             a Pallas kernel for TPUs
gpu/             a Mosaic GPU kernel for Hopper GPUs
"""
