"""What tests of several folders share: a fixed continuation, what a cache reaches, what it keeps."""

import functools

import pytest
import torch
import ways
from hosts import Host, build_host
from tiny_models import FAMILIES
from tiny_more import EVERY
from tiny_parts import TRANSFORMERS, visual_positions
from transformers import DynamicCache

from rotatek_cache import RotateKCache

M_ROPE = {name for name, tiny in FAMILIES.items() if tiny.token_types == "mm_token_type_ids" and tiny.grids}
NO_EMBEDDINGS = {"gemma3", "gemma4", "gemma4_shared", "paligemma"}
LLAMA4 = {"llama4"} & set(FAMILIES)
LINEAR = {name for name, tiny in EVERY.items() if tiny.linear}

# What transformers 5.24 cannot do with its own DynamicCache either.
NOT_POSSIBLE = {
    "forward_loop": M_ROPE,  # a 2D mask in a decode step of one's own: positions of the whole length come out
    "merged_embeddings": NO_EMBEDDINGS,
    "embeddings_and_pixels": NO_EMBEDDINGS,
    "beams": {"fuyu"} | LLAMA4,  # they repeat the ids, and not the patches or features
    "sampled_sequences": LLAMA4,
    # Features of more than the placeholders come from the encoder; they are not where chunks look for them.
    "chunked_prefill": {"ovis2", "granite4_vision"} | LLAMA4,
    "chunked_prefill_padded": {"ovis2", "granite4_vision", "phi4_multimodal", "fuyu"} | LLAMA4,
    "prompt_lookup": LINEAR,  # the state of linear attention cannot be taken back
    "assistant_model": LINEAR,
    "forward_with_embeddings": {"gemma4_shared"},  # each layer looks up an embedding of the ids
    "forward_in_pieces": LINEAR,  # its layers cannot repeat rows
}


# The options of AKVQ-VL: a few tokens in 8 bits, the others in 2.
AKVQ = {"sparsity": 0, "basis": "hadamard", "key_bits": 2, "value_basis": "hadamard", "value_bits": 2}


@functools.cache
def dense_result(family, way):
    """What the plain model does with DynamicCache; the error where an older transformers cannot do it."""
    host = build_host(family)
    config = host.plain.config.get_text_config(decoder=True)
    try:
        return ways.WAYS[way](host.tiny, host.plain, lambda visual_mask=None: DynamicCache(config=config))
    except Exception as error:  # whatever it is, it is not ours
        if TRANSFORMERS >= (5, 23):
            raise
        return error


def possible(family, way):
    """What DynamicCache gives; skips the test where this transformers cannot do it."""
    found = dense_result(family, way)
    if isinstance(found, Exception):
        pytest.skip(f"not possible with DynamicCache either: {type(found).__name__}: {found}")
    return found


def same(got, wanted):
    """Check that tensors are the same, numbers within rounding."""
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        if theirs.is_floating_point():
            torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-5)
        else:
            assert torch.equal(ours, theirs)


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


class PromptInParts:
    """A padded batch read in parts, whose image waits for its end, with a budget to be divided when it comes."""

    def __init__(self, host: Host) -> None:
        self.host, self.inputs = host, ways.padded(host.tiny)
        self.embeds = host.plain.get_input_embeddings()(self.inputs["input_ids"])
        self.cache = RotateKCache(budget="0.95x", visual_mask=visual_positions(self.inputs["input_ids"]))
        self.read(self.cache, 0, 40)

    def read(self, cache: RotateKCache, begin: int, end: int) -> torch.Tensor:
        """Logits of a part."""
        mask = self.inputs["attention_mask"][:, :end]
        embeds = self.embeds[:, begin:end]
        return self.host.attached(inputs_embeds=embeds, attention_mask=mask, past_key_values=cache).logits

    def check(self, copied: RotateKCache) -> None:
        """Check that a copy goes on with the prompt's end as the cache does."""
        end = self.embeds.shape[1]
        assert torch.equal(self.read(copied, 40, end), self.read(self.cache, 40, end))
        assert copied.nbytes() == self.cache.nbytes()


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
