"""A new process, which asks saved caches: ``python answer_saved.py FOLDER`` prints for each file how it answered."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import ways
from hosts import build_host

from rotatek_cache import RotateKCache


def main(folder: Path) -> None:
    found = {}
    torch.set_grad_enabled(False)
    for path in sorted(folder.glob("*.cache")):
        asked = torch.load(path.with_suffix(".asked"))
        cache = RotateKCache.load(path)
        output = ways.generate(build_host(asked["family"]).attached, asked["second"], cache, **asked["options"])
        found[path.stem] = {
            "tokens": torch.equal(output.sequences, asked["sequences"]),
            "logits": torch.equal(torch.stack(output.logits), asked["logits"]),
        }
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
