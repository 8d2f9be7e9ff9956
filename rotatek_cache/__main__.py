"""Entry point of the console command `rotatek` and of ``python -m rotatek_cache``."""

import os
import sys


def main() -> None:
    """Run the command line; without the extra that it needs, say which one and stop."""
    # Read by transformers and its hub client when they are imported: their notes on optional packages and on loading
    # would bury what the command prints.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from rotatek_cache.cli.app import app  # noqa: PLC0415 (only here can a missing extra be explained)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "rotatek_cache":
            raise
        sys.exit(f"the command line needs the package '{error.name}': pip install 'rotatek-cache[demo]'")
    app(prog_name="rotatek")


if __name__ == "__main__":
    main()
