"""Prometheus metrics, beside SGLang's own (`--enable-metrics`)."""

from typing import Any

from rotatek_sglang.coded_layout import CodedPlan
from rotatek_sglang.coded_storage import Sinks
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
    """Return the metrics' values, by name."""
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


CODED_DESCRIPTIONS = {
    "rotatek_rows": "Rows for tokens in the KV pool",
    "rotatek_rows_used": "Rows in use, cached prefixes included",
    "rotatek_sinks": "Dense rows for the first tokens of prompts",
    "rotatek_sinks_used": "Those in use, at most",
    "rotatek_rings": "Requests whose last tokens can be held dense",
    "rotatek_rings_used": "Requests whose last tokens are",
    "rotatek_compression_ratio": "Bytes of a dense cache over bytes stored for the tokens held now; 1 while none are",
}


def coded_values(rows: int, used: int, sinks: Sinks, running: int, plan: CodedPlan) -> dict[str, float]:
    """Return the metrics' values where all tokens are coded, by name.

    Args:
        rows: of the pool.
        used: of them, with cached prefixes.
        sinks: who has which.
        running: requests.
        plan: what each takes.
    """
    sunk = sinks.total - sinks.free()
    stored = used * plan.slot_bytes + sunk * plan.dense_bytes + running * plan.ring_bytes
    return {
        "rotatek_rows": rows,
        "rotatek_rows_used": used,
        "rotatek_sinks": sinks.total,
        "rotatek_sinks_used": sunk,
        "rotatek_rings": plan.requests,
        "rotatek_rings_used": running,
        "rotatek_compression_ratio": used * plan.dense_bytes / stored if used else 1.0,
    }


class Gauges:
    """The metrics of one scheduler process."""

    def __init__(self, labels: dict[str, str], descriptions: dict[str, str] = DESCRIPTIONS) -> None:
        # Not earlier: SGLang sets the folder in which processes share their metrics before the first import.
        import prometheus_client  # noqa: PLC0415

        def gauge(name: str, description: str) -> Any:
            made = prometheus_client.Gauge(name, description, list(labels), multiprocess_mode="mostrecent")
            return made.labels(**labels)

        self.gauges = {name: gauge(name, description) for name, description in descriptions.items()}

    def set(self, current: dict[str, float]) -> None:
        """Publish."""
        for name, value in current.items():
            self.gauges[name].set(value)
