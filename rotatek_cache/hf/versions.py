"""The versions of transformers that the tests run on, and a warning for any that came out since."""

import functools
import logging

import transformers

Version = tuple[int, int]

OLDEST: Version = (5, 17)
NEWEST: Version = (5, 24)  # `make test-hosts` runs both, and one between

logger = logging.getLogger(__name__)


def installed() -> Version:
    """Read the version of transformers."""
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def tested() -> str:
    """Name the versions that were tested."""
    return f"{OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}"


@functools.cache
def warn_if_untested() -> None:
    """Log a warning where transformers is newer than any version that was tested; once per process."""
    if installed() > NEWEST:
        logger.warning(
            "rotatek_cache was tested with transformers %s, this is %s: compare a first answer with that of "
            "DynamicCache, or install a tested version: pip install 'transformers<%d.%d'",
            tested(),
            transformers.__version__,
            NEWEST[0],
            NEWEST[1] + 1,
        )
