"""RotateK in lmms-eval: the model plug-in, which lmms-eval loads through its entry-point group `lmms_eval.models`."""
