"""What SGLang is told to import beside its own models (`SGLANG_EXTERNAL_MODEL_PACKAGE`)."""
