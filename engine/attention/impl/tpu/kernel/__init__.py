"""What Pallas compiles, and nothing else: under 900 lines, which import nothing of ``tpu`` outside this folder.

``geometry`` has the static sizes, ``items`` the step as the kernel reads it, ``transfer`` the DMAs, ``packed_rows``
the way from words to K and V, ``flash`` the online softmax, ``loops`` the walk over items and blocks, ``pallas_call``
the Pallas call.
"""
