"""Prompts that every kind of server answers, dense SGLang first."""

import pytest
from serving import message, picture, video

WORDS = "the quick brown fox jumps over the lazy dog "
REQUESTS = {
    "a word": message("hello"),
    "long text": message(WORDS * 12),
    "image": message("what is in this image?", picture(1)),
    "wide image": message("describe the picture, please.", picture(2, 448, 140)),
    "image and long text": message(WORDS * 6, picture(2, 448, 140)),
    "small image": message("and this one?", picture(3, 56, 56)),
    "two images": message("what changed?", picture(4), picture(5, 168, 252)),
    "another question": message("is there a red circle on a blue square?", picture(1)),  # on the image of "image"
    "large image": message("what is this?", picture(9, 784, 784)),  # for which text dense has too few visual rows
    "video": message("what happens?", video(1)),
    "video and image": message("is this from it?", video(2, frames=4, seconds=2), picture(8, 112, 112)),
    "second turn": [
        *message("what is in this image?", picture(6)),
        {"role": "assistant", "content": [{"type": "text", "text": "a red circle"}]},
        *message("and in this image?", picture(7, 140, 140)),
    ],
}
TOKENS = 16  # of each answer


def check_mixed_batches(server, dense, flushed):
    """Check the answers to all requests, sent twice at once, with or without what is cached."""
    if flushed:
        server.flush()
    names = [*REQUESTS, *reversed(REQUESTS)]
    answers = server.ask_all([((REQUESTS[name], TOKENS), {}) for name in names])
    for name, answer in zip(names, answers, strict=True):
        assert answer.logprobs == pytest.approx(dense.answers[name].logprobs, abs=5e-5), name
