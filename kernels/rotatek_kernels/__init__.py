"""Fused Triton kernels over the cache's segment views; `rotatek_kernels.decode` is what the cache dispatches to.

Importing this package imports nothing else: Triton comes with `rotatek_kernels.decode`, CUDA with the first call.
"""
