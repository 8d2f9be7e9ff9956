"""What errors in a cache cost the answers: the divergence itself, all kinds of families, and what follows from it."""

import copy

import pytest
import torch
from hosts import build_host
from tiny_more import EVERY
from transformers import DynamicCache

from rotatek_cache import RotateKCache
from rotatek_cache.calibration import sensitivity
from rotatek_cache.calibration.gather import calibrate
from rotatek_cache.calibration.moments import Calibration, Moments
from rotatek_cache.calibration.sensitivity import answer_sensitivity, text_sensitivity
from rotatek_cache.codecs.basis_file import load_basis
from rotatek_cache.codecs.fingerprint import fingerprint
from rotatek_cache.codecs.shared_basis import HeadBudget
from rotatek_cache.core.quantization import CodeLayout
from rotatek_cache.hf.calls import cache_argument
from rotatek_cache.options import Allocation

LAYERS = (0, 1)


def bits_of(code: CodeLayout) -> int:
    return sum(bits * channels for bits, channels in code.blocks)


def visual_of(host, inputs) -> torch.Tensor:
    cache = RotateKCache(sparsity=0)
    with torch.no_grad():
        host.attached(**inputs, **cache_argument(host.attached, cache), use_cache=True)
    return cache.positions.visual(0, cache.positions.end)[0].cpu()


@pytest.mark.parametrize("which", ["key", "value"])
def test_it_is_the_divergence_of_what_is_said_next(monkeypatch, which):
    """Small errors of all visual states of a layer: their mean divergence is half the trace, times their variance."""
    monkeypatch.setattr(sensitivity, "TEMPERATURE", 1.0)
    monkeypatch.setattr(sensitivity, "CANDIDATES", 10**6)
    monkeypatch.setattr(sensitivity, "SAMPLES", 200)
    monkeypatch.setattr(sensitivity, "ANSWER_TOKENS", 1)
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(3))
    visual = visual_of(host, inputs)
    with torch.no_grad():
        found = answer_sensitivity(host.attached, inputs, visual, LAYERS, seed=0)[1, which]
    end = int(visual.nonzero().max()) + 1
    begin = {name: inputs[name][:, :end] for name in ("input_ids", "attention_mask")}
    cache = DynamicCache()
    generator = torch.Generator().manual_seed(0)
    size, divergences = 0.02, []
    with torch.no_grad():
        host.plain(**inputs | begin, past_key_values=cache)
        dense = None
        for trial in range(60):
            changed = copy.deepcopy(cache)
            states = getattr(changed.layers[1], f"{which}s")
            if trial:
                error = size * torch.randn(states[:, :, visual[:end]].shape, generator=generator)
                states[:, :, visual[:end]] += error
            behind = host.plain(input_ids=inputs["input_ids"][:, end:], past_key_values=changed)
            logits = behind.logits[0, -1].double().log_softmax(-1)
            dense = logits if dense is None else dense
            divergences.append(float((dense.exp() * (dense - logits)).sum()))
    expected = size**2 * found.diagonal(dim1=-2, dim2=-1).sum() / 2
    assert sum(divergences[1:]) / 59 == pytest.approx(float(expected), rel=0.3)


KINDS = ["llava", "qwen2_vl", "qwen3_vl", "gemma3", "gemma3n", "ovis2", "minicpmv4_7", "qwen2_5_omni_thinker"]


@pytest.mark.parametrize("name", [name for name in KINDS if name in EVERY])  # not all are in every transformers
def test_every_kind_of_family_reads_on_behind_the_image(name, monkeypatch):
    """What is differentiated are the predictions of the whole prompt, though the image is read first, alone."""
    host = build_host(name)
    inputs = host.tiny.inputs(host.tiny.prompt(2))
    visual = visual_of(host, inputs)
    seen = []
    topk = torch.Tensor.topk

    def kept(logits, *args, **kwargs):
        seen.append(logits.detach())
        return topk(logits, *args, **kwargs)

    monkeypatch.setattr(sensitivity, "ANSWER_TOKENS", 2)
    monkeypatch.setattr(torch.Tensor, "topk", kept)
    state = calibrate(host.attached, [inputs], Calibration(fingerprint(host.attached), name))
    monkeypatch.undo()
    answered = host.plain.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert len(answered[0]) == visual.shape[0] + 2
    assert {(layer, which) for layer, which, _ in state.sensitivities} == state.moments.keys()
    assert all(matrix.isfinite().all() and matrix.any() for matrix in state.sensitivities.values())
    assert torch.equal(seen[-1].argmax(-1), answered[0, -2:])


def test_the_model_is_left_as_it_was():
    host = build_host("llava")
    model = copy.deepcopy(host.attached)
    model.requires_grad_(True)
    model.get_input_embeddings().weight.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    with torch.inference_mode():  # a caller's own
        calibrate(model, [host.tiny.inputs(host.tiny.prompt(0))], Calibration(fingerprint(model), "llava"))
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"do_sample": True, "num_return_sequences": 2, "num_beams": 2, "max_length": 9},
        {"use_cache": False, "stop_strings": ["a"], "prompt_lookup_num_tokens": 2},
        {"cache_implementation": "static", "guidance_scale": 1.5},
    ],
)
def test_the_answer_is_one_and_greedy_whatever_the_generation_config_says(settings, monkeypatch):
    monkeypatch.setattr(sensitivity, "ANSWER_TOKENS", 3)
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(0))
    model = copy.deepcopy(host.attached)
    expected = calibrate(model, [inputs], Calibration(fingerprint(model), "llava")).sensitivities
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    found = calibrate(model, [inputs], Calibration(fingerprint(model), "llava")).sensitivities
    assert all(torch.equal(found[at], matrix) for at, matrix in expected.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_measures_what_float32_does(dtype, monkeypatch):
    """Also where errors cost a ten-thousandth of the others': no gradient underflows."""
    monkeypatch.setattr(sensitivity, "ANSWER_TOKENS", 3)
    host = build_host("llava")
    model = copy.deepcopy(host.attached)
    model.model.language_model.layers[1].self_attn.o_proj.weight.data *= 0.01
    traces = {}
    for each in (torch.float32, dtype):
        model.to(each)
        inputs = {
            name: value.to(each) if value.is_floating_point() else value
            for name, value in host.tiny.inputs(host.tiny.prompt(3)).items()
        }
        found = calibrate(model, [inputs], Calibration(fingerprint(model), "llava")).sensitivities
        traces[each] = {at: matrix.diagonal(dim1=-2, dim2=-1).sum() for at, matrix in found.items()}
    assert traces[torch.float32][1, "key", "image"] < 1e-3 * traces[torch.float32][0, "key", "image"]
    for at, trace in traces[dtype].items():
        torch.testing.assert_close(trace, traces[torch.float32][at], rtol=0.2, atol=0)


def test_an_answer_that_ends_at_once_is_the_place_that_counts():
    """Its end is predicted from the image, too: one prediction, as of an answer of one token."""
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(0))
    model = copy.deepcopy(host.attached)
    with torch.no_grad():
        first = host.plain.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1].item()
    model.generation_config.eos_token_id = [3, first]
    state = calibrate(model, [inputs], Calibration(fingerprint(model), "llava"))
    assert all(matrix.any() for matrix in state.sensitivities.values())


def one_row(host, **changed):
    return dict(host.tiny.inputs(host.tiny.prompt(0))) | changed


def padded(host):
    both = host.tiny.inputs(host.tiny.prompt(0), host.tiny.prompt(1, text=3))
    return {name: value[1:] for name, value in both.items()}


def text_of(tokens):
    return {"input_ids": torch.arange(10, 10 + tokens)[None]}


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        (lambda host: host.tiny.inputs(host.tiny.prompt(0), host.tiny.prompt(1)), False, "one row each, got .* 2 rows"),
        (padded, False, "no padding, got an attention_mask that hides 6 positions"),
        (lambda host: one_row(host, position_ids=torch.arange(90)[None]), False, "must not bring position_ids"),
        (lambda host: one_row(host, input_ids=None), False, "prompts need input_ids"),
        (lambda host: text_of(20), False, "no visual token: give prompts with an image, or text=True"),
        (lambda host: text_of(5), True, "more than 4 tokens before its last quarter, got 5 tokens"),
        (lambda host: text_of(2), True, "got 2 tokens in all: give passages as long as"),
    ],
)
def test_prompts_that_cannot_be_weighed_are_refused(prompt, text, words):
    host = build_host("llava")
    with pytest.raises(ValueError, match=words):
        calibrate(host.attached, [prompt(host)], Calibration(fingerprint(host.attached), "llava"), text=text)


def test_models_that_cannot_be_calibrated_are_refused():
    host = build_host("llava")
    inputs, state = host.tiny.inputs(host.tiny.prompt(0)), Calibration(fingerprint(host.attached), "llava")
    with pytest.raises(ValueError, match=r"training mode, .* call model.eval\(\) first"):
        calibrate(copy.deepcopy(host.attached).train(), [inputs], state)
    model = copy.deepcopy(host.attached)
    model.lm_head.weight.data[7] = torch.nan
    with pytest.raises(ValueError, match=r"logits \(torch.float32\) are not finite"):
        calibrate(model, [inputs], state)
    model.lm_head.to("meta")
    with pytest.raises(ValueError, match=r"lm_head.weight is offloaded"):
        calibrate(model, [inputs], state, sensitivity=False)
    with torch.inference_mode():
        model.lm_head = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"lm_head.weight was made within torch.inference_mode\(\)"):
        calibrate(model, [inputs], state)


def test_the_mean_is_over_prompts_that_were_weighed(tmp_path):
    """Moments alone of many images, and sensitivities of a few; never of one kind of prompt and not of the other."""
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(0))
    state = calibrate(host.attached, [inputs], Calibration(fingerprint(host.attached), "llava"))
    alone = state.sensitivity(0, "key", ("image",))
    calibrate(host.attached, [inputs] * 2, state, sensitivity=False)
    state.save(tmp_path / "state")
    state = Calibration.load(tmp_path / "state", fingerprint(host.attached))
    assert state.images == 3 and torch.equal(state.sensitivity(0, "key", ("image",)), alone)
    calibrate(host.attached, [text_of(30)], state, text=True, sensitivity=False)
    with pytest.raises(ValueError, match="not gathered of any prompt with text: calibrate with sensitivity=True"):
        state.write_basis(tmp_path / "b.safetensors")
    state.write_basis(tmp_path / "b.safetensors", method="pca", value_method="pca")


def test_an_image_without_a_question_is_refused():
    host = build_host("llava")
    inputs = host.tiny.inputs(host.tiny.prompt(0))
    visual = visual_of(host, inputs)
    with pytest.raises(ValueError, match="a question has to follow it"):
        answer_sensitivity(host.attached, inputs, torch.ones_like(visual), LAYERS, seed=0)


def test_directions_that_answers_need_come_first():
    scatter = torch.diag(torch.tensor([6.0, 4.0, 1.0, *[0.25] * 5], dtype=torch.float64))[None]
    moments = Moments(scatter, 1, torch.randn(1, 50, 8))
    price = torch.diag(torch.tensor([0.0, 0.0, 40.0, *[0.0] * 5], dtype=torch.float64))[None]
    found = moments.basis("fisher", sensitivity=price)
    assert found["encoder"][0, :, 0].abs().argmax() == 2 and found["encoder"][0, :, 1].abs().argmax() == 0
    torch.testing.assert_close(found["decoder"].mT @ found["encoder"], torch.eye(8)[None], atol=1e-5, rtol=0)
    assert found["gain"].tolist() == [[5.0] * 8]  # the price of a unit of error, averaged over directions
    plain = moments.basis("pca", sensitivity=price)
    assert plain["encoder"][0, :, 0].abs().argmax() == 0 and plain["gain"][0, :4].tolist() == [0, 0, 40, 0]


def test_layers_and_heads_that_answers_need_get_the_bits(tmp_path):
    host = build_host("llava")
    state = calibrate(
        host.attached, [host.tiny.inputs(host.tiny.prompt(0))], Calibration(fingerprint(host.attached), "x")
    )
    heads, width, _ = state.sensitivities[0, "key", "image"].shape
    for layer, which, kind in list(state.sensitivities):
        matrix = torch.eye(width, dtype=torch.float64).repeat(heads, 1, 1)
        matrix[1] *= 1e4 if (layer, which) == (1, "key") else 1
        state.sensitivities[layer, which, kind] = matrix
    state.write_basis(tmp_path / "b.safetensors")
    file = load_basis(tmp_path / "b.safetensors")
    dealt = {}
    for layer in LAYERS:
        code = file.code(layer, "key", "auto", HeadBudget(bits=128), Allocation("heads"))
        dealt |= {(layer, head): bits_of(part) for head, part in enumerate(code.parts)}
    assert max(dealt, key=dealt.get) == (1, 1) and min(dealt.values()) >= 32
    by_layer = [bits_of(file.code(n, "key", "auto", HeadBudget(bits=64), Allocation("layers"))) for n in LAYERS]
    assert by_layer[1] > by_layer[0]


def test_a_passage_weighs_what_predicts_its_end(tmp_path):
    host = build_host("llava")
    generator = torch.Generator().manual_seed(0)
    passages = [{"input_ids": torch.randint(10, 40, (1, 24), generator=generator)} for _ in range(2)]
    state = calibrate(host.attached, passages, Calibration(fingerprint(host.attached), "llava"), text=True)
    with torch.no_grad():
        alone = [text_sensitivity(host.attached, p["input_ids"], 4, LAYERS, n) for n, p in enumerate(passages)]
    torch.testing.assert_close(state.sensitivity(1, "key", ("text",)), (alone[0][1, "key"] + alone[1][1, "key"]) / 2)
    state.save(tmp_path / "state")
    again = Calibration.load(tmp_path / "state", fingerprint(host.attached))
    assert all(torch.equal(again.sensitivities[at], found) for at, found in state.sensitivities.items())
    state.write_basis(tmp_path / "b.safetensors")
    assert load_basis(tmp_path / "b.safetensors").state(1, "token_key").decoder is not None


def test_what_was_not_gathered_is_named(tmp_path):
    host = build_host("llava")
    state = Calibration(fingerprint(host.attached), "llava")
    calibrate(host.attached, [host.tiny.inputs(host.tiny.prompt(0))], state, sensitivity=False)
    with pytest.raises(ValueError, match=r"method 'fisher' weighs by the sensitivity .* choose 'pca'"):
        state.write_basis(tmp_path / "b.safetensors", method="fisher")
    state.write_basis(tmp_path / "b.safetensors")  # pca
    assert "layers.0.key.decoder" not in load_basis(tmp_path / "b.safetensors").path
