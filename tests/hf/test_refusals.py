"""What cannot be right is refused, with an error that says what to do; nothing is wrong in silence."""

import copy
import json
import re
import runpy
import subprocess
import sys

import peft
import pytest
import torch
import ways
from hosts import Host, build_host
from tiny_parts import IMAGE, TEXT, VISION, visual_positions, words
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, DynamicCache

from rotatek_cache import RotateKCache, attach
from rotatek_cache.hf.attention import rotatek_attention_forward


def _cache(**options):
    return RotateKCache(**{"sparsity": 0.5} | options)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "sparsity"),
        ({"sparsity": float("nan")}, ValueError, "sparsity"),
        ({"sparsity": "0.5"}, TypeError, "sparsity must be a number"),
        ({}, ValueError, "exactly one of sparsity, rank and energy"),
        ({"sparsity": 0.5, "rank": 8}, ValueError, "sparsity=0.5, rank=8"),
        ({"rank": 8, "energy": 0.9}, ValueError, "exactly one"),
        ({"rank": 0}, ValueError, "rank must be at least 1"),
        ({"rank": 8.0}, TypeError, "rank must be an int"),
        ({"energy": 0.0}, ValueError, "energy"),
        ({"energy": 1.5}, ValueError, "energy"),
        ({"sparsity": 0.5, "query_window": 0}, ValueError, "query_window"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        RotateKCache.for_study(**options)


def test_options_are_by_keyword_only():
    with pytest.raises(TypeError):
        RotateKCache(0.5)


def test_rank_above_the_head_width(llava: Host):
    with pytest.raises(ValueError, match="rank must be at most the head width 32, got 33"):
        ways.greedy(llava.tiny, llava.attached, lambda: RotateKCache.for_study(rank=33, always_compress=True))


# --- models -----------------------------------------------------------------------------------------------------------


def test_a_model_that_is_no_model():
    with pytest.raises(TypeError, match="PreTrainedModel"):
        attach(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="PreTrainedModel"):
        attach("llava")


def test_a_text_model():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TEXT))
    with pytest.raises(ValueError, match="vision-language"):
        attach(model)


def _mllama():
    text = {
        **TEXT,
        "num_hidden_layers": 3,
        "cross_attention_layers": [1],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }
    del text["head_dim"]
    vision = {
        "hidden_size": 32,
        "attention_heads": 2,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 8,
        "vision_output_dim": 64,
        "intermediate_layers_indices": [1],
        "max_num_tiles": 1,
        "supported_aspect_ratios": [[1, 1]],
    }
    config = AutoConfig.for_model("mllama", text_config=text, vision_config=vision, image_token_index=IMAGE)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    inputs = {
        "input_ids": torch.tensor([[1, IMAGE, 20, 21, 22]]),
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "pixel_values": torch.randn(1, 1, 1, 3, 16, 16),
        "aspect_ratio_ids": torch.ones(1, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(1, 1, 1, dtype=torch.long),
        "cross_attention_mask": torch.ones(1, 5, 1, 1, dtype=torch.long),
    }
    return model, inputs


def test_cross_attention():
    model, inputs = _mllama()
    model.generate(**inputs, max_new_tokens=3, do_sample=False)  # it runs with its own cache
    with pytest.raises(ValueError, match=r"mllama.*cross-attention"):
        attach(model)
    model.set_attn_implementation({"text_config": "rotatek"})
    cache = _cache(visual_mask=inputs["input_ids"] == IMAGE)
    with pytest.raises(AttributeError, match="cross-attention"):
        model.generate(**inputs, past_key_values=cache, max_new_tokens=3, do_sample=False)


def _paligemma2():
    text = {
        **TEXT,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 50.0,
        "sliding_window": 64,
    }
    vision = {**VISION, "model_type": "siglip_vision_model", "image_size": 32, "patch_size": 4, "projection_dim": 128}
    config = AutoConfig.for_model(
        "paligemma",
        text_config=text,
        vision_config=vision,
        image_token_index=IMAGE,
        projection_dim=128,
        hidden_size=128,
    )
    return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


def test_softcap():
    model = _paligemma2()
    with pytest.raises(ValueError, match=r"attn_logit_softcapping=50.0"):
        attach(model)
    model.set_attn_implementation({"text_config": "rotatek"})
    cache = _cache(visual_mask=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="softcap"):
        model(input_ids=torch.tensor([[1, 20, 21, 22]]), past_key_values=cache)


def test_attention_sinks(llava: Host):
    cache = _cache()
    cache.announce_visual(None, 3)
    handle, _ = cache.update(torch.randn(1, 2, 3, 32), torch.randn(1, 2, 3, 32), 0)
    with pytest.raises(ValueError, match="sinks"):
        rotatek_attention_forward(llava.plain, torch.randn(1, 4, 3, 32), handle, handle, None, s_aux=torch.zeros(4))


# --- calls ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_neither_attached_nor_switched(llava: Host, implementation):
    model = copy.deepcopy(llava.plain)
    model.set_attn_implementation(implementation)
    inputs = ways.one(llava.tiny)
    both = re.compile(r"attach\(model\).*attn_implementation=\{\"text_config\": \"rotatek\"\}.*visual_mask", re.DOTALL)
    for cache in (_cache(), _cache(visual_mask=visual_positions(inputs["input_ids"]))):
        with pytest.raises(RuntimeError, match=both):
            ways.generate(model, inputs, cache)
        with pytest.raises(RuntimeError, match=both):
            model(**inputs, past_key_values=cache)


def test_switched_but_not_told(llava: Host):
    model = copy.deepcopy(llava.plain)
    model.set_attn_implementation({"text_config": "rotatek"})
    with pytest.raises(RuntimeError, match="not told which positions are visual"):
        ways.generate(model, ways.one(llava.tiny), _cache())


@pytest.mark.parametrize("how", ["attach", "switch"])
def test_output_attentions(llava: Host, how):
    inputs = ways.one(llava.tiny)
    model = copy.deepcopy(llava.plain)
    model.set_attn_implementation("eager")  # under sdpa transformers refuses by itself
    if how == "attach":
        attach(model)
    else:
        model.set_attn_implementation({"text_config": "rotatek"})
    mask = visual_positions(inputs["input_ids"])
    with pytest.raises(ValueError, match="output_attentions"):
        ways.generate(model, inputs, _cache(visual_mask=mask), output_attentions=True)
    with pytest.raises(ValueError, match="output_attentions"):
        model(**inputs, past_key_values=_cache(visual_mask=mask), output_attentions=True)


def test_a_cache_with_another_prompt(llava: Host):
    cache = _cache()
    ways.generate(llava.attached, ways.one(llava.tiny), cache)
    short = llava.tiny.inputs(llava.tiny.prompt(40))
    long = llava.tiny.inputs(llava.tiny.prompt(41, images=(0, 1, 0, 1)))
    for other in (ways.one(llava.tiny), short, long):
        with pytest.raises(ValueError, match=r"already holds.*cache.reset\(\)"):
            ways.generate(llava.attached, other, cache)
    with pytest.raises(ValueError, match=r"already holds.*cache.reset\(\)"):
        llava.attached(**ways.one(llava.tiny), past_key_values=cache)
    cache.reset()
    got = ways.generate(llava.attached, long, cache)
    expected = ways.generate(llava.attached, long, _cache())
    assert torch.equal(torch.stack(got.logits), torch.stack(expected.logits))


def test_a_batch_that_changes_size(llava: Host):
    cache = _cache()
    llava.attached(**ways.padded(llava.tiny), past_key_values=cache)
    with pytest.raises(ValueError, match="rows"):
        llava.attached(torch.tensor([[20]]), past_key_values=cache)
    cache.reset()
    llava.attached(**ways.one(llava.tiny), past_key_values=cache)


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([[True, False]], TypeError, "bool tensor"),
        (torch.zeros(1, 4), TypeError, "torch.bool, got torch.float32"),
        (torch.zeros(1, 4, dtype=torch.long), TypeError, "torch.bool, got torch.int64"),
        (torch.zeros(4, dtype=torch.bool), ValueError, r"\[rows, positions\], got \[4\]"),
        (torch.zeros(1, 2, 4, dtype=torch.bool), ValueError, "positions"),
    ],
)
def test_a_visual_mask_of_the_wrong_kind(mask, error, message):
    with pytest.raises(error, match=message):
        _cache(visual_mask=mask)


def test_a_visual_mask_of_the_wrong_shape(llava: Host):
    inputs = ways.padded(llava.tiny)
    visual = visual_positions(inputs["input_ids"])
    with pytest.raises(ValueError, match="visual_mask has 3 rows, the batch has 2"):
        ways.generate(llava.attached, inputs, _cache(visual_mask=visual[:1].expand(3, -1)))
    too_long = torch.cat([visual, torch.ones_like(visual)], 1)
    with pytest.raises(ValueError, match="length of the prompt"):
        ways.generate(llava.attached, inputs, _cache(visual_mask=too_long))
    # Behind a mask that is too short the model's own word holds.
    short = ways.generate(llava.attached, inputs, _cache(visual_mask=visual[:, :30]))
    whole = ways.generate(llava.attached, inputs, _cache())
    assert torch.equal(torch.stack(short.logits), torch.stack(whole.logits))


def test_embeddings_without_a_mask(llava: Host):
    embeds = torch.randn(1, 70, 128)
    with pytest.raises(ValueError, match=r"inputs_embeds.*visual_mask.*\[rows, 70\]"):
        llava.attached.generate(inputs_embeds=embeds, past_key_values=_cache(), max_new_tokens=2)


def test_nan_in_the_keys(llava: Host):
    inputs = ways.one(llava.tiny)
    inputs["pixel_values"] = inputs["pixel_values"].clone()
    inputs["pixel_values"][0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer 0 hold NaN"):
        ways.generate(llava.attached, inputs, _cache())
    got = ways.generate(llava.attached, inputs, _cache(sparsity=0))
    expected = ways.generate(llava.plain, inputs, DynamicCache())
    assert torch.equal(torch.stack(got.logits).isnan(), torch.stack(expected.logits).isnan())


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 24, "solver": "eigh", "basis": "pca"},
        {"rank": 24, "basis": "pca"},
        {"sparsity": 0.25, "basis": "pca"},
        {"energy": 1.0, "basis": "pca"},
    ],
)
def test_fewer_visual_tokens_than_coefficients(llava: Host, options):
    """An image cut to 10 of its tokens has Keys of rank 9 after centring: exact, or kept dense."""
    inputs = ways.one(llava.tiny)
    mask = visual_positions(inputs["input_ids"])
    mask &= mask.cumsum(1) <= 10
    got = ways.generate(
        llava.attached, inputs, RotateKCache.for_study(**options, always_compress=True, visual_mask=mask)
    )
    expected = ways.generate(llava.plain, inputs, DynamicCache())
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), atol=5e-4, rtol=1e-4)
    kept = RotateKCache.for_study(**options, visual_mask=mask)
    ways.generate(llava.attached, inputs, kept)
    assert not kept.report().layers[0].segments
    assert "stayed dense" in str(kept.report())


def test_training(llava: Host):
    model = copy.deepcopy(llava.attached).train()
    with torch.enable_grad(), pytest.raises(ValueError, match="inference"):
        model(**ways.one(llava.tiny), past_key_values=_cache())
    assert model.config.text_config._attn_implementation == "sdpa"


def test_offloading_the_cache(llava: Host):
    cache = _cache()
    llava.attached(**ways.one(llava.tiny), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="DynamicCache"):
        cache.offload(0)
    with pytest.raises(ValueError, match="cache_implementation"):
        ways.generate(llava.attached, ways.one(llava.tiny), _cache(), cache_implementation="offloaded")


def test_continuous_batching(llava: Host):
    model = copy.deepcopy(llava.attached)
    prompts = [words(6, 1), words(4, 2)]
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch(inputs=prompts, past_key_values=_cache())
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate(torch.tensor(prompts[:1]), past_key_values=_cache(), cache_implementation="paged")


def test_a_static_use_of_the_handle(llava: Host):
    """Whatever else touches the Keys of a layer says how to switch."""
    cache = _cache()
    cache.announce_visual(None, 3)
    handle, _ = cache.update(torch.randn(1, 2, 3, 32), torch.randn(1, 2, 3, 32), 0)
    for use in (lambda: handle.shape, lambda: torch.matmul(torch.randn(3, 3), handle), lambda: handle.transpose(1, 2)):
        with pytest.raises(RuntimeError, match="attach"):
            use()


PEFT_WITH_A_CACHE = {"num_virtual_tokens": 5, "token_dim": 128, "num_layers": 3, "num_attention_heads": 4}


def test_a_prefix_that_is_a_cache_of_its_own(llava: Host):
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_transformer_submodules=1, **PEFT_WITH_A_CACHE)
    model = peft.get_peft_model(copy.deepcopy(llava.plain), config)
    with pytest.raises(ValueError, match=r"PREFIX_TUNING, which puts a cache with its learnt prefix.*LoRA"):
        attach(model)
    assert not hasattr(model.get_base_model().model, "_rotatek")


def test_a_prefix_that_came_after_attach(llava: Host):
    model = attach(copy.deepcopy(llava.plain))
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_transformer_submodules=1, **PEFT_WITH_A_CACHE)
    wrapped, inputs = peft.get_peft_model(model, config), ways.one(llava.tiny)
    cache = _cache()
    with pytest.raises(ValueError, match=r"PREFIX_TUNING, which puts a cache with its learnt prefix.*LoRA"):
        ways.generate(wrapped, inputs, cache)
    assert cache.get_seq_length() == 0
    with wrapped.disable_adapter():
        ways.generate(wrapped, inputs, cache)
    assert cache.get_seq_length()
    ways.generate(model, inputs, _cache())  # the model itself has no prefix


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("with_mask", [True, False])
def test_the_text_model_called_directly(family, with_mask):
    host = build_host(family)
    inputs = ways.padded(host.tiny)
    model, visual = host.attached, visual_positions(inputs["input_ids"])
    cache = _cache(visual_mask=visual if with_mask else None)
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"], "past_key_values": cache}
    with pytest.raises(ValueError, match="was called with a RotateKCache: call the attached model itself"):
        model.get_decoder()(**given)
    assert not cache.get_seq_length()
    if with_mask:  # as the error says
        assert model(**given).logits.isfinite().all()
        assert cache.report().layers[0].segments
    dense = DynamicCache(config=model.config.get_text_config())
    assert model.get_decoder()(**given | {"past_key_values": dense}).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("family", ["llava", "llava_next", "idefics3", "qwen2_5_vl", "qwen3_vl"])
def test_images_sent_again_in_a_second_turn(family):
    host = build_host(family)
    tiny, cache = host.tiny, _cache()
    inputs = tiny.inputs(tiny.prompt(1, images=(0,)), tiny.prompt(2, images=(0,), text=3))
    first = ways.generate(host.attached, inputs, cache)
    second = ways.follow_up(tiny, inputs, first.sequences, words(5, 3))
    again = {name: value for name, value in inputs.items() if name not in second}
    kept = cache.get_seq_length()
    with pytest.raises(
        ValueError, match=rf"images or videos.*{kept} tokens in the cache have 0 placeholders.*Leave it"
    ):
        ways.generate(host.attached, second | again, cache)
    new = {name: value[:, kept:] if name != "attention_mask" else value for name, value in second.items()}
    with pytest.raises(
        ValueError, match=rf"images or videos.*{kept} tokens in the cache have 0 placeholders.*Leave it"
    ):
        host.attached(**new | again, past_key_values=cache)
    assert cache.get_seq_length() == kept
    assert torch.stack(ways.generate(host.attached, second, cache).logits).isfinite().all()


def test_old_images_sent_beside_a_new_one(llava: Host):
    tiny, cache = llava.tiny, _cache()
    prompt, more = tiny.prompt(1, images=(0,)), tiny.prompt(5, images=(0,), text=3)
    first = ways.generate(llava.attached, tiny.inputs(prompt), cache)
    second = ways.follow_up(tiny, tiny.inputs(prompt), first.sequences, more.ids)
    new, both = ({"pixel_values": torch.cat(images)} for images in (more.images, prompt.images + more.images))
    wanted = int(visual_positions(torch.tensor(more.ids)).sum())
    with pytest.raises(ValueError, match=rf"images of {2 * wanted} tokens.*have {wanted} placeholders"):
        ways.generate(llava.attached, second | both, cache)
    assert torch.stack(ways.generate(llava.attached, second | new, cache).logits).isfinite().all()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": "fastv:0.5"}, "tokens=FastV"),
        ({"sparsity": None, "energy": 0.9}, "energy=0.9"),
        ({"sparsity": None, "budget": "0.9x"}, "budget='0.9x'"),
        ({"key_bits": "auto"}, "key_bits='auto'"),
    ],
)
def test_heads_divided_over_processes(llava: Host, options, named):
    model = copy.deepcopy(llava.plain)
    model._tp_size = 2  # as `from_pretrained(tp_plan="auto")` does; the test below starts real processes
    with pytest.raises(ValueError, match=f"{named}.* cannot be used with tensor parallelism"):
        ways.generate(attach(model), ways.padded(llava.tiny), _cache(**options))
    assert model.config.text_config._attn_implementation == "sdpa"


RANKS = """
import json, os, sys, torch
from rotatek_cache import RotateKCache, attach
from rotatek_cache.hf.chat import READER
from transformers import AutoModelForImageTextToText

plan = {"tp_plan": "auto"} if "RANK" in os.environ else {}
model = attach(AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32, **plan).eval())
torch.manual_seed(0)
inputs = {"input_ids": torch.tensor([[2] + [4] * 324 + [20, 21, 22]]), "pixel_values": torch.rand(1, 3, 144, 144)}
found = []
for tokens in (None, "divprune:0.5", "vl_cache:0.5"):
    try:
        cache = RotateKCache(sparsity=0.75, basis="pca", tokens=tokens)
        with torch.no_grad():
            found.append(model(**inputs, past_key_values=cache).logits[0, -1].tolist())
            found.append(model(input_ids=torch.tensor([[20]]), past_key_values=cache).logits[0, -1].tolist())
    except ValueError as error:
        found.append(str(error))
if os.environ.get("RANK", "0") == "0":
    print("FOUND" + json.dumps(found))
"""


def test_two_processes_answer_as_one(tmp_path, capsys):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    runpy.run_path(str(script))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (capsys.readouterr().out + done.stdout).splitlines() if line.startswith("FOUND")]
    one, two = (json.loads(line.removeprefix("FOUND")) for line in lines)
    assert "tokens=VLCache" in two[4] and "2 processes" in two[4]
    for got, wanted in zip(two[:4], one[:4], strict=True):
        torch.testing.assert_close(torch.tensor(got), torch.tensor(wanted), atol=1e-3, rtol=1e-3)
