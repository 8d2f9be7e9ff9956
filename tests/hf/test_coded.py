"""All tokens coded (``text="coded"``): exact with whole coefficients, with few bits what decoding the codes gives."""

import copy
import functools
import gc
import tempfile
from pathlib import Path

import pytest
import torch
import ways
from checks import NOT_POSSIBLE, decode, possible, reached_storages, same
from hosts import Host, build_host
from recorded_graph import RecordedGraph, attend_on_device
from tiny_parts import IMAGE, Prompt, words
from torch import Tensor
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.cache import coded_layer, coded_step, token_counts
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "idefics3"]
SINKS, RECENT = token_counts.SINK_TOKENS, 10  # a shorter window than the real one, for prompts of tens of tokens


@pytest.fixture(autouse=True)
def _short_window(monkeypatch):
    monkeypatch.setattr(token_counts, "RECENT_TOKENS", RECENT)
    for module in (token_counts, coded_layer, coded_step):
        monkeypatch.setattr(module, "DENSE_COLUMNS", SINKS + RECENT)


@functools.cache
def basis_of(family: str) -> str:
    """A basis file of the family's tiny model, from images and text."""
    host = build_host(family)
    state = Calibration(fingerprint(host.attached), host.tiny.model_type)
    prompts = [host.tiny.inputs(host.tiny.prompt(seed, text=40, tail=30)) for seed in range(30, 34)]
    prompts += [host.tiny.inputs(Prompt(words(120, seed))) for seed in range(4)]
    path = Path(tempfile.mkdtemp()) / f"{family}.safetensors"
    calibrate(host.attached, prompts, state, text=True, sensitivity=False).write_basis(path)
    return str(path)


def coded(family: str, bits=4, **options) -> RotateKCache:
    return RotateKCache(basis=basis_of(family), text="coded", bits=bits, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", list(ways.WAYS))
def test_whole_coefficients_are_dynamic_cache(family, way):
    host = build_host(family)
    if (way == "video" and host.tiny.video is None) or family in NOT_POSSIBLE.get(way, ()):
        pytest.skip("not possible with DynamicCache either")
    expected = possible(family, way)
    got = ways.WAYS[way](host.tiny, host.attached, lambda visual_mask=None: coded(family, 16, visual_mask=visual_mask))
    same(got, expected)


class Oracle(DynamicCache):
    """A dense cache that hands out, for tokens that are coded, what decoding their codes gives.

    A row's own tokens are counted by `visible`, bool ``[B, n]``; all that come later are its own.
    """

    def __init__(self, layers: list, visible: Tensor) -> None:
        super().__init__()
        self.codecs = [layer.kv.codecs for layer in layers]
        self.visible = visible
        self.coded: dict[int, Tensor] = {}

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        held = self.get_seq_length(layer_idx)
        states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        total, new = states[0].shape[2], key_states.shape[2]
        own = torch.nn.functional.pad(self.visible, (0, max(0, total - self.visible.shape[1])), value=True)[:, :total]
        number = own.cumsum(1) - 1
        count = own[:, :held].sum(1, keepdim=True) + (new == 1 and held > 0)
        now = own & (number >= SINKS) & (number < count - RECENT)
        before = torch.nn.functional.pad(self.coded.get(layer_idx, now), (0, total))[:, :total]
        self.coded[layer_idx] = now | before
        read = []
        for codec, part in zip(self.codecs[layer_idx], states, strict=True):
            flat = part.transpose(0, 1).flatten(1, 2)
            decoded = codec.decode(codec.encode(flat), part.dtype).unflatten(1, (part.shape[0], -1)).transpose(0, 1)
            read.append(torch.where(self.coded[layer_idx][:, None, :, None], decoded, part))
        return tuple(read)

    def crop(self, tokens_to_remove):
        super().crop(tokens_to_remove)
        length = self.get_seq_length()
        self.coded = {layer: marks[:, :length] for layer, marks in self.coded.items()}
        self.visible = self.visible[:, :length]


def oracle(host: Host, cache: RotateKCache, mask: Tensor) -> Oracle:
    """An oracle for a cache that knows its layers."""
    cache.learn_config(host.attached.config)
    return Oracle(cache.layers, mask.bool())


def padded(host: Host) -> dict[str, Tensor]:
    """Two rows of different lengths, images in both, one with images among its last tokens."""
    return host.tiny.inputs(
        host.tiny.prompt(1, images=(0, 0), text=30, tail=4), host.tiny.prompt(2, images=(1,), text=5, tail=3)
    )


def forwards(host: Host, model, cache, inputs, parts: list[Tensor], masks: list[Tensor] | None = None) -> Tensor:
    """Logits of the last position of a prompt and of given tokens ``[B, n]`` in parts, with masks of one's own."""
    mask = inputs["attention_mask"]
    out = []
    for number, part in enumerate([None, *parts]):
        arguments = dict(inputs) if part is None else {"input_ids": part}
        if part is not None:
            new = torch.ones_like(part) if masks is None else masks[number - 1]
            mask = torch.cat([mask, new], 1)
        arguments["attention_mask"] = mask
        tokens = arguments["input_ids"].shape[1]
        arguments["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)[:, -tokens:]
        out.append(model(**arguments, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(out)


SETTINGS = [{"bits": 4}, {"bits": (2.28, 3)}, {"bits": 3, "allocation": "heads"}]


@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_codes_are_read_as_decoding_them_gives(llava, options):
    """Steps, a padded second turn, a chunk and steps again, on two rows with padding."""
    inputs = padded(llava)
    cache = coded("llava", **options)
    dense = oracle(
        llava,
        cache,
        torch.cat([inputs["attention_mask"], torch.ones(2, 20), torch.tensor([[1] * 6, [0] * 4 + [1] * 2])], 1),
    )
    parts = [torch.full((2, 1), 20 + n) for n in range(20)] + [torch.tensor([words(6, 1), words(6, 2)])]
    masks = [torch.ones(2, 1, dtype=torch.long)] * 20 + [torch.tensor([[1] * 6, [0] * 4 + [1] * 2])]
    parts += [torch.tensor([words(30, 3), words(30, 4)]), *[torch.full((2, 1), 20 + n) for n in range(14)]]
    masks += [torch.ones(2, 30, dtype=torch.long)] + [torch.ones(2, 1, dtype=torch.long)] * 14
    got = forwards(llava, llava.attached, cache, inputs, parts, masks)
    expected = forwards(llava, llava.plain, dense, inputs, parts, masks)
    torch.testing.assert_close(got, expected, atol=2e-3, rtol=1e-3)
    exact = forwards(llava, llava.plain, DynamicCache(), inputs, parts, masks)
    assert (exact - expected).abs().max() > 0.05  # codes are seen at all


def test_a_row_does_not_depend_on_its_batch(llava):
    prompts = [llava.tiny.prompt(1, images=(0,), text=20), llava.tiny.prompt(2, images=(0, 0), text=2, tail=3)]
    tokens = torch.tensor([words(20, 1), words(20, 2)])
    together = decode(llava, llava.tiny.inputs(*prompts), coded("llava"), tokens)
    for row, prompt in enumerate(prompts):
        alone = decode(llava, llava.tiny.inputs(prompt), coded("llava"), tokens[row : row + 1])
        torch.testing.assert_close(together[row], alone[0], atol=2e-3, rtol=1e-3)


def test_beams_and_selection_keep_each_row_its_own(llava):
    inputs = padded(llava)
    cache = coded("llava", 4)
    forwards(llava, llava.attached, cache, inputs, [torch.tensor([words(1, n), words(1, n + 9)]) for n in range(8)])
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(torch.tensor([1, 0]))
    chosen.batch_select_indices(torch.tensor([0, 1, 0]))
    index = torch.tensor([1, 0, 1])
    tokens = torch.tensor([words(20, 3), words(20, 4)])
    results = []
    for held, rows in ((cache, torch.arange(2)), (chosen, index)):
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 8), value=1)[rows]
        logits = []
        for token in tokens[rows].T[..., None]:
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = (mask.cumsum(1) - 1)[:, -1:]
            logits.append(
                llava.attached(
                    input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=held, use_cache=True
                ).logits
            )
        results.append(torch.cat(logits, 1))
    torch.testing.assert_close(results[1], results[0][index], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("removed", [1, 7, 25])
def test_a_crop_brings_tokens_back_as_their_codes_say(llava, removed):
    inputs = padded(llava)
    cache = coded("llava", 4)
    dense = oracle(llava, cache, inputs["attention_mask"])
    steps = [torch.tensor([words(1, n), words(1, n + 99)]) for n in range(30)]
    for model, held in ((llava.attached, cache), (llava.plain, dense)):
        forwards(llava, model, held, inputs, steps)
        held.crop(-removed)
    kept = torch.nn.functional.pad(inputs["attention_mask"], (0, 30 - removed), value=1)
    logits = []
    for model, held in ((llava.attached, cache), (llava.plain, dense)):
        mask, out = kept, []
        for n in range(26):
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            positions = (mask.cumsum(1) - 1)[:, -1:]
            token = torch.tensor([words(1, n + 50), words(1, n + 70)])
            given = {"input_ids": token, "attention_mask": mask, "position_ids": positions}
            out.append(model(**given, past_key_values=held, use_cache=True).logits[:, -1])
        logits.append(torch.stack(out))
    torch.testing.assert_close(*logits, atol=5e-3, rtol=1e-3)


def test_a_reset_cache_is_a_new_one(llava):
    inputs, other = padded(llava), llava.tiny.inputs(llava.tiny.prompt(5, text=40))
    cache = coded("llava")
    ways.generate(llava.attached, inputs, cache)
    cache.reset()
    assert cache.nbytes() == 0
    again = ways.generate(llava.attached, other, cache)
    new = ways.generate(llava.attached, other, coded("llava"))
    assert torch.equal(torch.stack(again.logits), torch.stack(new.logits))


def test_all_storage_is_counted_and_reported(llava):
    cache = coded("llava")
    ways.generate(llava.attached, padded(llava), cache)
    layers = [layer.kv for layer in cache.layers]
    held = {}
    for kv in layers:
        for part in (kv.dense_states, [codes.data for codes in kv.codes], kv.fresh):
            reached_storages(part, held, set())
    reached_storages(cache.positions, held, set())
    assert sum(held.values()) <= cache.nbytes() <= sum(held.values()) + 16 * len(layers)  # counts of the rows
    report = cache.report()
    assert report.stored_bytes == cache.nbytes() and "text='coded', bits=(4.0, 4.0)" in report.options
    for layer, kv in zip(report.layers, layers, strict=True):
        assert layer.segments[0].tokens == sum(kv.counts.coded) and layer.dense_tokens == 2 * (SINKS + RECENT)
        assert layer.segments[0].key_bytes == kv.codes[0].data.nbytes
    assert "coded" in repr(cache)


@pytest.mark.parametrize("name", ["padded_batch", "beams", "second_turn_padded", "prompt_lookup", "long_answer"])
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_a_step_is_replayed_from_a_graph(options, name, llava, monkeypatch):
    """Recorded on a CPU, which freezes what a CUDA graph freezes; attention reads tables as kernels do."""
    monkeypatch.setattr("rotatek_cache.hf.attention.attend", attend_on_device)
    monkeypatch.setattr("rotatek_cache.core.compiled._steps", lambda: None)  # no record is made of compiled steps
    RecordedGraph.made.clear()
    model = copy.deepcopy(llava.attached)
    graphs = model.model._rotatek.graphs
    graphs.new_graph, graphs.limit = RecordedGraph, 0
    way = ways.WAYS[name]

    def make(visual_mask=None):
        return coded("llava", **options)

    expected = way(llava.tiny, model, make)
    graphs.limit = 4
    found = way(llava.tiny, model, make)
    assert sum(graph.replays for graph in RecordedGraph.made)
    for one, other in zip(found, expected, strict=True):
        # Sums in another order may round a coefficient to the next code.
        torch.testing.assert_close(one, other, rtol=1e-2, atol=2e-2)


def test_a_graph_serves_the_next_prompt_and_is_made_anew_when_codes_outgrow_it(llava, monkeypatch):
    monkeypatch.setattr(coded_step, "RESERVED", 8)
    monkeypatch.setattr("rotatek_cache.hf.attention.attend", attend_on_device)
    monkeypatch.setattr("rotatek_cache.core.compiled._steps", lambda: None)  # no record is made of compiled steps
    RecordedGraph.made.clear()
    model = copy.deepcopy(llava.attached)
    model.model._rotatek.graphs.new_graph = RecordedGraph
    inputs = padded(llava)
    cache = coded("llava")
    ways.generate(model, inputs, cache, max_new_tokens=20)
    assert cache.decoding == "from a captured graph" and len(RecordedGraph.made) == 1
    del cache
    gc.collect()
    again = coded("llava")
    found = ways.generate(model, inputs, again, max_new_tokens=20)
    assert len(RecordedGraph.made) == 1 and RecordedGraph.made[0].replays == 36
    expected = ways.generate(llava.attached, inputs, coded("llava", graphs=False), max_new_tokens=20)
    torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-4)
    long = coded("llava")
    ways.generate(model, inputs, long, max_new_tokens=80, output_logits=False)
    assert len(RecordedGraph.made) == 3 and long.decoding == "from a captured graph"
    assert long.layers[0].kv.codes[0].capacity % 64 == 0


def test_what_does_not_go_together_is_refused(llava):
    for name, value in (("tokens", "fastv:0.5"), ("budget", "0.5x")):
        with pytest.raises(ValueError, match=f"leave out {name}="):
            coded("llava", **{name: value})
    other = build_host("qwen2_5_vl")
    with pytest.raises(ValueError, match="was calibrated on another model"):
        ways.generate(other.attached, ways.one(other.tiny), coded("llava"))
    cache = coded("llava")
    with pytest.raises(
        ValueError, match=r"basis file .* was calibrated on another model: in layer 0 it has 2 key heads"
    ):
        cache.update(torch.zeros(1, 5, 3, 32), torch.zeros(1, 5, 3, 32), 0)


def test_states_that_are_not_finite_are_named(llava):
    cache = coded("llava")
    states = torch.full((1, 2, 30, 32), torch.nan)
    handle, _ = cache.update(states, states, 0)
    with pytest.raises(ValueError, match="Keys of layer 0 hold NaN or infinity"):
        handle.observe(torch.zeros(1, 4, 1, 32), None)


def test_a_model_of_text_alone_runs_by_the_name_of_the_attention(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=IMAGE, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    plain = LlamaForCausalLM(config).eval()
    model = copy.deepcopy(plain)
    model.set_attn_implementation("rotatek")
    state = Calibration(fingerprint(model), "llama")
    prompts = ({"input_ids": torch.tensor([words(100, seed)])} for seed in range(4))
    calibrate(model, prompts, state, text=True).write_basis(tmp_path / "b.safetensors")
    assert state.texts == 4 and state.images == 0
    ids = torch.tensor([[0] * 5 + words(35, 1), words(40, 2)])
    inputs = {"input_ids": ids, "attention_mask": (torch.arange(40) >= torch.tensor([[5], [0]])).long()}
    expected = ways.generate(plain, inputs, DynamicCache(), max_new_tokens=20)
    got = ways.generate(
        model, inputs, RotateKCache(basis=tmp_path / "b.safetensors", text="coded", bits=16), max_new_tokens=20
    )
    same([got.sequences, torch.stack(got.logits)], [expected.sequences, torch.stack(expected.logits)])
    few = RotateKCache(basis=tmp_path / "b.safetensors", text="coded", bits=4)
    assert torch.stack(ways.generate(model, inputs, few).logits).isfinite().all()
