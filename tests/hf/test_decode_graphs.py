import copy
import gc

import peft
import pytest
import torch
import ways
from checks import AKVQ
from hosts import Host
from recorded_graph import RecordedGraph, attend_on_device
from tiny_models import FAMILIES
from tiny_parts import words

from rotatek_cache import RotateKCache, attach, detach
from rotatek_cache.cache.decode_step import DecodeStep
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.core.segments import TextSegment
from rotatek_cache.hf.attachment import inner_model
from rotatek_cache.hf.calls import cache_name

# Decoded step by step in every family, with the reason.
STEPPED = {
    "sliding window": (
        *("gemma3", "aya_vision", "cohere2_vision", "gemma3n", "gemma4", "gemma4_shared", "llama4"),
        *(name for name, tiny in FAMILIES.items() if tiny.linear),
    )
}
# Ways without steps of one token of the attached model, and those whose calls give no position_ids, as a graph needs.
NO_STEPS = {"assistant_model", "text_only"}
NO_POSITIONS = {
    "forward_in_pieces",
    "forward_loop",
    "forward_loop_of_one",
    "forward_with_a_new_image",
    "forward_with_embeddings",
    "interleaved_forwards",
}
# For every family that is replayed, one of them for the others; the other ways for one with plain and one with M-RoPE
# positions. Ways that are part of one of these are left out.
WAYS = ("beams", "second_turn_padded", "second_turn_with_an_image", "chunked_prefill")
PARTS = ("greedy", "padded_batch")
STEPPED_FAMILIES = {family for families in STEPPED.values() for family in families}
PAIRS = [
    (family, name)
    for family in sorted(FAMILIES)
    for name in sorted(ways.WAYS.keys() - set(PARTS))
    if name in (WAYS[1:2] if family in STEPPED_FAMILIES else WAYS) or family in ("llava", "qwen2_5_vl")
    if not FAMILIES[family].like
]


@pytest.fixture
def recorded(monkeypatch):
    """Graphs are recordings, and attention reads tables as kernels do."""
    monkeypatch.setattr("rotatek_cache.hf.attention.attend", attend_on_device)
    RecordedGraph.made.clear()

    def graphs_of(model):
        held = inner_model(model)._rotatek.graphs
        held.new_graph = RecordedGraph
        held.forget()
        return held

    return graphs_of


def make(**options):
    return lambda visual_mask=None: RotateKCache(**({"rank": 8} | options), visual_mask=visual_mask)


@pytest.mark.parametrize(("host", "name"), PAIRS, indirect=["host"])
def test_tokens_with_graphs_equal_tokens_without(host: Host, name, recorded):
    tiny, model = host.tiny, host.attached
    graphs = recorded(model)
    way = ways.WAYS[name]
    try:
        graphs.limit = 0
        expected = way(tiny, model, make())
    except Exception as error:  # noqa: BLE001
        pytest.skip(f"not possible without graphs either: {type(error).__name__}")
    finally:
        graphs.limit = 4
    try:
        found = way(tiny, model, make())
    finally:
        graphs.new_graph = None
        graphs.forget()
    stepped = tiny.name in STEPPED_FAMILIES or name in NO_STEPS | NO_POSITIONS
    assert bool(replayed()) != stepped
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def replayed() -> int:
    return sum(graph.replays for graph in RecordedGraph.made)


@pytest.fixture
def model(llava, recorded):
    copied = copy.deepcopy(llava.attached)
    recorded(copied)
    return copied


OPTIONS = [
    {"rank": 8, "key_bits": 4},
    {"rank": 16, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 4},
    {"basis": "pca", "rank": 8, "basis_bits": 8},
    {"sparsity": 0},
    {"rank": 8, "tokens": "fastv:0.5"},
    {"rank": 8, "tokens": "look_m:0.5"},
    {"rank": 8, "tokens": "divprune:0.7"},
    {"basis": "none", "sparsity": 0, "key_bits": 4},
    AKVQ | {"tokens": "akvq_vl:0.3,text_layers=1"},
    {"sparsity": 0, "tokens": "vl_cache:0.4,scope=prompt"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", ["padded_batch", "beams", "second_turn_padded"])
def test_any_storage_is_read_from_a_graph(options, name, llava, model):
    options = {"rank": None} | options
    graphs = model.model._rotatek.graphs
    graphs.limit = 0
    expected = ways.WAYS[name](llava.tiny, model, make(**options))
    graphs.limit = 4
    found = ways.WAYS[name](llava.tiny, model, make(**options))
    assert replayed()
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_conversation_is_captured_once_and_again_when_it_outgrows_its_text(llava, model):
    cache = RotateKCache(rank=8)
    inputs = ways.padded(llava.tiny)
    ways.generate(model, inputs, cache, max_new_tokens=20, min_new_tokens=20)
    assert len(RecordedGraph.made) == 1
    assert replayed() == 18  # the prompt gives one token, the first step is run as it is
    assert cache.decoding == "from a captured graph"
    assert "decode steps are run from a captured graph" in str(cache.report())
    capacity = cache.layers[0].kv.text.capacity
    assert 256 <= capacity - cache.layers[0].kv.text.length + 20 <= 340
    assert cache.nbytes() >= 3 * cache.layers[0].kv.text.keys.nbytes
    plain = RotateKCache(rank=8, graphs=False)
    expected = ways.generate(model, inputs, plain, max_new_tokens=340, min_new_tokens=340)
    assert plain.decoding == "step by step: graphs are switched off"
    long = RotateKCache(rank=8)
    found = ways.generate(model, inputs, long, max_new_tokens=340, min_new_tokens=340)
    assert len(RecordedGraph.made) == 3
    assert torch.equal(found.sequences, expected.sequences)


def test_questions_about_one_prompt_are_replayed_and_leave_its_text_alone(llava, model):
    """Also when the prompt's own cache has a graph, and when it is gone and another prompt could take the graph."""
    prompt, cache = ways.padded(llava.tiny), RotateKCache(rank=8)
    first = ways.generate(model, prompt, cache)
    ids = torch.tensor([[0, 0, *words(4, 1)], words(6, 2), words(6, 3)])
    mask = (ids > 0).long()

    def answers(held):
        asked = held.ask_many(ids, mask, rows=[0, 1, 0], conversation=first.sequences)
        many = asked.pop(cache_name())
        return many, lambda: torch.stack(ways.generate(model, asked, many).logits)

    graphs = model.model._rotatek.graphs
    graphs.limit = 0
    expected = answers(copy.deepcopy(cache))[1]()
    graphs.limit = 4
    before = replayed()
    many, ask = answers(cache)
    torch.testing.assert_close(ask(), expected, rtol=1e-4, atol=1e-5)
    assert replayed() > before and many.decoding == "from a captured graph"
    many, ask = answers(cache)
    cache.crop(-2)
    ways.generate(model, ways.follow_up(llava.tiny, prompt, first.sequences, words(4, 9)), cache)  # writes its text
    del cache
    gc.collect()
    ways.generate(model, prompt, RotateKCache(rank=8))
    torch.testing.assert_close(ask(), expected, rtol=1e-4, atol=1e-5)


def test_beams_reorder_without_a_capture_a_step(llava, model):
    cache = RotateKCache(rank=8)
    ways.generate(model, ways.padded(llava.tiny), cache, num_beams=3, max_new_tokens=16, output_logits=False)
    assert len(RecordedGraph.made) <= 2  # rows lie in another order from the first reorder on
    assert replayed() >= 12


def test_a_later_prompt_of_the_same_shapes_takes_the_graph_over(llava, model):
    inputs = ways.padded(llava.tiny)
    other = llava.tiny.inputs(llava.tiny.prompt(5, images=(0,)), llava.tiny.prompt(6, images=(1,), text=2, tail=3))
    for prompt in (inputs, other, inputs):
        cache = RotateKCache(rank=8)
        found = ways.generate(model, prompt, cache, max_new_tokens=8)
        expected = ways.generate(model, prompt, RotateKCache(rank=8, graphs=False), max_new_tokens=8)
        torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits), rtol=1e-4, atol=1e-5)
        del cache, found
        gc.collect()
    assert len(RecordedGraph.made) == 1


def test_a_cache_that_is_reset_takes_its_own_graph_over(llava, model):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(rank=8)
    for seed in (5, 7):
        ways.generate(model, inputs, cache)
        cache.reset()
        other = llava.tiny.inputs(
            llava.tiny.prompt(seed, images=(0,)), llava.tiny.prompt(6, images=(1,), text=2, tail=3)
        )
        found = ways.generate(model, other, cache).sequences
        assert torch.equal(found, ways.generate(model, other, RotateKCache(rank=8, graphs=False)).sequences)
        cache.reset()
    assert len(RecordedGraph.made) == 1


def test_a_graph_is_not_taken_from_a_cache_that_is_alive_or_whose_copy_is(llava, model):
    inputs = ways.padded(llava.tiny)
    first = RotateKCache(rank=8)
    ways.generate(model, inputs, first)
    before = first.layers[0].kv.segments[0].keys.data.clone()
    second = RotateKCache(rank=8)
    ways.generate(model, inputs, second)
    assert len(RecordedGraph.made) == 2
    copied = copy.deepcopy(first)
    del first
    gc.collect()
    third = RotateKCache(rank=16)
    other = llava.tiny.inputs(llava.tiny.prompt(5, images=(0,)), llava.tiny.prompt(6, images=(1,), text=2, tail=3))
    ways.generate(model, other, RotateKCache(rank=8))
    ways.generate(model, other, third)
    assert torch.equal(copied.layers[0].kv.segments[0].keys.data, before)


@pytest.mark.parametrize("change", ["reset", "crop", "select", "repeat", "copy", "dtype", "eager_between"])
def test_a_stale_graph_is_never_replayed(change, llava, model):
    def conversation(graphs):
        torch.manual_seed(0)
        host = copy.deepcopy(model)
        recorded = host.model._rotatek.graphs
        recorded.new_graph = RecordedGraph
        inputs = ways.padded(llava.tiny)
        cache = RotateKCache(rank=8, graphs=graphs)
        output = ways.generate(host, inputs, cache, max_new_tokens=6)
        rows = torch.arange(2)
        if change == "reset":
            cache.reset()
            inputs = llava.tiny.inputs(
                llava.tiny.prompt(5, images=(0,)), llava.tiny.prompt(6, images=(1,), text=2, tail=3)
            )
            return ways.generate(host, inputs, cache, max_new_tokens=6).sequences
        sequences, mask = output.sequences, inputs["attention_mask"]
        if change == "crop":
            cache.crop(-3)
            sequences = sequences[:, :-3]
        elif change == "select":
            rows = torch.tensor([1])
            cache.batch_select_indices(rows)
        elif change == "repeat":
            rows = torch.tensor([0, 0, 1, 1])
            cache.batch_repeat_interleave(2)
        elif change == "copy":
            cache = copy.deepcopy(cache)
        elif change == "dtype":
            host.double()
            host.float()
        elif change == "eager_between":
            hook = host.lm_head.register_forward_hook(lambda *args: None)
            hook.remove()
        inputs = {"input_ids": inputs["input_ids"][rows], "attention_mask": mask[rows]}
        second = ways.follow_up(llava.tiny, inputs, sequences[rows], [7, 8, 9])
        return ways.generate(host, second, cache, max_new_tokens=6).sequences

    assert torch.equal(conversation(graphs=True), conversation(graphs=False))


def test_what_needs_python_is_decoded_step_by_step_with_the_reason(llava, model, caplog):
    inputs = ways.padded(llava.tiny)

    def reason(**options):
        cache = RotateKCache(rank=8)
        ways.generate(model, inputs, cache, **options)
        return cache.decoding

    assert "hidden states are asked for" in reason(output_hidden_states=True)
    assert "switched off" in reason(disable_compile=True)
    heard = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *args: heard.append(1))
    assert "forward hooks" in reason()
    assert len(heard) == ways.NEW
    hook.remove()
    heard.clear()
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, *args: heard.append(module))
    try:
        assert "forward hooks" in reason()
        assert heard.count(model.model.language_model.layers[0]) == ways.NEW
    finally:
        hook.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast is on" in reason()
    broken = model.model.language_model.layers[1]
    forward = broken.forward

    def reads_the_host(hidden, *args, **kwargs):
        if hidden.shape[1] == 1 and float(hidden.sum()) == 1e30:
            raise ValueError("a host read")
        return forward(hidden, *args, **kwargs)

    broken.forward = reads_the_host
    expected = ways.generate(model, inputs, RotateKCache(rank=8, graphs=False)).sequences
    cache = RotateKCache(rank=8)
    with caplog.at_level("WARNING"):
        found = ways.generate(model, inputs, cache).sequences
    assert torch.equal(found, expected)
    assert "capturing a step failed" in cache.decoding
    assert len([record for record in caplog.records if "without a CUDA graph" in record.message]) == 1


def test_hidden_states_that_a_config_asks_for_later_are_returned(llava, model):
    inputs = ways.padded(llava.tiny)
    cache = RotateKCache(rank=8)
    output = ways.generate(model, inputs, cache)
    positions = torch.full((2, 1), cache.get_seq_length())
    model.config.text_config.output_hidden_states = True
    with torch.no_grad():
        step = model.model(input_ids=output.sequences[:, -1:], position_ids=positions, past_key_values=cache)
    assert "hidden states are asked for" in cache.decoding
    assert len(step.hidden_states) == len(cache.layers) + 1


def test_a_single_visual_token_waits_for_its_end(llava, model):
    cache = RotateKCache(rank=8)
    output = ways.generate(model, ways.one(llava.tiny), cache)
    decodings = []
    for visual in (False, True, False, False):
        length = cache.get_seq_length()
        cache.positions.given = torch.arange(length + 1)[None] == (length if visual else -1)
        embedded = model.get_input_embeddings()(output.sequences[:, -1:])
        with torch.no_grad():
            model.model(inputs_embeds=embedded, position_ids=torch.tensor([[length]]), past_key_values=cache)
        decodings.append(cache.decoding)
        assert (cache.layers[0].kv.pending is not None) == visual
    steps = ["the token is visual", "an image waits for its end"]
    graph = "from a captured graph"
    assert decodings == [graph, *(f"step by step: {reason}" for reason in steps), graph]


def _add_adapter(model):
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["q_proj", "up_proj"], r=4), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def _replace_module(model):
    layer = model.model.language_model.layers[0]
    layer.mlp = copy.deepcopy(layer.mlp)
    layer.mlp.up_proj.weight.data *= 3


def _replace_weight(model):
    layer = model.model.language_model.layers[0]
    layer.mlp.up_proj.weight = torch.nn.Parameter(layer.mlp.up_proj.weight.data * 3)


def _replace_method(model):
    layer = model.model.language_model.layers[0]
    original = layer.mlp.forward
    layer.mlp.forward = lambda hidden: 3 * original(hidden)


def _scale_adapter(model):
    for module in model.modules():
        if hasattr(module, "lora_B"):
            module.scaling["default"] *= 3


@pytest.mark.parametrize(
    "changes",
    [[_add_adapter, _scale_adapter], [_replace_module], [_replace_weight], [_replace_method]],
    ids=["adapter", "module", "weight", "method"],
)
def test_a_model_that_changes_between_prompts_is_captured_anew(changes, llava, model):
    inputs = ways.padded(llava.tiny)

    def logits(graphs):
        cache = RotateKCache(rank=8, graphs=graphs)
        return torch.stack(ways.generate(model, inputs, cache).logits)

    before = logits(graphs=True)
    for change in changes:
        change(model)
        gc.collect()
        found = logits(graphs=True)
        torch.testing.assert_close(found, logits(graphs=False), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(found, before)
    assert len(RecordedGraph.made) == 1 + len(changes)


def test_a_step_that_was_interrupted_is_repeated(llava, model, monkeypatch):
    inputs = ways.padded(llava.tiny)

    def interrupted(layer):
        raise KeyboardInterrupt

    def answer(graphs):
        cache = RotateKCache(rank=8, graphs=graphs)
        sequences = ways.generate(model, inputs, cache).sequences
        again = ways.follow_up(llava.tiny, inputs, sequences, [])
        if graphs:
            with monkeypatch.context() as patched:
                patched.setattr(LayerKV, "count_step", interrupted)
                with pytest.raises(KeyboardInterrupt):
                    ways.generate(model, again, cache)
        return torch.stack(ways.generate(model, again, cache).logits)

    torch.testing.assert_close(answer(graphs=True), answer(graphs=False), rtol=1e-4, atol=1e-5)


def test_without_memory_for_free_columns_the_conversation_goes_on(llava, model, monkeypatch):
    def full(text):
        raise torch.OutOfMemoryError("CUDA out of memory")

    inputs = ways.padded(llava.tiny)
    expected = ways.generate(model, inputs, RotateKCache(rank=8, graphs=False)).sequences
    monkeypatch.setattr(TextSegment, "reserve", full)
    cache = RotateKCache(rank=8)
    assert torch.equal(ways.generate(model, inputs, cache).sequences, expected)
    assert "out of memory" in cache.decoding


def test_a_graph_whose_layers_share_a_row_table_is_not_taken_for_layers_that_do_not(llava, model):
    cache = RotateKCache(rank=8, graphs=False)
    ways.generate(model, ways.padded(llava.tiny), cache)
    other = copy.deepcopy(cache)
    segment = other.layers[1].kv.segments[0]
    segment.starts = segment.starts.flip(0)
    forms = [DecodeStep([layer.kv for layer in held.layers]).form() for held in (cache, copy.deepcopy(cache), other)]
    assert forms[0] == forms[1]
    assert forms[0] != forms[2]


def test_a_mask_that_hides_text_is_obeyed(llava, model):
    inputs = ways.padded(llava.tiny)

    def logits(graphs):
        cache = RotateKCache(rank=8, graphs=graphs)
        output = ways.generate(model, inputs, cache)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, ways.NEW), value=1)
        mask[:, -3] = 0
        found = []
        for _ in range(3):
            positions = (mask.cumsum(1) - 1)[:, -1:]
            found.append(
                model(
                    input_ids=output.sequences[:, -1:],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                ).logits
            )
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        return torch.cat(found, 1), cache.decoding

    found, decoding = logits(graphs=True)
    assert "hides more than padding" in decoding
    torch.testing.assert_close(found, logits(graphs=False)[0])


def test_attached_models_can_be_copied_and_detached(llava, model):
    assert "forward" in model.model.__dict__
    detach(copied := copy.deepcopy(model))
    assert "forward" not in copied.model.__dict__
    assert attach(copied, graphs=0).model._rotatek.graphs.limit == 0


@pytest.mark.parametrize("host", sorted(FAMILIES), indirect=True)
def test_every_family_is_replayed_or_says_why_not(host, recorded):
    graphs = recorded(host.attached)
    cache = RotateKCache(rank=8)
    try:
        ways.generate(host.attached, ways.padded(host.tiny), cache, max_new_tokens=8)
    finally:
        graphs.new_graph = None
    reasons = [reason for reason, families in STEPPED.items() if host.tiny.name in families]
    if reasons:
        assert reasons[0] in cache.decoding
    else:
        assert cache.decoding == "from a captured graph"


def test_one_graph_at_most_outlives_its_cache_and_failures_are_not_paid_for_with_each_prompt(llava, model, caplog):
    graphs = model.model._rotatek.graphs
    for seed in (1, 2, 3):
        prompt = llava.tiny.inputs(llava.tiny.prompt(seed, images=(0,), text=seed + 2))
        cache = RotateKCache(rank=8)
        ways.generate(model, prompt, cache, max_new_tokens=6, min_new_tokens=6)
        del cache
        gc.collect()
    kept = RotateKCache(rank=16)
    ways.generate(model, prompt, kept)
    assert sum(held.cache() is None for held in graphs.captured) <= 1
    graphs.forget()

    class Broken(RecordedGraph):
        def capture(self, warm_up, step):
            raise RuntimeError("no capture")

    graphs.new_graph = Broken
    with caplog.at_level("WARNING"):
        for _ in range(5):
            cache = RotateKCache(rank=8)
            ways.generate(model, prompt, cache)
            assert "no capture" in cache.decoding
    assert sum("without a CUDA graph" in record.message for record in caplog.records) == 3


def test_a_hiding_mask_is_read_once_a_generate(llava, model, monkeypatch):
    read = []
    shows_all = DecodeStep.shows_all
    monkeypatch.setattr(DecodeStep, "shows_all", lambda step, mask: read.append(1) or shows_all(step, mask))
    inputs = ways.padded(llava.tiny)

    def second_turn(graphs):
        cache = RotateKCache(rank=8, graphs=graphs)
        first = ways.generate(model, inputs, cache)
        second = ways.follow_up(llava.tiny, inputs, first.sequences, [7, 8, 9])
        second["attention_mask"][:, -5] = 0
        read.clear()
        output = ways.generate(model, second, cache)
        later = ways.follow_up(llava.tiny, second, output.sequences, [5, 6])
        later["attention_mask"][:] = 1
        later["attention_mask"][:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
        return output.sequences, cache.decoding, len(read), ways.generate(model, later, cache).sequences, cache.decoding

    tokens, decoding, reads, later, at_last = second_turn(graphs=True)
    expected, _, _, later_expected, _ = second_turn(graphs=False)
    assert "hides more than padding" in decoding and reads == 1
    assert at_last == "from a captured graph"
    assert torch.equal(tokens, expected) and torch.equal(later, later_expected)
