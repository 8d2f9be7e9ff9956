"""RotateK in lmms-eval: the model plug-in (`model`), and batches of conversations with any cache (`chat`).

`chat` needs transformers alone; `model` is loaded by lmms-eval through its entry-point group `lmms_eval.models`.
"""
