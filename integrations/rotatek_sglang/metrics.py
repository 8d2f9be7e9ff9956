"""Prometheus metrics, beside SGLang's own (`--enable-metrics`)."""

from typing import Any

from rotatek_sglang.layout import CacheLayout
from rotatek_sglang.rows import SlotTable

DESCRIPTIONS = {
    "rotatek_text_rows": "Rows for text tokens in the KV pool",
    "rotatek_text_rows_used": "Rows for text tokens in use",
    "rotatek_visual_rows": "Rows for visual tokens in the KV pool",
    "rotatek_visual_rows_used": "Rows for visual tokens in use",
    "rotatek_bases_used": "Bases in use",
    "rotatek_requests_with_basis": "Requests that hold compressed visual tokens",
    "rotatek_compression_ratio": "Bytes of a dense cache over bytes stored for the tokens held now; 1 while none are",
}


def values(table: SlotTable, layout: CacheLayout, requests_with_basis: int) -> dict[str, float]:
    """The metrics' values, by name."""
    text, visual = table.text.used, table.visual.used
    dense = (text + visual) * layout.text_bytes
    stored = text * layout.text_bytes + visual * layout.visual_bytes + table.bases.used * layout.basis_bytes
    return {
        "rotatek_text_rows": table.text.total,
        "rotatek_text_rows_used": text,
        "rotatek_visual_rows": table.visual.total,
        "rotatek_visual_rows_used": visual,
        "rotatek_bases_used": table.bases.used,
        "rotatek_requests_with_basis": requests_with_basis,
        "rotatek_compression_ratio": dense / stored if stored else 1.0,
    }


class Gauges:
    """The metrics of one scheduler process."""

    def __init__(self, labels: dict[str, str]) -> None:
        # Not earlier: SGLang sets the folder in which processes share their metrics before the first import.
        import prometheus_client  # noqa: PLC0415

        def gauge(name: str, description: str) -> Any:
            made = prometheus_client.Gauge(name, description, list(labels), multiprocess_mode="mostrecent")
            return made.labels(**labels)

        self.gauges = {name: gauge(name, description) for name, description in DESCRIPTIONS.items()}

    def set(self, current: dict[str, float]) -> None:
        """Publish."""
        for name, value in current.items():
            self.gauges[name].set(value)
