"""`python -m rotatek_sglang.launch --model-path ... --sparsity 0.75`: `sglang.launch_server` with compression.

Our flags become environment variables, which SGLang's processes inherit, and go before those that are set already. All
others are SGLang's own.
"""

import argparse
import os
import runpy
import sys

from rotatek_sglang import options, plugin


def main() -> None:
    """Read our flags, then hand over to SGLang."""
    parser = argparse.ArgumentParser(
        prog="python -m rotatek_sglang.launch",
        description="Start an SGLang server with a compressed KV cache: of all tokens (--basis and --bits), or of "
        "images alone (--sparsity, --rank or --energy).",
        epilog="All other flags are those of sglang.launch_server. It can be started itself, with these options in the "
        "environment: ROTATEK_SPARSITY=0.75, ROTATEK_ALWAYS_COMPRESS=1.",
        allow_abbrev=False,
    )
    options.add_flags(parser)
    given, rest = parser.parse_known_args()
    try:
        chosen = options.ServingOptions.of(**{**options.read(), **vars(given)})
        chosen.check_basis_file()
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    for name in [name for name in os.environ if name.startswith(options.PREFIX)]:
        del os.environ[name]
    os.environ.update(chosen.environment(), SGLANG_PLATFORM="rotatek")
    plugin.stop_unless_supported()
    import torch  # noqa: PLC0415 (only to see which machine this is)

    if not torch.cuda.is_available() and not any(flag.partition("=")[0] == "--device" for flag in rest):
        rest += ["--device", "cpu"]
    sys.argv = ["sglang.launch_server", *rest]
    runpy.run_module("sglang.launch_server", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
