"""Tables that go to a device together, and right-aligned text."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rotatek_cache.core.row_layout import ALIGNED, align_right, integers, moved, parts_of

DTYPES = [torch.bool, torch.int32, torch.int64]


@settings(deadline=None)
@given(
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), min_size=1, max_size=3)), min_size=1, max_size=5
    )
)
def test_tensors_of_one_copy_come_out_as_they_went_in(shapes):
    tensors = [torch.randint(0, 2, shape).to(dtype) for dtype, shape in shapes]
    room = sum(-(-tensor.nbytes // ALIGNED) * ALIGNED for tensor in tensors)
    storage = torch.full((room,), 0xAB, dtype=torch.uint8)
    for part, tensor in zip(parts_of(storage, tensors), tensors, strict=True):
        part.copy_(tensor)
    for part, tensor in zip(parts_of(storage.clone(), tensors), tensors, strict=True):
        assert part.dtype == tensor.dtype and torch.equal(part, tensor)
        assert part.storage_offset() * part.itemsize % ALIGNED == 0
    there = moved(tensors, torch.device("meta"))
    assert [(part.shape, part.dtype, part.device.type) for part in there] == [
        (tensor.shape, tensor.dtype, "meta") for tensor in tensors
    ]
    assert all(part is tensor for part, tensor in zip(moved(tensors, torch.device("cpu")), tensors, strict=True))


def test_text_is_aligned_to_the_right_and_remembered_on_the_host():
    keep = torch.tensor([[True, False, True, True], [False, False, True, False]])
    order, alignment = align_right(keep, torch.arange(4).expand(2, -1) + 10, 14)
    assert order.rows.tolist() == [[0], [1]]
    assert order.columns.tolist()[0] == [0, 2, 3] and order.columns.tolist()[1][-1] == 2
    assert alignment.first.tolist() == [0, 2] and alignment.positions[1, -1] == 12 and alignment.next_position == 14
    assert alignment.on(torch.device("cpu")) is alignment is alignment.on_host()
    there = alignment.on(torch.device("meta"))
    assert there.positions.device.type == "meta" and there.on_host() is alignment
    assert there.select_rows(torch.tensor([1], device="meta")).origin is None  # of other rows now


def test_integers():
    assert integers([3, 3, 3], torch.device("cpu")).tolist() == [3, 3, 3]
    assert integers([3, 5], torch.device("cpu")).tolist() == [3, 5]
