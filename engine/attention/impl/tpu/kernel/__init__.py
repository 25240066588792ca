"""What Pallas compiles, and nothing else: under 900 lines, which import nothing of ``tpu`` around them.

``geometry`` has the static sizes, ``items`` the step as the kernel reads it, ``transfer`` the DMAs, ``registers`` the
way from words to K and V, ``flash`` the online softmax, ``loops`` the walk over items and blocks, ``call`` the Pallas
call.
"""
