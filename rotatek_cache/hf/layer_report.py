"""What one layer of a `RotateKCache` holds, counted off its storage, as `RotateKCache.report` lists it."""

from typing import Any

from transformers.cache_utils import CacheLayerMixin

from rotatek_cache.cache.coded_layer import CodedKV
from rotatek_cache.cache.layer import LayerKV
from rotatek_cache.core.quantization import CodeLayout
from rotatek_cache.core.segments import Stored, VisualSegment
from rotatek_cache.hf.storage import stock_tensors, storage_bytes
from rotatek_cache.report import LayerReport, SegmentReport


def _rank(stored: Stored, width: int) -> int:
    fitted = None if stored.basis is None else stored.basis.fitted_rank
    return width if fitted is None else fitted


def _one_width(stored: Stored) -> int | None:
    """Return the bits of all codes that are stored; None where they differ, or there are none."""
    blocks = stored.code.blocks if isinstance(stored.code, CodeLayout) else ()
    return blocks[0][0] if len(blocks) == 1 else None


def stock_report(index: int, layer: Any) -> LayerReport:
    """Account for a layer of transformers' own."""
    stored = storage_bytes(stock_tensors(layer))
    counts = isinstance(layer, CacheLayerMixin) and layer.is_initialized  # linear attention holds no tokens
    tokens = layer.get_seq_length() if counts else 0
    return LayerReport(index, type(layer).__name__, tokens, [], 0, stored, stored, [])


def layer_report(index: int, kv: LayerKV | CodedKV) -> LayerReport:
    """Account for a layer whose visual Keys, or all tokens, are compressed."""
    stored = storage_bytes(kv.tensors())
    if kv.shape is None or kv.dtype is None:
        return LayerReport(index, "RotateKLayer", 0, [], 0, stored, 0, [])
    batch, heads, width, value_width = kv.shape
    dense = batch * heads * kv.length * (width + value_width) * kv.dtype.itemsize
    if isinstance(kv, CodedKV):
        return _coded_report(kv, index, stored, dense)
    segments = [
        SegmentReport(
            **_by_head(segment),
            tokens=round(int(segment.lengths.sum()) / segment.heads),
            rank=_rank(segment.keys, width),
            stored_rank=segment.keys.channels,
            head_width=width,
            key_bytes=storage_bytes([segment.keys.data]),
            value_bytes=storage_bytes([segment.values.data]),
            basis_bytes=storage_bytes(
                [t for stored in (segment.keys, segment.values) for t in stored.tensors() if t is not stored.data]
            ),
            key_bits=_one_width(segment.keys),
        )
        for segment in kv.segments
        if not segment.is_text
    ]
    return LayerReport(
        index,
        "RotateKLayer",
        kv.length,
        segments,
        kv.dense_tokens(),
        stored,
        dense,
        list(kv.kept_dense),
        sum(int(counts.sum()) for _, counts in kv.dropped),
        0 if kv.answer is None else kv.answer.evicted,
    )


def _by_head(segment: VisualSegment) -> dict[str, tuple[int, ...]]:
    """Count what each KV head of a segment stores and reads, where they differ in it."""
    if segment.heads == 1 and segment.chunks is None:
        return {}
    lengths = segment.lengths.long()
    read = lengths if segment.chunks is None else (segment.chunks.read * segment.chunks.size).minimum(lengths)
    stored, reads = (tuple(counts.unflatten(0, (segment.heads, -1)).sum(1).tolist()) for counts in (lengths, read))
    return {"by_head": stored, "read_by_head": reads}


def _coded_report(kv: CodedKV, index: int, stored: int, dense: int) -> LayerReport:
    tokens = 0 if kv.counts is None else sum(kv.counts.coded)
    segments = []
    if tokens:
        keys, values = (storage_bytes([codes.data]) for codes in kv.codes)
        channels = kv.codecs[0].code.channels
        segments = [SegmentReport(tokens, channels, channels, kv.codecs[0].width, keys, values, 0)]
    return LayerReport(index, "RotateKLayer", kv.length, segments, kv.dense_tokens(), stored, dense, [])
