"""Train the second reader: projector and LoRA, on a CPU in the background or on a GPU in minutes.

    python -m evals.reader.smol_train --minutes 60 --folder runs/smol
    python -m evals.reader.smol_train --minutes 4 --folder runs/smol --device cuda --pages 48 --length 640 --workers 12

(the first took an hour of one core; evals/results/reader_smol_training.json has the commands of the stored adapter, the
second has not been run on a GPU yet).

The projector starts where the patches of a cell read as sums of SmolLM2's own words for the cell's column, row, colour
and symbol. A sequence holds one page and many short conversations about it, which see the page and not each other, so
that a page is read once for all of them; of a page, patches of empty cells are mostly left out, and all keep the
positions that they have in the whole. Started again with the same folder, training goes on from its last checkpoint.
An adapter is kept with every checkpoint; `python -m evals.reader.smol --mean` takes the mean of the last ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from evals.reader.model import PATCH, SIDE, VISUAL_TOKENS, patch_cells
from evals.reader.pages import (
    CELL,
    CHOOSE_SEEDS,
    COLUMN_NAMES,
    GRID_MAX,
    KINDS,
    LEVELS,
    TRAIN_SEEDS,
    Page,
    ask,
    make_page,
)
from evals.reader.smol import (
    END,
    add_lora,
    base_file,
    build_model,
    build_processor,
    save_adapter,
    trained,
)
from evals.reader.smol_questions import SPOKEN, in_english

SHARES = {
    "glyph": 0.2,
    "colour": 0.2,
    "row": 0.09,
    "column": 0.09,
    "row_colours": 0.08,
    "column_colours": 0.08,
    "where": 0.14,
    "count": 0.06,
    "compare": 0.06,
}
"""How often a kind is asked in training."""
TOUR = "tour"
"""A kind of training only: addresses in random order, each with what is there, which the reader has to say."""
MOST_TURNS = 3


@dataclass
class Sequence:
    """One page with conversations about it.

    Attributes:
        pixels: uint8 ``[height, width, 3]``.
        patches: int64 ``[p]``, which of the page's patches are read, in order.
        ids: int64 ``[n]``, the tokens after the patches.
        chat: int64 ``[n]``, which conversation a token belongs to; -1 is the page's own, seen by all.
        places: int64 ``[n]``, positions.
        question: int64 ``[n]``, the number of the question that a token answers, -1 elsewhere.
        kinds: of the questions.
    """

    pixels: np.ndarray
    patches: np.ndarray
    ids: np.ndarray
    chat: np.ndarray
    places: np.ndarray
    question: np.ndarray
    kinds: list[str]


class Writer:
    """Draws pages and conversations as `Sequence`; its random numbers are its own."""

    def __init__(self, tokenizer: Any, seed: int) -> None:
        self.tokenizer = tokenizer
        self.known: dict[str, list[int]] = {}
        self.rng = np.random.default_rng(seed)
        self.cells = patch_cells().numpy()
        self.end = tokenizer.convert_tokens_to_ids(END)

    def encode(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self.known[text]

    def choose(self, page: Page, share: float, empty: float) -> np.ndarray:
        """Choose patches: `share` of those of cells that hold something, `empty` of the others."""
        row, column = np.divmod(self.cells, GRID_MAX)
        chance = np.where((row < page.size) & (column < page.size), share, empty)
        return np.flatnonzero(self.rng.random(VISUAL_TOKENS) < chance)

    def tour(self, page: Page) -> tuple[list[int], list[bool]]:
        """Write up to nine cells with colours, symbols or both: the tokens, and which of them are to be said."""
        cells = self.rng.permutation(page.size**2)[:9].tolist()
        which = self.rng.integers(1, 4)
        tokens = list(self.encode(("Colours:", "Symbols:", "All:")[which - 1]))
        marks = [False] * len(tokens)
        for row, column in (divmod(cell, page.size) for cell in cells):
            named = self.encode(f" {COLUMN_NAMES[column]}{row + 1}")
            held = [page.colours[row][column]] * (which & 1) + [SPOKEN[page.glyphs[row][column]]] * (which >> 1)
            told = [token for word in held for token in self.encode(f" {word}")]
            tokens += named + told
            marks += [False] * len(named) + [True] * len(told)
        return [*tokens, self.end], [*marks, False]

    def write(
        self, seed: int, level: str, length: int, shares: dict[str, float], share: float = 1.0, empty: float = 1.0
    ) -> Sequence:
        """Draw a page and ask until `length` tokens are full, its patches included."""
        page = make_page(seed, level)
        patches = self.choose(page, share, empty)
        room = length - len(patches) - 1
        names, weights = list(shares), np.array(list(shares.values())) / sum(shares.values())
        ids, chat, places, answers, kinds = list(self.encode("\n")), [-1], [1 + VISUAL_TOKENS], [-1], []
        number = 0
        while True:
            at = 2 + VISUAL_TOKENS
            for _ in range(self.rng.integers(1, MOST_TURNS + 1)):
                kind = str(self.rng.choice(names, p=weights))
                if kind == TOUR:
                    tokens, marks = self.tour(page)
                else:
                    question = in_english(ask(page, self.rng, kind), self.rng)
                    asked, told = self.encode(question.text), [*self.encode(question.answer), self.end]
                    tokens, marks = asked + told, [False] * len(asked) + [True] * len(told)
                size = len(tokens)
                if len(ids) + size > room:
                    return Sequence(
                        np.asarray(page.image), patches, *map(np.array, (ids, chat, places, answers)), kinds
                    )
                ids += tokens
                chat += [number] * size
                places += range(at, at + size)
                answers += [len(kinds) if mark else -1 for mark in marks]
                kinds.append(kind)
                at += size
            number += 1


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the tower's features ``[B, patches, width]`` of uint8 pixels ``[B, height, width, 3]``."""
    tower = model.model.vision_tower
    scaled = pixels.permute(0, 3, 1, 2).to(next(tower.parameters()).dtype) / 127.5 - 1
    return tower(pixel_values=scaled, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]


def logits_of(model: LlavaForConditionalGeneration, batch: list[Sequence]) -> tuple[Tensor, Tensor, Tensor]:
    """Predict all answers' tokens: logits ``[m, vocabulary]``, tokens ``[m]``, questions ``[m]`` of the whole batch."""
    device = model.device
    with torch.no_grad():
        features = tower_features(model, torch.from_numpy(np.stack([part.pixels for part in batch])).to(device))
    table = model.get_input_embeddings()
    start = torch.tensor([model.config.bos_token_id], device=device)
    sizes = [1 + len(part.patches) + len(part.ids) for part in batch]
    longest = max(sizes)
    states, places, chats, where, targets, questions = [], [], [], [], [], []
    before = 0
    for index, part in enumerate(batch):
        ids = torch.from_numpy(part.ids).to(device)
        seen = model.model.multi_modal_projector(features[index, torch.from_numpy(part.patches).to(device)])
        words = table(torch.cat([start, ids])).to(seen.dtype)
        rest = longest - sizes[index]
        states.append(functional.pad(torch.cat([words[:1], seen, words[1:]]), (0, 0, 0, rest)))
        places.append(np.concatenate([[0], 1 + part.patches, part.places, np.zeros(rest, int)]))
        chats.append(np.concatenate([np.full(1 + len(part.patches), -1), part.chat, np.full(rest, -2)]))
        answers = np.flatnonzero(part.question >= 0)
        where.append(index * longest + len(part.patches) + answers)  # the token before says it
        targets.append(part.ids[answers])
        questions.append(before + part.question[answers])
        before += len(part.kinds)
    chat = torch.from_numpy(np.stack(chats)).to(device)
    order = torch.arange(longest, device=device)
    seen_by = (chat[:, None, :] == -1) | (chat[:, None, :] == chat[:, :, None])
    mask = (seen_by & (order[None, :] <= order[:, None]))[:, None]
    hidden = model.model.language_model(
        inputs_embeds=torch.stack(states),
        position_ids=torch.from_numpy(np.stack(places)).to(device),
        attention_mask=mask,
        use_cache=False,
    ).last_hidden_state
    picked = hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(where)).to(device)]
    flat = [torch.from_numpy(np.concatenate(part)).to(device) for part in (targets, questions)]
    return model.lm_head(picked).float(), flat[0], flat[1]


def exact(logits: Tensor, targets: Tensor, questions: Tensor, batch: list[Sequence]) -> dict[str, list[int]]:
    """Count right answers of each kind: (right, asked)."""
    kinds = [kind for part in batch for kind in part.kinds]
    wrong = torch.zeros(len(kinds), device=logits.device).index_add_(
        0, questions, (logits.argmax(-1) != targets).float()
    )
    counts = {kind: [0, 0] for kind in (*KINDS, TOUR)}
    for kind, bad in zip(kinds, wrong.tolist(), strict=True):
        counts[kind][0] += not bad
        counts[kind][1] += 1
    return counts


@torch.no_grad()
def held_out(model: LlavaForConditionalGeneration, tokenizer: Any, level: str, pages: int) -> dict[str, Any]:
    """Ask about whole pages from the seeds for choosing: exact match of each kind, teacher-forced."""
    writer = Writer(tokenizer, 5)
    total = {kind: [0, 0] for kind in (*KINDS, TOUR)}
    for index in range(pages):
        batch = [writer.write(CHOOSE_SEEDS[index], level, VISUAL_TOKENS + 300, SHARES)]
        for kind, (right, asked) in exact(*logits_of(model, batch), batch).items():
            total[kind][0] += right
            total[kind][1] += asked
    return {kind: f"{right / asked:.2f} of {asked}" for kind, (right, asked) in total.items() if asked}


def word_targets(model: LlavaForConditionalGeneration, tokenizer: Any, page: Page) -> Tensor:
    """Say in SmolLM2's words what each patch shows: ``[patches, hidden]``.

    Of a cell's three columns of patches the first stresses the address, the second the colour, the third the symbol.
    """
    table = model.get_input_embeddings().weight.detach().float()

    def word(text: str) -> Tensor:
        (index,) = tokenizer(text, add_special_tokens=False)["input_ids"]
        return table[index]

    empty = word(" empty")
    cells = patch_cells().tolist()
    targets = []
    for patch, cell in enumerate(cells):
        row, column = divmod(cell, GRID_MAX)
        kind = patch % SIDE % (CELL // PATCH)
        address = word(f" {COLUMN_NAMES[column]}") + word(str(row + 1))
        if row >= page.size or column >= page.size:
            targets.append(empty + 0.5 * address)
            continue
        colour, symbol = word(f" {page.colours[row][column]}"), word(f" {SPOKEN[page.glyphs[row][column]]}")
        stress = [(1.0, 0.5, 0.5), (0.7, 1.0, 0.3), (0.7, 0.3, 1.0)][kind]
        targets.append(stress[0] * address + stress[1] * colour + stress[2] * symbol)
    return torch.stack(targets)


def start_projector(model: LlavaForConditionalGeneration, tokenizer: Any, pages: int, steps: int) -> float:
    """Fit the projector to `word_targets`: second layer by ridge regression, then both by Adam; unexplained share."""
    rng = np.random.default_rng(3)
    features, targets = [], []
    for _ in range(0, pages, 8):
        drawn = [make_page(int(rng.integers(TRAIN_SEEDS.stop)), str(rng.choice(list(LEVELS)))) for _ in range(8)]
        pixels = torch.from_numpy(np.stack([np.asarray(page.image) for page in drawn])).to(model.device)
        with torch.no_grad():
            features.append(tower_features(model, pixels).flatten(0, 1))
        targets += [word_targets(model, tokenizer, page) for page in drawn]
    x, y = torch.cat(features).float(), torch.cat(targets).float()
    held = 8 * VISUAL_TOKENS
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    with torch.no_grad():
        spread = x.std(0)
        first.weight.normal_(0, 1 / x.shape[1] ** 0.5).div_(spread)
        first.bias.copy_(-(first.weight @ x.mean(0)) + 0.5 * torch.randn_like(first.bias))
        hidden = functional.gelu(first(x[:-held]))
        mean, middle = hidden.mean(0), y[:-held].mean(0)
        moved = hidden - mean
        gram = (moved.T @ moved).double()
        ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device)
        weight = torch.linalg.solve(gram + ridge, (moved.T @ (y[:-held] - middle)).double()).float()
        second.weight.copy_(weight.T)
        second.bias.copy_(middle - mean @ weight)
    variance = (y[:-held] - y[:-held].mean(0)).square().mean()

    def unexplained(part: slice, chosen: Tensor | slice = slice(None)) -> Tensor:
        return (second(functional.gelu(first(x[part][chosen]))) - y[part][chosen]).square().mean() / variance

    print(f"projector by ridge regression: {unexplained(slice(-held, None)).item():.3f} unexplained", flush=True)
    optimizer = torch.optim.Adam(projector.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        loss = unexplained(slice(None, -held), torch.randint(len(x) - held, (2048,), device=x.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        left = unexplained(slice(-held, None)).item()
    print(f"projector after {steps} steps: {left:.3f} unexplained", flush=True)
    return left


def _draw(tokenizer: Any, flags: argparse.Namespace, worker: int, queue: Any) -> None:
    """Fill a queue with batches, in a process of its own."""
    torch.set_num_threads(1)
    writer = Writer(tokenizer, int(time.time()) * 100 + worker)
    while True:
        queue.put(draw_batch(writer, flags))


def draw_batch(writer: Writer, flags: argparse.Namespace) -> list[Sequence]:
    """Draw the pages of one step."""
    levels, chances = list(flags.levels), np.array(list(flags.levels.values()))
    batch = []
    for _ in range(flags.pages):
        level = str(writer.rng.choice(levels, p=chances / chances.sum()))
        seed = int(writer.rng.integers(TRAIN_SEEDS.stop))
        batch.append(writer.write(seed, level, flags.length, flags.kinds, flags.share, flags.empty))
    return batch


def train(flags: argparse.Namespace) -> None:
    base = base_file()
    processor = build_processor(base)
    tokenizer = processor.tokenizer
    device = torch.device(flags.device)
    model = build_model(base, tokenizer).to(device)
    checkpoint = flags.folder / "checkpoint.pt"
    flags.folder.mkdir(parents=True, exist_ok=True)
    add_lora(model)
    step, questions, seconds = 0, 0, 0.0
    if not checkpoint.exists():
        start_projector(model, tokenizer, flags.fit_pages, flags.fit_steps)
    own = trained(model)
    # What is trained stays in float32, as do the frequencies of the positions; the rest is bfloat16.
    for tensor in model.parameters():
        if not tensor.requires_grad:
            tensor.data = tensor.data.bfloat16()
    projector = model.model.multi_modal_projector
    groups = [
        {"params": [t for name, t in own.items() if "projector" not in name], "top": flags.rate},
        {"params": list(projector.parameters()), "top": flags.projector_rate},
    ]
    optimizer = torch.optim.AdamW(groups, lr=flags.rate, betas=(0.9, 0.98), weight_decay=0.0)
    if checkpoint.exists():
        held = torch.load(checkpoint, weights_only=True, map_location=device)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(held["trained"][name])
        optimizer.load_state_dict(held["optimizer"])
        for group, top in zip(optimizer.param_groups, (flags.rate, flags.projector_rate), strict=True):
            group["top"] = top
        step, questions, seconds = held["step"], held["questions"], held["seconds"]
        print(f"goes on from step {step}", flush=True)
    begin_step, began = step, time.time()
    deadline = began + 60 * flags.minutes

    def keep() -> None:
        state = {
            "trained": {name: tensor.detach() for name, tensor in own.items()},
            "optimizer": optimizer.state_dict(),
            "step": step,
            "questions": questions,
            "seconds": seconds + time.time() - began,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)
        save_adapter(model, flags.folder / f"adapter_{step}.safetensors", {"steps": str(step)})

    writer = Writer(tokenizer, int(began))
    queue: Any = None
    if flags.workers:
        context = multiprocessing.get_context("fork")
        queue = context.Queue(4 * flags.workers)
        for worker in range(flags.workers):
            context.Process(target=_draw, args=(tokenizer, flags, worker, queue), daemon=True).start()
    tally = {kind: [0, 0] for kind in (*KINDS, TOUR)}
    losses: list[float] = []
    saved = scored = logged = time.time()
    log = (flags.folder / "log.jsonl").open("a")

    def write(entry: dict[str, Any]) -> None:
        entry = {"step": step, "questions": questions, "seconds": round(seconds + time.time() - began), **entry}
        print(json.dumps(entry), file=log, flush=True)
        print(entry, flush=True)

    while time.time() < deadline:
        left = (deadline - time.time()) / (60 * flags.decay)
        warm = (step - begin_step + 1) / flags.warm
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * min(1.0, left, warm)
        batch = queue.get() if queue is not None else draw_batch(writer, flags)
        with torch.autocast(device.type, torch.bfloat16):
            logits, targets, asked = logits_of(model, batch)
        # Each question counts as its length's square root does, so that lists don't drown single words.
        weight = torch.bincount(asked)[asked].float().rsqrt()
        loss = (functional.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(own.values()), 1.0)
        optimizer.step()
        step += 1
        questions += sum(len(part.kinds) for part in batch)
        losses.append(loss.item())
        for kind, (right, count) in exact(logits.detach(), targets, asked, batch).items():
            tally[kind][0] += right
            tally[kind][1] += count
        if time.time() - logged > flags.log or step <= 3:
            found = {kind: round(right / count, 3) for kind, (right, count) in tally.items() if count}
            write({"loss": round(float(np.mean(losses)), 4), "exact": found})
            tally, losses, logged = {kind: [0, 0] for kind in (*KINDS, TOUR)}, [], time.time()
        if time.time() - saved > flags.keep:
            keep()
            saved = time.time()
        if time.time() - scored > flags.score:
            with torch.autocast(device.type, torch.bfloat16):
                write({"held out": {level: held_out(model, tokenizer, level, flags.held) for level in flags.levels}})
            scored = time.time()
    keep()
    with torch.autocast(device.type, torch.bfloat16):
        write({"held out": {level: held_out(model, tokenizer, level, 2 * flags.held) for level in flags.levels}})


def _shares(text: str) -> dict[str, float]:
    pairs = (part.partition("=") for part in text.split(","))
    return {name: float(value or 1) for name, _, value in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/smol"), help="checkpoint, log and adapter")
    parser.add_argument("--minutes", type=float, required=True, help="of training, from the first step on")
    parser.add_argument("--decay", type=float, default=15, help="last minutes, over which the rate falls to 0")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--pages", type=int, default=2, help="of one step")
    parser.add_argument("--length", type=int, default=448, help="tokens of a page and its conversations")
    parser.add_argument("--levels", type=_shares, default={"easy": 1.0}, help="as in easy=.7,medium=.3")
    parser.add_argument("--kinds", type=_shares, default=SHARES, help="as in glyph=.5,colour=.5")
    parser.add_argument("--share", type=float, default=0.5, help="share of the patches of filled cells that are read")
    parser.add_argument("--empty", type=float, default=0.05, help="share of the patches of empty cells that are read")
    parser.add_argument("--rate", type=float, default=2e-3, help="of LoRA")
    parser.add_argument("--projector-rate", type=float, default=1e-4)
    parser.add_argument("--warm", type=int, default=20, help="steps over which the rate rises")
    parser.add_argument("--fit-pages", type=int, default=320, help="that the projector is started on")
    parser.add_argument("--fit-steps", type=int, default=300)
    parser.add_argument("--log", type=float, default=60, help="seconds between lines of the log")
    parser.add_argument("--keep", type=float, default=180, help="seconds between checkpoints")
    parser.add_argument("--score", type=float, default=480, help="seconds between held-out scores")
    parser.add_argument("--held", type=int, default=10, help="held-out pages of a level")
    parser.add_argument("--workers", type=int, default=0, help="processes that draw pages; 0 draws in between")
    torch.manual_seed(0)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
