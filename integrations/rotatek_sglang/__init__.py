"""SGLang with visual Keys (and Values) stored as coefficients: a plug-in, inert unless compression is asked for.

`python -m rotatek_sglang.launch --model-path ... --sparsity 0.75` starts an ordinary SGLang server on it.
"""

SGLANG_VERSION = "0.5.23"
"""The version this plug-in is written for. It works at seams of which many are internal, so no other is accepted."""
