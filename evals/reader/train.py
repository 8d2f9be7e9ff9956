r"""Train the reader in two stages.

`tower` teaches the vision tower and the projector to name the glyph, the colour and the cell of every patch in the
words of the text model. `text` teaches the text model to answer questions on top of the frozen tower, or (with
`--symbols`) on ideal tower outputs, which needs no tower yet and can run beside the first stage:

    python -m evals.reader.train tower --muon --batch 8 --micro 8 --minutes 24 --fall 0.5 --out runs/tower
    python -m evals.reader.train text --symbols --muon --batch 16 --minutes 18 --out runs/symbols
    python -m evals.reader.train text --symbols --muon --start runs/symbols/model --content 0.5 \
        --content-kinds where --grid 2 --noise 0.1 --minutes 17 --out runs/search
    python -m evals.reader.train text --muon --tower runs/tower/model --start runs/search/model --content 0.35 \
        --whole 0.2 --batch 16 --micro 8 --minutes 28 --fall 0.5 --out runs/reader

The third command teaches the search by content, from 2 x 2 grids up; on large grids it does not start by itself.

Every run writes `curve.json`, a checkpoint that `--resume` continues, and a folder that `from_pretrained` loads.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from evals.reader.model import (
    BLANK,
    BOS,
    CELLS,
    EOS,
    UNK,
    VISUAL_TOKENS,
    VOCABULARY,
    build_model,
    build_tokenizer,
    patch_cells,
    word_table,
)
from evals.reader.pages import (
    ADDRESS_KINDS,
    CHOOSE_SEEDS,
    COLOUR_NAMES,
    CONTENT_KINDS,
    GLYPHS,
    GRID_MAX,
    TRAIN_SEEDS,
    Page,
    ask_grid,
    contents,
    make_page,
)
from evals.reader.trainer import Result, Trainer, gradients_of

GLYPH_WORDS = [VOCABULARY[name] for name in (*GLYPHS, BLANK)]
COLOUR_WORDS = [VOCABULARY[name] for name in COLOUR_NAMES]
CELL_WORDS = [VOCABULARY[name] for name in CELLS]
IGNORE = -100
LEVEL_SHARES = {"easy": 0.15, "medium": 0.25, "hard": 0.6}
KIND_SHARES = {"glyph": 0.2, "colour": 0.14} | dict.fromkeys(ADDRESS_KINDS[2:], 0.165)


def images_of(pages: Sequence[Page]) -> Tensor:
    """Make pixel values as the image processor would."""
    pixels = torch.from_numpy(np.stack([np.asarray(page.image) for page in pages]))
    return (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5


def labels_of(pages: Sequence[Page]) -> tuple[Tensor, Tensor]:
    """Find the (glyph, colour) class of every patch; a cell beyond the grid is blank and has no colour."""
    glyphs = torch.full((len(pages), GRID_MAX, GRID_MAX), len(GLYPHS))
    colours = torch.full((len(pages), GRID_MAX, GRID_MAX), IGNORE)
    for index, page in enumerate(pages):
        n = page.size
        glyphs[index, :n, :n] = torch.tensor([[GLYPHS.index(g) for g in line] for line in page.glyphs])
        colours[index, :n, :n] = torch.tensor([[COLOUR_NAMES.index(c) for c in line] for line in page.colours])
    cells = patch_cells()
    return glyphs.flatten(1)[:, cells], colours.flatten(1)[:, cells]


def train_pages(rng: np.random.Generator, count: int) -> list[Page]:
    """Draw pages of all levels from the training seeds."""
    levels = rng.choice(list(LEVEL_SHARES), count, p=list(LEVEL_SHARES.values()))
    return [make_page(int(rng.integers(TRAIN_SEEDS.start, TRAIN_SEEDS.stop)), str(level)) for level in levels]


def see(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Compute projected features (images, patches, hidden), by the model's own path."""
    features = model.model.get_image_features(pixel_values=pixels).pooler_output
    return torch.stack(list(features)) if isinstance(features, list | tuple) else features


# ------------------------------------------------------------------------------------------------------ stage 1: tower


def tower_logits(features: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Measure how well each patch agrees with each glyph, colour and cell word."""
    logits = features.float() @ (8 * table.T)
    return logits[..., GLYPH_WORDS], logits[..., COLOUR_WORDS], logits[..., CELL_WORDS]


def train_tower(flags: argparse.Namespace) -> None:
    """Train the tower, stage 1."""
    device = torch.device(flags.device)
    model = build_model(flags.seed).to(device)
    table, cells = word_table(flags.seed).to(device), patch_cells().to(device)
    trainer = Trainer(flags, model, [model.model.vision_tower, model.model.multi_modal_projector])

    def losses(pages: Sequence[Page]) -> tuple[Tensor, dict[str, float]]:
        pixels = images_of(pages).to(device)
        glyphs, colours = (labels.to(device) for labels in labels_of(pages))
        with torch.autocast(device.type, torch.bfloat16):
            features = see(model, pixels)
        wanted = (glyphs, colours, cells.expand(len(pages), -1))
        logits = tower_logits(features, table)
        loss = torch.stack(
            [functional.cross_entropy(o.flatten(0, 1), w.flatten()) for o, w in zip(logits, wanted, strict=True)]
        ).sum()
        sums = {"count": float(len(pages)), "loss": loss.item() * len(pages)}
        inked = colours != IGNORE
        for name, output, want in zip(("glyph", "colour", "cell"), logits, wanted, strict=True):
            right = output.argmax(-1) == want
            # Blank cells are easy and would flatter the score.
            sums[f"right:{name}"] = (right & inked).sum().item()
            sums[f"asked:{name}"] = inked.sum().item()
        return loss * len(pages), sums

    def micro(rng: np.random.Generator) -> Result:
        loss, sums = losses(train_pages(rng, flags.micro))
        return Result(gradients_of(loss, trainer.parameters), sums)

    held_out = [make_page(CHOOSE_SEEDS[index], "hard") for index in range(64)]

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        _, sums = losses(held_out)
        return {name: sums[f"right:{name}"] / sums[f"asked:{name}"] for name in ("glyph", "colour", "cell")}

    def finished() -> bool:
        return trainer.running.get("glyph", 0) > flags.enough

    trainer.run(micro, evaluate, finished=finished)


# ------------------------------------------------------------------------------------------------------- stage 2: text


@dataclass
class Packed:
    """Many questions about one grid, in one row."""

    tokens: list[int]
    asked: list[int]
    """Number of the question for each token of an answer (its `<eos>` too), -1 elsewhere."""
    kinds: list[str]


class Asker:
    """Packs questions exactly as a conversation of several turns is tokenized."""

    def __init__(self, length: int, content: float, content_kinds: Sequence[str], filler: float) -> None:
        self.length, self.filler = length, filler
        shares = {kind: share * (1 - content) for kind, share in KIND_SHARES.items()}
        if content:
            shares |= dict.fromkeys(content_kinds, content / len(content_kinds))
        self.kinds, self.shares = list(shares), np.array(list(shares.values())) / sum(shares.values())
        self.tokenizer = build_tokenizer()
        self.known: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        found = self.known.get(text)
        if found is None:
            found = self.tokenizer.encode(text, add_special_tokens=False)
            # Answers of several words are too many to keep.
            if len(found) <= 2 or text.endswith("?"):
                self.known[text] = found
        return found

    def pack(
        self, glyphs: Sequence[Sequence[str]], colours: Sequence[Sequence[str]], rng: np.random.Generator
    ) -> Packed:
        packed = Packed([], [], [])
        while True:
            kind = self.kinds[rng.choice(len(self.kinds), p=self.shares)]
            text, answer = ask_grid(glyphs, colours, rng, kind)
            # Some unknown words in between, as a user's full sentence would have.
            noise = [UNK] * int(rng.integers(1, 4)) if rng.random() < self.filler else []
            question = noise + self.encode(text)
            answers = [VOCABULARY[word] for word in answer.split()] + [EOS]
            if len(packed.tokens) + len(question) + len(answers) > self.length:
                return packed
            packed.tokens += question + answers
            packed.asked += [-1] * len(question) + [len(packed.kinds)] * len(answers)
            packed.kinds.append(kind)


def ideal_features(
    glyphs: Sequence[Sequence[str]], colours: Sequence[Sequence[str]], table: Tensor, noise: float
) -> Tensor:
    """Build a perfect tower's output: the words of each patch's glyph, colour and cell, added up."""
    n = len(glyphs)
    values = table[CELL_WORDS].view(GRID_MAX, GRID_MAX, -1).clone()
    values[:n, :n] += table[[VOCABULARY[g] for line in glyphs for g in line]].view(n, n, -1)
    values[:n, :n] += table[[VOCABULARY[c] for line in colours for c in line]].view(n, n, -1)
    blank = torch.ones(GRID_MAX, GRID_MAX, dtype=torch.bool)
    blank[:n, :n] = False
    values[blank] += table[VOCABULARY[BLANK]]
    values = values.flatten(0, 1)[patch_cells()]
    return values + noise * torch.randn_like(values)


def shown_patches(rng: np.random.Generator, per_cell: int) -> Tensor:
    """Draw patches of a page in raster order, `per_cell` from each cell (0: all patches)."""
    if not per_cell:
        return torch.arange(VISUAL_TOKENS)
    order = rng.permutation(VISUAL_TOKENS)
    cells = patch_cells().numpy()[order]
    chosen = np.concatenate([order[cells == cell][:per_cell] for cell in range(len(CELLS))])
    return torch.from_numpy(np.sort(chosen))


class Views:
    """Tower outputs of recent pages; each is used for several rows of fresh questions before it is replaced."""

    def __init__(self, model: LlavaForConditionalGeneration, size: int, seed: int) -> None:
        self.model, self.size = model, size
        self.rng = np.random.default_rng([seed, 1])
        self.items: list[tuple[Page, Tensor]] = []

    @torch.no_grad()
    def add(self, count: int) -> None:
        pages = train_pages(self.rng, count)
        device = self.model.device
        with torch.autocast(device.type, torch.bfloat16):
            features = see(self.model, images_of(pages).to(device)).to(torch.bfloat16)
        for page, feature in zip(pages, features, strict=True):
            if len(self.items) < self.size:
                self.items.append((page, feature))
            else:
                self.items[int(self.rng.integers(self.size))] = (page, feature)


def answer_logits(model: LlavaForConditionalGeneration, features: Tensor, places: Tensor, text: Tensor) -> Tensor:
    """Predict `text[:, 1:]` after `<bos>` and the visual tokens that stand at `places` of the whole page."""
    rows, device = len(text), text.device
    embed = model.get_input_embeddings()
    start = embed(torch.full((rows, 1), BOS, device=device))
    inputs = torch.cat([start, features.to(start.dtype), embed(text)], 1)
    after = torch.arange(text.shape[1], device=device) + VISUAL_TOKENS + 1
    positions = torch.cat(
        [torch.zeros(rows, 1, dtype=torch.long, device=device), places + 1, after.expand(rows, -1)], 1
    )
    hidden = model.model.language_model(
        inputs_embeds=inputs,
        position_ids=positions,
        # Plainly causal. Without this the gaps in the positions would be taken for the seams of packed sequences.
        attention_mask={"full_attention": None},
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, -text.shape[1] : -1]).float()


@torch.no_grad()
def calibrate(model: LlavaForConditionalGeneration, table: Tensor) -> None:
    """Scale the projector so that a patch contains the word of its cell once, as ideal tower outputs do."""
    pages = train_pages(np.random.default_rng(0), 16)
    features = see(model, images_of(pages).to(model.device)).cpu()
    words = table[CELL_WORDS][patch_cells()]
    scale = (features * words).sum(-1).mean() / (words * words).sum(-1).mean()
    for parameter in model.model.multi_modal_projector.linear_2.parameters():
        parameter.div_(scale)


def train_text(flags: argparse.Namespace) -> None:
    """Train the text model, stage 2."""
    device = torch.device(flags.device)
    model = build_model(flags.seed)
    if flags.start:
        trained = LlavaForConditionalGeneration.from_pretrained(flags.start, dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    if flags.tower:
        seen = LlavaForConditionalGeneration.from_pretrained(flags.tower, dtype=torch.float32)
        model.model.vision_tower.load_state_dict(seen.model.vision_tower.state_dict())
        model.model.multi_modal_projector.load_state_dict(seen.model.multi_modal_projector.state_dict())
    model.to(device)
    table = word_table(flags.seed)
    if flags.tower and not flags.resume:
        calibrate(model, table)
    trainer = Trainer(flags, model, [model.model.language_model])
    trainer.state.setdefault("grid", flags.grid)
    asker = Asker(flags.length, flags.content, flags.content_kinds, flags.filler)
    views = None if flags.symbols else Views(model, flags.views, flags.seed + trainer.step)

    def rows(rng: np.random.Generator, count: int) -> Iterator[tuple[Sequence, Sequence, Tensor]]:
        for _ in range(count):
            if views is None:
                largest = trainer.state["grid"]
                n = largest if rng.random() < 0.5 else int(rng.integers(2, largest + 1))
                glyphs, colours = contents(n, rng)
                yield glyphs, colours, ideal_features(glyphs, colours, table, flags.noise)
            else:
                page, feature = views.items[int(rng.integers(len(views.items)))]
                yield page.glyphs, page.colours, feature

    def losses(batch: list[tuple[Sequence, Sequence, Tensor]], rng: np.random.Generator, per_cell: int) -> Any:
        packs = [asker.pack(glyphs, colours, rng) for glyphs, colours, _ in batch]
        text = torch.zeros(len(batch), flags.length, dtype=torch.long)
        asked = torch.full((len(batch), flags.length), -1)
        for index, pack in enumerate(packs):
            text[index, : len(pack.tokens)] = torch.tensor(pack.tokens)
            asked[index, : len(pack.asked)] = torch.tensor(pack.asked)
        places = torch.stack([shown_patches(rng, per_cell) for _ in batch])
        features = torch.stack([feature[place] for (*_, feature), place in zip(batch, places.to(device), strict=True)])
        text, asked = text.to(device), asked.to(device)
        with torch.autocast(device.type, torch.bfloat16):
            logits = answer_logits(model, features.to(device), places.to(device), text)
        wanted, number = text[:, 1:], asked[:, 1:]
        mask = number >= 0
        loss = functional.cross_entropy(logits[mask], wanted[mask], reduction="sum")
        sums: dict[str, float] = defaultdict(float)
        sums["count"], sums["loss"] = mask.sum().item(), loss.item()
        right = (logits.argmax(-1) == wanted).cpu()
        sums["right:token"], sums["asked:token"] = (right & mask.cpu()).sum().item(), mask.sum().item()
        # A question counts only when its whole answer is right.
        for index, pack in enumerate(packs):
            wrong = set(number[index].cpu()[mask[index].cpu() & ~right[index]].tolist())
            for question, kind in enumerate(pack.kinds):
                sums[f"asked:{kind}"] += 1
                sums[f"right:{kind}"] += question not in wrong
        return loss, sums

    def micro(rng: np.random.Generator) -> Result:
        per_cell = 0 if rng.random() < flags.whole else flags.per_cell
        loss, sums = losses(list(rows(rng, flags.micro)), rng, per_cell)
        return Result(gradients_of(loss, trainer.parameters), dict(sums))

    held_out: list[tuple[Sequence, Sequence, Tensor]] = []

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        rng = np.random.default_rng(1)
        if not held_out:
            pages = [make_page(CHOOSE_SEEDS[index], "hard") for index in range(48)]
            with torch.autocast(device.type, torch.bfloat16):
                seen = list(see(model, images_of(pages).to(device))) if views is not None else []
            for index, page in enumerate(pages):
                ideal = seen[index] if seen else ideal_features(page.glyphs, page.colours, table, flags.noise)
                held_out.append((page.glyphs, page.colours, ideal))
        # With all patches, as the reader is used.
        sums: dict[str, float] = defaultdict(float)
        for at in range(0, len(held_out), 16):
            for key, value in losses(held_out[at : at + 16], rng, 0)[1].items():
                sums[key] += value
        names = [key.removeprefix("asked:") for key in sums if key.startswith("asked:")]
        scores = {name: sums[f"right:{name}"] / sums[f"asked:{name}"] for name in names}
        totals = [sum(sums[f"{part}:{kind}"] for kind in ADDRESS_KINDS) for part in ("right", "asked")]
        return {"address": totals[0] / totals[1], "loss": sums["loss"] / sums["count"], **scores}

    def before_step() -> None:
        state, running = trainer.state, trainer.running
        if views is not None:
            while len(views.items) < views.size:
                views.add(16)
            views.add(flags.refresh)
        elif state["grid"] < GRID_MAX and min(running.get(kind, 0) for kind in asker.kinds) > flags.advance:
            state["grid"] += 1
            # Forget the score on the smaller grid.
            running.clear()

    trainer.run(micro, evaluate, before_step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    for name, run in (("tower", train_tower), ("text", train_text)):
        stage = stages.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        stage.set_defaults(run=run)
        stage.add_argument("--out", required=True, help="folder for checkpoint, curve and model")
        stage.add_argument("--minutes", type=float, required=True, help="length of the run, resumed parts included")
        stage.add_argument("--seed", type=int, default=0)
        stage.add_argument("--device", default="cpu")
        stage.add_argument("--threads", type=int, default=2, help="micro-batches at a time")
        stage.add_argument("--batch", type=int, default=32)
        stage.add_argument("--micro", type=int, default=16, help="rows of one micro-batch")
        stage.add_argument("--lr", type=float, default=1e-3)
        stage.add_argument("--decay", type=float, default=0.02, help="weight decay")
        stage.add_argument("--muon", action="store_true", help="Muon for the matrices, AdamW for the rest")
        stage.add_argument("--fall", type=float, default=0.4, help="share of the time with a falling rate")
        stage.add_argument("--every", type=float, default=2.0, help="minutes between evaluations")
        stage.add_argument("--keep", type=float, default=2.0, help="minutes between checkpoints")
        stage.add_argument("--resume", action="store_true", help="continue from the checkpoint in --out")
        if name == "tower":
            stage.add_argument("--enough", type=float, default=1.0, help="stop above this glyph accuracy")
        else:
            stage.add_argument("--symbols", action="store_true", help="ideal tower outputs instead of a tower")
            stage.add_argument("--tower", help="model folder of a finished first stage")
            stage.add_argument("--start", help="model folder to start the text model from")
            stage.add_argument("--length", type=int, default=160, help="text tokens of a row")
            stage.add_argument("--per-cell", type=int, default=2, help="patches shown per cell, 0 for all")
            stage.add_argument("--whole", type=float, default=0.0, help="share of micro-batches with all patches")
            stage.add_argument("--grid", type=int, default=3, help="largest grid at first (symbols only)")
            stage.add_argument("--noise", type=float, default=0.03, help="of ideal outputs, per channel")
            stage.add_argument("--content", type=float, default=0.0, help="share of content questions")
            stage.add_argument("--content-kinds", nargs="+", default=list(CONTENT_KINDS), choices=list(CONTENT_KINDS))
            stage.add_argument("--advance", type=float, default=0.6, help="score of the worst kind for larger grids")
            stage.add_argument("--filler", type=float, default=0.03, help="share of questions with unknown words")
            stage.add_argument("--views", type=int, default=768, help="pages kept for questions")
            stage.add_argument("--refresh", type=int, default=8, help="pages drawn anew per step")
    flags = parser.parse_args()
    if flags.batch % flags.micro != 0:
        parser.error("--batch must be a multiple of --micro")
    flags.run(flags)


if __name__ == "__main__":
    main()
