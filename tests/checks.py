"""What tests of several folders share: a fixed continuation, what a cache reaches, what it keeps."""

import torch
from hosts import Host

from rotatek_cache import RotateKCache


def decode(host: Host, inputs: dict[str, torch.Tensor], cache: RotateKCache, tokens: torch.Tensor) -> torch.Tensor:
    """Logits after a prompt and given continuation ``[B, n]``: the first token alone, then all others at once."""
    mask = inputs["attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    out = [host.attached(**inputs, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1:]]
    for part in (tokens[:, :1], tokens[:, 1:]):
        mask = torch.nn.functional.pad(mask, (0, part.shape[1]), value=1)
        positions = (mask.cumsum(1) - 1)[:, -part.shape[1] :]
        out.append(
            host.attached(
                input_ids=part, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
        )
    return torch.cat(out, 1)


def reached_storages(held, found, seen):
    """Every tensor storage reachable from `held` through attributes and containers."""
    if id(held) in seen:
        return found
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        storage = held.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(held, dict):
        for value in [*held.values(), *held.keys()]:
            reached_storages(value, found, seen)
    elif isinstance(held, list | tuple | set):
        for value in held:
            reached_storages(value, found, seen)
    elif type(held).__module__.startswith(("rotatek_cache", "transformers")):
        names = [*getattr(held, "__dict__", {}), *getattr(type(held), "__slots__", ())]
        for name in names:
            reached_storages(getattr(held, name, None), found, seen)
    return found


def kept_positions(cache: RotateKCache, layer: int, row: int, visual) -> list[int]:
    """Visual positions that a layer stores of a row, read from its tables."""
    kv = cache.layers[layer].kv
    found = []
    for segment in kv.segments:
        found += segment.token_positions()[row, : segment.lengths[row]].tolist()
    if kv.text.length:
        text = kv.text.view(kv.positions.forward, None)
        found += [p for p in kv.text.token_positions()[row, : text.lengths[row]].tolist() if visual[row, p]]
    return sorted(found)


def make(method, **options):
    return lambda visual_mask=None: RotateKCache.for_study(
        **({"sparsity": 0} | options), tokens=method, visual_mask=visual_mask
    )
