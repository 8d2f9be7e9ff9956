"""The reader that ships with the package, served with all tokens coded: what `evals.bench.served_fidelity` measures."""

import pytest
import torch

pytestmark = [pytest.mark.sglang, pytest.mark.slow]


def test_second_questions_get_the_answers_of_the_cache_in_transformers(tmp_path):
    """They find the page in the prefix cache, as codes, and nothing of it in a ring."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from evals.bench.served_fidelity import READER, Asked, ask_cache, ask_server, compare_replies, server
    from evals.reader.calibrate import conversations
    from rotatek_cache import attach
    from rotatek_cache.calibration.gather import calibrate
    from rotatek_cache.calibration.moments import Calibration
    from rotatek_cache.codecs.fingerprint import fingerprint

    processor = AutoProcessor.from_pretrained(READER)
    model = attach(AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32).eval())
    basis = tmp_path / "reader.safetensors"
    state = Calibration(fingerprint(model), model.config.model_type)
    calibrate(model, conversations(processor, 6, ["easy", "hard"]), state, text=True)
    state.write_basis(basis)
    pages = [Asked.draw(index) for index in range(3)]
    with server("4", basis, READER, own=True) as host:
        served = [ask_server(host, asked, len(processor.tokenizer)) for asked in pages]
        assert host.token_bytes() == {"row": 4 * 2 * 2 * 128 // 2, "dense": 4 * 2 * 2 * 128 * 4}
    options = {"basis": basis, "text": "coded", "bits": 4}
    cached = [ask_cache(model, processor, *each, **options) for each in zip(pages, served, strict=True)]
    assert all(reply.cached > 324 for replies in served for reply in replies[1:])  # all tokens of the image
    found = compare_replies(cached, served)
    assert found["questions"] >= 6
    assert found["same_answer"] == 1
    assert found["most"] < 1e-3
