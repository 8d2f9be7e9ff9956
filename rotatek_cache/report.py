"""A readable account of what a cache holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SegmentReport:
    """One sealed segment of a layer; `tokens` over all rows, bytes from storage, `key_bits` if codes have one width.

    Where KV heads store tokens of their own, `tokens` is their mean, `by_head` what each stores of all rows, and
    `read_by_head` what it reads of them in a decode step.
    """

    tokens: int
    rank: int
    stored_rank: int
    head_width: int
    key_bytes: int
    value_bytes: int
    basis_bytes: int
    key_bits: int | None = None
    by_head: tuple[int, ...] = ()
    read_by_head: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerReport:
    """One layer: logical `tokens` per row, its segments, dense tokens over all rows, bytes stored and dense.

    `kept_dense` lists (row at the seal, visual tokens) that were too few for a basis to save bytes; `dropped` is how
    many tokens of the prompt, of all rows, a token method left out; `evicted` is how many tokens of answers each row
    and head has let go.
    """

    index: int
    kind: str
    tokens: int
    segments: list[SegmentReport]
    dense_tokens: int
    stored_bytes: int
    dense_bytes: int
    kept_dense: list[tuple[int, int]]
    dropped: int = 0
    evicted: int = 0


@dataclass(frozen=True)
class CacheReport:
    """All layers, and how a budget was divided; `print` it, or read its fields."""

    options: str
    layers: list[LayerReport]
    stored_bytes: int
    shared_bytes: int = 0
    plan: str = ""
    decoding: str = ""

    @property
    def dense_bytes(self) -> int:
        """Bytes that a dense cache takes for the same tokens."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def compression_ratio(self) -> float:
        """Dense bytes over stored bytes, everything counted."""
        return self.dense_bytes / self.stored_bytes if self.stored_bytes else 1.0

    def __str__(self) -> str:
        header = (
            f"{'layer':>5}  {'tokens':>6}  {'visual':>6}  {'rank':>8}  {'keys':>10}  {'values':>10}  {'basis':>9}  "
            f"{'text':>6}  {'stored':>10}  {'dense':>10}  {'ratio':>5}"
        )
        lines = [f"RotateK cache, {self.options}", *([self.plan] if self.plan else []), header]
        for layer in self.layers:
            lines += self._layer_lines(layer)
        ratio = self.compression_ratio
        change = f"{ratio:.2f}x smaller" if ratio >= 1 else f"{1 / ratio:.2f}x larger"
        lines.append(
            f"in all {readable_bytes(self.stored_bytes)} stored, {readable_bytes(self.dense_bytes)} dense: {change}"
        )
        if self.decoding:
            lines.append(f"decode steps are run {self.decoding}")
        for layer in self.layers:
            for segment in layer.segments:
                if segment.by_head:
                    heads = ", ".join(
                        f"{stored}" if read == stored else f"{stored} (reads {read})"
                        for stored, read in zip(segment.by_head, segment.read_by_head, strict=True)
                    )
                    lines.append(f"layer {layer.index}: visual tokens by KV head: {heads}")
        if any(layer.dropped for layer in self.layers):
            dropped = ", ".join(f"{layer.index}: {layer.dropped}" for layer in self.layers)
            lines.append(f"tokens dropped, by layer: {dropped}")
        evicted = max((layer.evicted for layer in self.layers), default=0)
        if evicted:
            lines.append(f"tokens of answers that went, of each row and head: {evicted}")
        if any(len({segment.key_bits for segment in layer.segments}) > 1 for layer in self.layers):
            lines.append(f"visual tokens by the bits of their Keys, by layer: {self._tokens_by_bits()}")
        if self.shared_bytes:
            lines.append(
                f"calibrated basis: {readable_bytes(self.shared_bytes)} once per model, shared by all requests and not "
                "counted above"
            )
        few: dict[int, set[int]] = {}
        for layer in self.layers:
            for row, tokens in layer.kept_dense:
                few.setdefault(row, set()).add(tokens)
        for row, counts in sorted(few.items()):
            # A token method may leave each layer another number.
            span = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else f"{min(counts)}"
            lines.append(
                f"row {row}: {span} visual tokens stayed dense, since a basis would cost more bytes than it saves"
            )
        return "\n".join(lines)

    def _tokens_by_bits(self) -> str:
        """Write how many tokens of each layer have how many bits."""
        told = []
        for layer in self.layers:
            counts: dict[int | None, int] = {}
            for segment in layer.segments:
                counts[segment.key_bits] = counts.get(segment.key_bits, 0) + segment.tokens
            parts = (f"{count} at {'mixed or no codes' if bits is None else bits}" for bits, count in counts.items())
            told.append(f"{layer.index}: {', '.join(parts) or 'none'}")
        return "; ".join(told)

    @staticmethod
    def _layer_lines(layer: LayerReport) -> list[str]:
        ratio = layer.dense_bytes / layer.stored_bytes if layer.stored_bytes else 1.0
        tail = (
            f"  {layer.dense_tokens:>6}  {readable_bytes(layer.stored_bytes):>10}  "
            f"{readable_bytes(layer.dense_bytes):>10}  {ratio:>4.2f}x"
        )
        head = f"{layer.index:>5}  {layer.tokens:>6}"
        if layer.kind != "RotateKLayer":
            return [f"{head}  {'stock layer: ' + layer.kind:<57}{tail}"]
        if not layer.segments:
            return [f"{head}  {0:>6}  {'-':>8}  {'-':>10}  {'-':>10}  {'-':>9}{tail}"]
        lines = []
        for number, segment in enumerate(layer.segments):
            padding = f"+{segment.stored_rank - segment.rank}" if segment.stored_rank > segment.rank else ""
            rank = f"{segment.rank}{padding}/{segment.head_width}"
            lines.append(
                f"{head if number == 0 else ' ' * len(head)}  {segment.tokens:>6}  {rank:>8}  "
                f"{readable_bytes(segment.key_bytes):>10}  {readable_bytes(segment.value_bytes):>10}  "
                f"{readable_bytes(segment.basis_bytes):>9}{tail if number == 0 else ''}"
            )
        return lines


@dataclass(frozen=True)
class SavedBytes:
    """What a saved cache takes.

    Attributes:
        path: of the file.
        on_disk: bytes of the file, its description included.
        in_memory: bytes of the storages in it, not compressed.
        compressed: whether they were to be compressed.
    """

    path: str
    on_disk: int
    in_memory: int
    compressed: bool

    def __str__(self) -> str:
        how = "compressed, " if self.compressed else ""
        return f"{self.path}: {readable_bytes(self.on_disk)} on disk ({how}{readable_bytes(self.in_memory)} in memory)"


def readable_bytes(count: int) -> str:
    """Write `count` bytes in B, KiB, MiB or GiB."""
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
