"""What is compared of a served model, worked by hand; servers are asked in tests/integrations/sglang."""

import math

import numpy as np
import pytest
import torch

from evals.bench import served_fidelity as served
from evals.bench.served_fidelity import Asked, Read, Reply
from evals.bench.serving_capacity import two_widths
from evals.reader.pages import ADDRESS_KINDS


def reply(ids, *rows):
    return Reply(ids, torch.tensor(rows).log(), 0)


def test_answers_are_compared_as_far_as_they_are_the_same():
    dense = reply((0, 1, 1), [0.5, 0.5], [0.25, 0.75], [0.1, 0.9])
    other = reply((0, 0), [0.5, 0.5], [0.75, 0.25])
    kl, count = served.agreement(dense, other)
    assert count == 2  # the last token of the dense answer stands behind another one
    assert kl.tolist() == pytest.approx([0, 0.25 * math.log(1 / 3) + 0.75 * math.log(3)])
    found = served.compare_replies([[dense, dense, None]], [[dense, other, dense]])
    assert found == {"questions": 1, "kl": pytest.approx(kl.mean().item()), "most": found["most"], "same_answer": 0}
    assert found["most"] == pytest.approx(math.log(3))


def test_a_token_that_one_excludes_takes_no_part():
    assert served.agreement(reply((0,), [1.0, 0.0]), reply((0,), [0.5, 0.5]))[0].tolist() == pytest.approx(
        [math.log(2)]
    )


def test_kl_over_the_tokens_that_both_name():
    p, q = ({token: math.log(x) for token, x in each} for each in ([(1, 0.5), (2, 0.3)], [(1, 0.4), (3, 0.2)]))
    assert served.lumped_kl(p, q) == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6))
    assert served.lumped_kl(p, p) == pytest.approx(0)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        p, q = torch.randn(2, 30, generator=generator).log_softmax(-1)
        named = [{int(token): float(part[token]) for token in part.topk(5).indices} for part in (p, q)]
        assert -1e-6 < served.lumped_kl(*named) <= float((p.exp() * (p - q)).sum()) + 1e-6


def test_reads_are_compared_from_a_position_on():
    dense = Read(torch.tensor([-5.0, -1.0, -2.0]), [{1: -5.0}, {1: -0.1, 2: -3.0}, {2: -0.1}])
    other = Read(torch.tensor([-9.0, -1.0, -3.0]), [{2: -9.0}, {2: -0.1, 1: -3.0}, {2: -0.1}])
    found = served.compare_reads([dense, dense], [other, other], 1)
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert found["same_prediction"] == 0.5
    assert found["kl_standard_error"] == 0


def test_a_page_is_asked_several_questions_on_what_the_first_has_left():
    asked = Asked.draw(4)
    prompts = asked.prompts()
    assert asked == Asked.draw(4)
    assert asked.page.level == "medium"
    assert [question.kind in ADDRESS_KINDS for question in (asked.first, *asked.others)] == [True] * 5 + [False] * 4
    assert prompts[0] == f"<image>\n{asked.first.text}"
    assert all(prompt.startswith(f"{prompts[0]} {asked.first.answer}<eos>\n") for prompt in prompts[1:])
    right = [reply((number,), [1.0]) for number in range(9)]
    answers = ["-", *(question.answer for question in asked.others[:7]), "wrong"]
    assert served.marks([asked], [right], lambda ids: answers[ids[0]]).tolist() == [[1] * 7 + [0]]


def test_rows_of_two_widths_pay_where_the_share_of_text_was_foreseen():
    assert two_widths(40, 20, 0.5, 0.5) == pytest.approx(40 / 30)
    assert two_widths(40, 20, 0.5, 0.2) == pytest.approx(40 / 30)  # images lie in wide rows
    assert two_widths(40, 20, 0.5, 1.0) == pytest.approx(20 / 30)  # half of the rows stay empty
    assert two_widths(40, 40, 0.5, 0.5) == 1
    assert np.isclose(two_widths(40, 20, 1.0, 0.3), 1)
