"""Claims on time, against what was measured."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals.report.compared import Verdict
from evals.store import Results

CHEAP = 0.05
FASTER = 1.5
NO_GPU = "no result of it from a GPU is stored"


def on_gpus(results: Results) -> Iterable[Mapping[str, Any]]:
    """Yield the latency results that do not come from a CPU."""
    return (stored for stored in results.latency.values() if not stored["environment"]["device"].startswith("CPU"))


def gains(rows: Sequence[Mapping[str, Any]], time: str, name: str) -> list[tuple[float, Mapping[str, Any]]]:
    """Compute how often `time` of methods whose name begins so goes into that of the setting's fastest dense cache."""
    measured = [row for row in rows if time in row]
    found = []
    for row in measured:
        if row["method"].startswith(name):
            dense = [
                other[time]["median"]
                for other in measured
                if other["method"].startswith("dense")
                and (other["context"], other["batch"]) == (row["context"], row["batch"])
            ]
            if dense:
                found.append((min(dense) / row[time]["median"], row))
    return found


def cheap_fit(results: Results) -> Verdict:
    claim = f"The prefill overhead is negligible (taken as below {100 * CHEAP:.0f} %)"
    shares = [
        (row["fit_share"], row, stored)
        for stored in results.latency.values()
        for row in stored["rows"]
        if row.get("fit_share") is not None and row["method"].startswith("RotateK") and "bit" not in row["method"]
    ]
    if not shares:
        return Verdict(claim, None)
    share, row, stored = max(shares, key=lambda entry: entry[0])
    where = f"{stored['model']}; {stored['environment']['device']}"
    told = f"at most {100 * share:.1f} % of a prefill, at {row['context']:,} tokens ({where})"
    return Verdict(claim, sum(one[0] < CHEAP for one in shares) / len(shares), told)


def faster(results: Results) -> Verdict:
    claim = "A decode step is about 1.5 to 2 times as fast on a GPU from 16k tokens on"
    found = [
        gain
        for stored in on_gpus(results)
        for gain in gains(stored["rows"], "token_ms", "RotateK")
        if gain[1]["context"] >= 16384
    ]
    if not found:
        return Verdict(claim, None, NO_GPU)
    low, high = (choose(found, key=lambda gain: gain[0]) for choose in (min, max))
    told = (
        f"{low[0]:.2f}x at {low[1]['context']:,} to {high[0]:.2f}x at {high[1]['context']:,} tokens, over the fastest "
        "dense cache"
    )
    return Verdict(claim, sum(gain >= FASTER for gain, _ in found) / len(found), told)


def chunks_are_faster(results: Results) -> Verdict:
    claim = "A decode step that reads a tenth by chunks is 1.52 times as fast (HybridKV)"
    found = [
        (gain, row, not stored["environment"]["device"].startswith("CPU"))
        for stored in results.latency.values()
        for gain, row in gains(stored["rows"], "token_ms", "HybridKV, .1 read, all heads dynamic")
    ]
    if not found:
        return Verdict(claim, None, NO_GPU)
    best, row, on_gpu = max(found, key=lambda gain: (gain[2], gain[0]))
    told = f"{best:.2f}x at {row['context']:,} tokens, batch {row['batch']}, over the fastest dense cache"
    if not on_gpu:
        return Verdict(claim, None, f"{NO_GPU}; on a CPU {told}")
    return Verdict(claim, float(best >= 1.52), told)


def _vl_cache(results: Results, claim: str, time: str, stated: float) -> Verdict:
    name = "VL-Cache, .1 of the bytes"
    found = [gain for stored in on_gpus(results) for gain in gains(stored["rows"], time, name)]
    if not found:
        held = [stored["rows"] for stored in results.latency.values()]
        held += [stored["attention"] for stored in results.other.values() if "attention" in stored]
        on_cpu = [f"{gain:.2f}x at {row['context']:,} tokens" for rows in held for gain, row in gains(rows, time, name)]
        return Verdict(claim, None, NO_GPU + (f"; on a CPU {', '.join(on_cpu)}" if on_cpu else ""))
    best, row = max(found, key=lambda gain: gain[0])
    ours = [
        (gain, other["method"])
        for stored in on_gpus(results)
        for name in ("VL-Cache and", "all tokens")
        for gain, other in gains(stored["rows"], time, name)
        if (other["context"], other["batch"]) == (row["context"], row["batch"])
    ]
    told = f"{best:.2f}x at {row['context']:,} tokens, batch {row['batch']}"
    told += "".join(f"; {name}: {gain:.2f}x" for gain, name in ours)
    return Verdict(claim, float(best >= stated), f"{told}; over the fastest dense cache")


def end_to_end(results: Results) -> Verdict:
    claim = "100 tokens come up to 2.33 times as fast at a tenth of the cache, prefill included (VL-Cache)"
    return _vl_cache(results, claim, "end_to_end_ms", 2.33)


def attention_alone(results: Results) -> Verdict:
    claim = "Attention alone decodes up to 7.08 times as fast at a tenth of the cache (VL-Cache)"
    return _vl_cache(results, claim, "attention_ms", 7.08)
