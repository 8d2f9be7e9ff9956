"""Budgets: what the planner chooses fits, within one per cent, whatever is open, and what cannot fit is refused."""

import copy
from pathlib import Path

import pytest
import torch
import ways
from hosts import Host, build_host
from tiny_parts import visual_positions

from rotatek_cache import RotateKCache
from rotatek_cache.cache.budget import Budget
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration
from rotatek_cache.codecs.fingerprint import fingerprint


@pytest.fixture(scope="module")
def basis(tmp_path_factory) -> Path:
    host = build_host("llava")
    state = Calibration(fingerprint(host.attached), "llava")
    calibrate(host.attached, (host.tiny.inputs(host.tiny.prompt(seed)) for seed in range(4)), state)
    path = tmp_path_factory.mktemp("budget") / "basis.safetensors"
    state.write_basis(path)
    return path


def images(host: Host, *counts: int):
    return host.tiny.inputs(*(host.tiny.prompt(seed, images=(0,) * count) for seed, count in enumerate(counts)))


def filled(host: Host, inputs, **options) -> RotateKCache:
    cache = RotateKCache.for_study(**options)
    host.attached(**inputs, past_key_values=cache)
    return cache


OPEN = [
    {"budget": "0.4x", "sparsity": 0, "tokens": "vl_cache"},
    {"budget": "0.4x", "sparsity": 0.75, "tokens": "vl_cache"},
    {"budget": "0.5x", "tokens": "vl_cache:uniform=0.8"},
    {"budget": "0.5x", "sparsity": 0.5, "tokens": "fastv:layer=1"},
    {"budget": "0.15x", "sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 8, "tokens": "vl_cache"},
    {"budget": "0.45x", "basis": "spark", "sparsity": 0.5, "tokens": "vl_cache"},
]
RANKS_ONLY = [
    {"budget": "0.8x"},
    {"budget": "0.7x", "basis": "think"},
    {"budget": "0.7x", "key_bits": 8},
    {"budget": "0.85x", "tokens": "vl_cache"},
    {"budget": "0.5x", "tokens": "vl_cache:0.55"},
    {"budget": "0.5x", "tokens": "divprune:0.6"},
    {"budget": "0.5x", "tokens": "visionzip:0.55"},
]
BEFORE_THE_PROMPT = [
    {"budget": "0.4x", "sparsity": 0, "tokens": "visionzip"},
    {"budget": "0.5x", "sparsity": 0.5, "tokens": "divprune"},
    {"budget": "0.45x", "tokens": "visionzip:contextual=0.1"},
    {"budget": "0.85x", "tokens": "divprune"},
    {"budget": "0.14x", "sparsity": 0.5, "key_bits": 4, "value_sparsity": 0.5, "value_bits": 8, "tokens": "visionzip"},
]


@pytest.mark.parametrize("counts", [(8,), (6, 8), (3, 8)])
@pytest.mark.parametrize("options", [*OPEN, *RANKS_ONLY, *BEFORE_THE_PROMPT], ids=str)
def test_the_cache_has_the_bytes_of_its_budget(llava: Host, options, counts):
    inputs = images(llava, *counts)
    dense = filled(llava, inputs, sparsity=0).report().dense_bytes
    cache = filled(llava, inputs, **options)
    assert cache.nbytes() == pytest.approx(float(options["budget"][:-1]) * dense, rel=0.01)
    plan = cache.coordinator.planner.made
    assert plan.planned_bytes == pytest.approx(cache.nbytes(), rel=0.005)
    assert f"budget {options['budget']} = " in str(cache.report())


FAMILIES_OF_BUDGETS = ["qwen2_5_vl", "llava_next", "idefics3", "mistral3", "internvl", "qwen3_vl", "paligemma"]


@pytest.mark.parametrize("tokens", [None, "vl_cache", "visionzip", "look_m", "fastv:layer=1", "pyramid_drop"])
@pytest.mark.parametrize("family", FAMILIES_OF_BUDGETS)
def test_budgets_are_met_in_other_families(family, tokens):
    host = build_host(family)
    inputs = images(host, *((4,) if host.tiny.image_first else (4, 6)))
    dense = filled(host, inputs, sparsity=0).report().dense_bytes
    cache = filled(host, inputs, budget="0.8x", tokens=tokens)
    assert cache.nbytes() == pytest.approx(0.8 * dense, rel=0.01)


@pytest.mark.parametrize("tokens", ["vl_cache", "visionzip", "divprune", "aircache", "look_m"])
def test_budgets_on_the_reader(tokens):
    from evals.fidelity import load, make_batch
    from evals.reader.pages import ADDRESS_KINDS, CHOOSE_SEEDS

    reader = load(None)
    inputs = dict(make_batch(reader.processor, CHOOSE_SEEDS[:2], "hard", ADDRESS_KINDS).prompt)
    cache = RotateKCache(sparsity=0)
    reader.model(**inputs, past_key_values=cache)
    dense = cache.report().dense_bytes
    for share in (0.9, 0.7, 0.5, 0.35, 0.2):
        cache = RotateKCache(budget=f"{share}x", tokens=tokens)
        reader.model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
        assert cache.nbytes() == pytest.approx(share * dense, rel=0.003)


def test_a_prompt_without_images_needs_no_share(llava: Host):
    cache = RotateKCache(budget="0.5x", tokens="visionzip")
    inputs = llava.tiny.inputs(llava.tiny.prompt(4, images=(), text=12))
    assert ways.generate(llava.attached, inputs, cache).sequences.shape[1] == inputs["input_ids"].shape[1] + ways.NEW
    assert cache.coordinator.planner.made is None


def test_an_open_share_needs_the_prompt_as_ids(llava: Host):
    inputs = ways.one(llava.tiny)
    inputs["inputs_embeds"] = llava.attached.get_input_embeddings()(inputs.pop("input_ids"))
    with pytest.raises(RuntimeError, match=r"prompt is not known as ids when its images are encoded, so give a share"):
        ways.generate(llava.attached, inputs, RotateKCache(budget="0.5x", tokens="visionzip"))


def test_a_second_image_gets_a_share_of_what_is_left(llava: Host):
    """Through generate, where the method chooses before the language model."""
    prompt = llava.tiny.prompt(0, images=(0,) * 4)
    inputs, cache = llava.tiny.inputs(prompt), RotateKCache(budget=500, tokens="divprune")
    first = ways.generate(llava.attached, inputs, cache)
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(7))
    more = [*ways.words(3, 1), *ids * 4, *ways.words(4, 2)]
    second = ways.follow_up(llava.tiny, inputs, first.sequences, more) | llava.tiny.collate([[content] * 4])
    llava.attached.generate(**second, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert cache.nbytes() == pytest.approx(500 * 2 * 3 * 64 * 4, rel=0.01)


def test_what_ranks_leave_over_keeps_the_last_tokens_exact(llava: Host):
    inputs = images(llava, 8)
    cache = filled(llava, inputs, budget="0.8x")
    plan = cache.coordinator.planner.made
    exact = list(plan.last_dense.values())
    assert max(exact) > 0
    assert max(exact) - min(exact) <= 1
    plain = filled(llava, inputs, sparsity=0)
    visual = visual_positions(inputs["input_ids"])[0].nonzero().flatten().tolist()
    for layer, dense, spared in zip(cache.layers, plain.layers, exact, strict=True):
        kv = layer.kv
        positions = kv.text.token_positions()[0].tolist()
        assert [p for p in positions if p in set(visual)] == visual[-spared:]
        keys, values = kv.text.logical()
        # All are text to the dense cache too, so its columns are logical positions.
        stored = dense.kv.segments[0]
        order = stored.positions.tolist()
        for place, position in enumerate(positions):
            if position in order:
                torch.testing.assert_close(keys[0, :, place], stored.keys.data[:, order.index(position)])
                torch.testing.assert_close(values[0, :, place], stored.values.data[:, order.index(position)])
    assert f"the last {' or '.join(map(str, sorted(set(exact))))} of each row exact" in str(plan)


@pytest.mark.parametrize("options", [*RANKS_ONLY[:1], *BEFORE_THE_PROMPT[1:4], OPEN[2]], ids=str)
@pytest.mark.parametrize("settings", [{}, {"prefill_chunk_size": 70}, {"num_beams": 2}, {"num_return_sequences": 2}])
def test_budgets_hold_after_generate(llava: Host, options, settings):
    inputs = images(llava, 8, 6)
    cache = RotateKCache.for_study(**options)
    arguments = {"do_sample": "num_return_sequences" in settings, "max_new_tokens": 1} | settings
    llava.attached.generate(**inputs, past_key_values=cache, **arguments)
    token = cache.batch_size * 2 * 3 * 2 * 32 * 4
    dense = inputs["input_ids"].shape[1] * token
    assert cache.get_seq_length() == inputs["input_ids"].shape[1]
    assert cache.positions.expected is None
    rel = 0.02 if "prefill_chunk_size" in settings else 0.01  # text of later chunks grows in steps of its own
    assert cache.nbytes() == pytest.approx(float(options["budget"][:-1]) * dense, rel=rel)


def test_a_budget_in_bytes_is_for_all_beams(llava: Host):
    inputs = images(llava, 6)
    for settings in ({}, {"num_beams": 3}):
        cache = RotateKCache(budget="300KiB", sparsity=0.5, tokens="visionzip")
        llava.attached.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False, **settings)
        assert cache.nbytes() == pytest.approx(300 * 1024, rel=0.01)


def test_a_plan_says_how_far_it_stays_below(llava: Host):
    cache = filled(llava, images(llava, 4), budget="0.9x", tokens="divprune:0.5")
    assert " % below, the nearest that can be stored" in str(cache.report())
    assert cache.coordinator.planner.made.planned_bytes == pytest.approx(cache.nbytes(), rel=0.005)


def test_a_calibrated_basis_costs_the_budget_nothing(llava: Host, basis: Path):
    inputs = images(llava, 8)
    dense = filled(llava, inputs, sparsity=0).report().dense_bytes
    for options in ({}, {"sparsity": 0.75, "key_bits": "auto", "value_sparsity": 0.75, "value_bits": "auto"}):
        cache = filled(llava, inputs, basis=basis, budget="0.2x", tokens="vl_cache", **options)
        assert cache.nbytes() == pytest.approx(0.2 * dense, rel=0.01)


def test_budgets_in_bytes_and_in_tokens(llava: Host):
    inputs = images(llava, 6, 8)
    for budget, expected in (("300KiB", 300 * 1024), ("0.25 MiB", 2**18), (250, 250 * 2 * 3 * 2 * 64 * 4)):
        cache = filled(llava, inputs, budget=budget, tokens="vl_cache")
        assert cache.nbytes() == pytest.approx(expected, rel=0.01), budget


def test_channels_go_before_tokens(llava: Host):
    inputs = images(llava, 8)
    plans = {
        budget: filled(llava, inputs, budget=budget, tokens="vl_cache").coordinator.planner.made
        for budget in ("0.9x", "0.5x")
    }
    assert plans["0.9x"].keep == 1
    assert set(plans["0.9x"].ranks.values()) <= {16, 24, 32}
    assert plans["0.5x"].keep < 1
    assert set(plans["0.5x"].ranks.values()) == {8}


def test_ranks_differ_between_layers_where_they_have_to(llava: Host):
    inputs = images(llava, 8)
    cache = filled(llava, inputs, budget="0.78x")
    ranks = [layer.segments[0].stored_rank for layer in cache.report().layers]
    assert ranks == list(cache.coordinator.planner.made.ranks.values())
    assert len(set(ranks)) == 2
    assert ranks == sorted(ranks, reverse=True)


def test_a_budget_that_is_enough_keeps_everything(llava: Host):
    inputs = images(llava, 4)
    cache = filled(llava, inputs, sparsity=0, budget="2x", tokens="vl_cache")
    dense = filled(llava, inputs, sparsity=0)
    assert cache.coordinator.planner.made.keep == 1
    assert cache.nbytes() == pytest.approx(dense.nbytes(), rel=0.01)


def test_a_second_image_gets_what_is_left(llava: Host):
    inputs = ways.one(llava.tiny)
    cache = RotateKCache.for_study(sparsity=0, budget="160KiB", tokens="vl_cache", always_compress=True)
    ways.generate(llava.attached, inputs, cache)
    first = cache.coordinator.planner.made
    ids, content = llava.tiny.image(0, torch.Generator().manual_seed(77))
    new = llava.tiny.inputs(ways.Prompt([*ways.words(3, 1), *ids, *ways.words(4, 2)], [content]))
    del new["attention_mask"]
    assert first.keep < 1
    with pytest.raises(ValueError, match=r"budget='160KiB' is 160\.0 KiB for this prompt.*raise the budget"):
        llava.attached(**new, past_key_values=cache)


def test_a_copy_plans_for_itself(llava: Host):
    inputs = images(llava, 6)
    cache = RotateKCache(budget="0.5x", tokens="vl_cache", config=llava.attached.config)
    twin = copy.deepcopy(cache)
    llava.attached(**inputs, past_key_values=twin)
    assert cache.coordinator.planner.made is None
    assert twin.nbytes() == pytest.approx(filled(llava, inputs, budget="0.5x", tokens="vl_cache").nbytes())
    twin.reset()
    llava.attached(**images(llava, 8), past_key_values=twin)
    expected = filled(llava, images(llava, 8), budget="0.5x", tokens="vl_cache")
    assert twin.nbytes() == pytest.approx(expected.nbytes(), rel=1e-3)


@pytest.mark.parametrize("way", ["padded_batch", "beams", "second_turn_padded", "prompt_lookup", "all_image"])
def test_budgets_run_everywhere(way):
    host = build_host("qwen2_5_vl")
    for result in ways.WAYS[way](host.tiny, host.attached, lambda: RotateKCache(budget="0.9x", tokens="vl_cache")):
        assert result.isfinite().all()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "0.5"}, ValueError, r"budget must be such as '0.25x', '512MiB' or 2048 \(tokens\), got '0.5'"),
        ({"budget": "half"}, ValueError, "got 'half'"),
        ({"budget": 0.5}, TypeError, "got float"),
        ({"budget": True}, TypeError, "got bool"),
        ({"budget": "0x"}, ValueError, "budget must be positive"),
        ({"budget": -3}, ValueError, "budget must be positive"),
        ({"budget": "0.5x", "energy": 0.9}, ValueError, "budget and energy cannot both"),
        ({"budget": "0.5x", "sparsity": 0.5}, ValueError, "nothing left to choose"),
        ({"budget": "0.5x", "sparsity": 0.5, "tokens": "vl_cache:0.5"}, ValueError, "nothing left to choose"),
        ({"budget": "0.5x", "key_bits": "auto"}, ValueError, "key_bits='auto' does not have"),
        (
            {"sparsity": 0.5, "tokens": "visionzip"},
            ValueError,
            r"keep must be given where no budget is, as in VisionZi",
        ),
        (
            {"sparsity": 0.5, "tokens": "vl_cache"},
            ValueError,
            r"keep must be given where no budget is, as in VLCache\(",
        ),
    ],
)
def test_budgets_that_cannot_be(options, error, message):
    with pytest.raises(error, match=message):
        RotateKCache.for_study(**options)


@pytest.mark.parametrize(
    "options", [{"tokens": "vl_cache"}, {"tokens": "vl_cache", "sparsity": 0.5}, {}, {"tokens": "visionzip"}]
)
def test_a_budget_below_the_text(llava: Host, options):
    inputs = images(llava, 2)
    text = int((~visual_positions(inputs["input_ids"])).sum())
    with pytest.raises(
        ValueError, match=r"budget=3 is .* for this prompt, of which all but visual tokens takes .* raise"
    ):
        filled(llava, inputs, budget=3, **options)
    assert text > 3


def test_a_budget_below_the_values_says_that_tokens_may_go(llava: Host):
    with pytest.raises(ValueError, match=r'raise the budget, or leave open how .*tokens="divprune"'):
        filled(llava, images(llava, 4), budget="0.25x")
    assert filled(llava, images(llava, 4), budget="0.25x", tokens="divprune").nbytes()


def test_fastv_cannot_go_below_its_first_layers(llava: Host):
    with pytest.raises(ValueError, match="raise the budget"):
        filled(llava, images(llava, 4), sparsity=0, budget="0.5x", tokens="fastv")


def test_layers_with_a_stock_cache():
    host = build_host("gemma3")
    with pytest.raises(ValueError, match=r"a budget cannot be kept where layers \[.*\] have the stock cache layer"):
        filled(host, ways.one(host.tiny), budget="0.5x")


def test_budget_amounts():
    assert Budget("0.25x").bytes_of(1000, 10) == 250
    assert Budget("1.5KiB").bytes_of(1000, 10) == 1536
    assert Budget(7).bytes_of(1000, 10) == 70
