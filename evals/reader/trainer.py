"""Gradient steps for a time that is given, with checkpoints, a learning rate that falls and scores in between."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration

from evals.reader.model import save_reader


@dataclass
class Result:
    """Gradients of one micro-batch and sums to report."""

    gradients: list[Tensor]
    sums: dict[str, float]


class Trainer:
    """Gradient steps from micro-batches that worker threads compute, with a time-based schedule and checkpoints."""

    def __init__(
        self, flags: argparse.Namespace, model: LlavaForConditionalGeneration, trained: Sequence[nn.Module]
    ) -> None:
        self.flags, self.model = flags, model
        self.device = torch.device(flags.device)
        self.out = Path(flags.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.parameters = list({id(p): p for module in trained for p in module.parameters()}.values())
        tables = {id(m.weight) for module in trained for m in module.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in self.parameters if p.dim() == 2 and id(p) not in tables] if flags.muon else []
        others = list({id(p): p for p in self.parameters if id(p) not in set(map(id, matrices))}.values())
        groups = [
            {"params": [p for p in others if p.dim() >= 2], "weight_decay": flags.decay},
            {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=flags.lr, betas=(0.9, 0.98), fused=True)
        ]
        if matrices:
            self.optimizers.append(
                torch.optim.Muon(matrices, lr=flags.lr, weight_decay=flags.decay, adjust_lr_fn="match_rms_adamw")
            )
        self.step, self.before = 0, 0.0
        self.curve: list[dict[str, Any]] = []
        self.running: dict[str, float] = {}
        self.state: dict[str, Any] = {}
        # One core per worker: with so small matrices two workers are faster than one on two cores.
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(flags.threads, initializer=torch.set_num_threads, initargs=(1,))
        if flags.resume:
            self.load()
        self.seeds = np.random.SeedSequence([flags.seed, self.step])

    def load(self) -> None:
        saved = torch.load(self.out / "checkpoint.pt", weights_only=False, map_location=self.device)
        self.model.load_state_dict(saved["model"])
        for optimizer, state in zip(self.optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.step, self.before, self.curve = saved["step"], saved["minutes"], saved["curve"]
        self.state, self.running = saved["state"], saved["running"]

    def save(self, minutes: float) -> None:
        saved = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "minutes": minutes,
            "curve": self.curve,
            "state": self.state,
            "running": self.running,
        }
        torch.save(saved, self.out / "checkpoint.tmp")
        (self.out / "checkpoint.tmp").replace(self.out / "checkpoint.pt")
        flags = {key: value for key, value in vars(self.flags).items() if key != "run"}
        (self.out / "curve.json").write_text(json.dumps({"flags": flags, "curve": self.curve}, indent=1))
        # Complete before it replaces the old one: others may load it at any time.
        save_reader(self.model, self.out / "model.tmp", torch.float32)
        shutil.rmtree(self.out / "model", ignore_errors=True)
        (self.out / "model.tmp").rename(self.out / "model")

    def rate(self, minutes: float) -> float:
        """Set the learning rate: warm-up, a plateau, then linear to nearly nothing at the end of the time."""
        done = minutes / self.flags.minutes
        fall = (1 - done) / self.flags.fall
        return self.flags.lr * min(1.0, (self.step + 1) / 100, max(0.02, fall))

    def run(
        self,
        micro: Callable[[np.random.Generator], Result],
        evaluate: Callable[[], dict[str, float]],
        before_step: Callable[[], None] = lambda: None,
        finished: Callable[[], bool] = lambda: False,
    ) -> None:
        """Train until the time is over (counting the time before a resume) or `finished` says so."""
        start = saved = time.monotonic()
        last_evaluation = self.before
        with tqdm(total=self.flags.minutes, initial=self.before, unit="min", mininterval=10, smoothing=0) as bar:
            while True:
                minutes = self.before + (time.monotonic() - start) / 60
                if minutes >= self.flags.minutes or finished():
                    break
                before_step()
                rate = self.rate(minutes)
                for optimizer in self.optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = rate
                children = self.seeds.spawn(self.flags.batch // self.flags.micro)
                results = list(self.pool.map(lambda child: micro(np.random.default_rng(child)), children))
                sums: dict[str, float] = defaultdict(float)
                for result in results:
                    for key, value in result.sums.items():
                        sums[key] += value
                for index, parameter in enumerate(self.parameters):
                    parameter.grad = sum(r.gradients[index] for r in results) / sums["count"]  # type: ignore[assignment]
                nn.utils.clip_grad_norm_(self.parameters, 1.0)
                for optimizer in self.optimizers:
                    optimizer.step()
                self.step += 1
                for key, value in sums.items():
                    # "right:x" is counted out of "asked:x", everything else out of "count".
                    name, total = key, sums["count"]
                    if key.startswith("right:"):
                        name, total = key.removeprefix("right:"), sums[key.replace("right:", "asked:")]
                    elif key == "count" or key.startswith("asked:"):
                        continue
                    if total:
                        old = self.running.get(name)
                        self.running[name] = value / total if old is None else 0.95 * old + 0.05 * value / total
                bar.n = minutes
                if self.step % 20 == 0:
                    bar.write(f"{minutes:6.2f} min step {self.step} rate {rate:.1e} {self.state} {_line(self.running)}")
                now = self.before + (time.monotonic() - start) / 60
                if now - last_evaluation >= self.flags.every:
                    last_evaluation = now
                    self.evaluate(now, evaluate, bar)
                if time.monotonic() - saved >= 60 * self.flags.keep:
                    saved = time.monotonic()
                    self.save(now)
            minutes = self.before + (time.monotonic() - start) / 60
            self.evaluate(minutes, evaluate, bar)
            self.save(minutes)

    def evaluate(self, minutes: float, evaluate: Callable[[], dict[str, float]], bar: tqdm) -> None:
        self.model.eval()
        scores = evaluate()
        self.model.train()
        self.curve.append({"minutes": round(minutes, 2), "step": self.step, "training": _rounded(self.running)})
        self.curve[-1] |= {"held_out": _rounded(scores), **self.state}
        bar.write(f"{minutes:6.2f} min HELD OUT {_line(scores)}")


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: round(value, 4) for key, value in values.items()}


def _line(values: dict[str, float]) -> str:
    return " ".join(f"{key} {value:.3f}" for key, value in values.items())


def gradients_of(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Compute gradients per thread; `.backward()` would add them all up in one place."""
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, parameters, strict=True)]
