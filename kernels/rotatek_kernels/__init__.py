"""Fused attention over the cache's segment views: `rotatek_kernels.decode` (Triton) and `decode_cpu` (C++).

Importing this package imports nothing else: Triton comes with `decode`, CUDA and a compiler with the first call.
"""
