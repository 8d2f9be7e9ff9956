"""The reader: LLaVA with a SigLIP tower and a Qwen2 text model, small enough to train on two CPU cores.

`build_model` and `build_processor` need no download; both save with `save_pretrained` and load again through
`AutoModelForImageTextToText` and `AutoProcessor`.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from evals.reader.pages import CELL, COLOUR_NAMES, COLUMN_NAMES, GLYPHS, GRID_MAX, IMAGE_SIZE, address

PATCH = 8
SIDE = IMAGE_SIZE // PATCH
VISUAL_TOKENS = SIDE**2
HIDDEN = 256

PAD, UNK, BOS, EOS, IMAGE = range(5)
SPECIAL = ("<pad>", "<unk>", "<bos>", "<eos>", "<image>")
BLANK = "blank"
"""What the tower calls a cell beyond the grid; never asked for."""
CELLS = tuple(address(row, column) for row in range(GRID_MAX) for column in range(GRID_MAX))
ROWS = tuple(f"row {row + 1}" for row in range(GRID_MAX))
COLUMNS = tuple(f"column {name}" for name in COLUMN_NAMES)
WORDS = ("glyph", "colour", "colours", "where", "count", "compare", "same", "different", BLANK)
NUMBERS = tuple(str(number) for number in range(10, GRID_MAX**2 + 1))
TOKENS = (*SPECIAL, *WORDS, *CELLS, *ROWS, *COLUMNS, *GLYPHS, *COLOUR_NAMES, *NUMBERS)
VOCABULARY = {token: index for index, token in enumerate(TOKENS)}

# What a turn is made of: its images, then its text.
TURN = (
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
)
# A conversation is `<bos>`, then per turn the images, the question, the answer and `<eos>`. White space and the
# punctuation below carry no meaning, so the line breaks here are for human readers only.
AFTER_TURN = "{% if message['role'] == 'assistant' %}{{ eos_token + '\n' }}{% else %}{{ '\n' }}{% endif %}"


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build a word-level tokenizer: one token per cell, row, column, glyph, colour and number."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s?.,!:;]+"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(rf"row [1-{GRID_MAX}]\b|column [A-{COLUMN_NAMES[-1]}]\b|\S+"), behavior="removed", invert=True
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=4096,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def build_processor() -> LlavaProcessor:
    """Build the image processor without torchvision, tokenizer and chat template."""
    return join_processor(build_tokenizer(), AFTER_TURN)


def join_processor(tokenizer: PreTrainedTokenizerBase, after_turn: str) -> LlavaProcessor:
    """Join a tokenizer to the image processor of the pages; `after_turn` is what the chat template ends a turn with."""
    image_processor = SiglipImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token="<image>",
        chat_template="{{ bos_token }}{% for message in messages %}" + TURN + after_turn + "{% endfor %}",
    )


def build_config(head_dim: int = 128) -> LlavaConfig:
    """Build the config with the sizes of the reader."""
    vision = SiglipVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=768,
        num_hidden_layers=3,
        num_attention_heads=8,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    text = Qwen2Config(
        vocab_size=len(TOKENS),
        hidden_size=HIDDEN,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_dim,
        max_position_embeddings=4096,
        # Most channels then turn slowly enough to compare contents over several hundred visual tokens.
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        initializer_range=0.03,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


def build_model(seed: int = 0, head_dim: int = 128) -> LlavaForConditionalGeneration:
    """Build the untrained reader."""
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(build_config(head_dim))
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(word_table(seed))
        _start_tower_as_convolution(model.model.vision_tower)
        _start_text_as_matcher(model)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, do_sample=False, max_new_tokens=16
    )
    return model


def word_table(seed: int = 0) -> Tensor:
    """Draw the first word embeddings, of length about 1: a cell is the sum of its row and its column.

    The tower learns to say what a patch shows in these words, so it depends on nothing that is trained later.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(len(TOKENS), HIDDEN, generator=generator) / math.sqrt(HIDDEN)
    rows = [VOCABULARY[name] for name in ROWS]
    columns = [VOCABULARY[name] for name in COLUMNS]
    for index, name in enumerate(CELLS):
        row, column = divmod(index, GRID_MAX)
        table[VOCABULARY[name]] = 0.6 * (table[rows[row]] + table[columns[column]]) + 0.5 * table[VOCABULARY[name]]
    return table


def patch_cells() -> Tensor:
    """Find, for each patch in raster order, the index in `CELLS` of the cell that it lies in."""
    line = torch.arange(SIDE) * PATCH // CELL
    return (line[:, None] * GRID_MAX + line[None]).flatten()


def _waves() -> Tensor:
    """Return the angular frequencies of the position table, for wavelengths from 2.5 to 40 patches."""
    return 2 * math.pi / torch.logspace(math.log10(2.5), math.log10(40), HIDDEN // 4)


def _start_tower_as_convolution(tower: nn.Module) -> None:
    """Set sin-cos positions; the eight heads of the first two layers look at a patch's eight neighbours.

    From the default start a tower this small spends most of a short training on finding out what lies next to what.
    """
    waves = _waves()
    count = len(waves)
    angle = torch.arange(SIDE)[:, None] * waves
    wave = torch.cat([angle.sin(), angle.cos()], 1) * 0.7
    table = torch.cat([wave[:, None].expand(SIDE, SIDE, -1), wave[None].expand(SIDE, SIDE, -1)], -1)
    named = dict(tower.named_parameters())
    next(p for name, p in named.items() if "position_embedding" in name).copy_(table.flatten(0, 1))
    offsets = [(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]
    width = HIDDEN // len(offsets)
    for layer in (0, 1):
        query = next(p for name, p in named.items() if f"layers.{layer}.self_attn.q_proj.weight" in name)
        key = next(p for name, p in named.items() if f"layers.{layer}.self_attn.k_proj.weight" in name)
        for head, offset in enumerate(offsets):
            at = head * width
            for axis, shift in enumerate(offset):
                for wave_index in range(head, count, len(offsets)):
                    sine, cosine = axis * 2 * count + wave_index, axis * 2 * count + count + wave_index
                    turn = shift * waves[wave_index]
                    # The query is the position moved by the offset; the key is the position itself.
                    query[at, sine] += 1.3 * turn.cos()
                    query[at, cosine] += 1.3 * turn.sin()
                    query[at + 1, cosine] += 1.3 * turn.cos()
                    query[at + 1, sine] -= 1.3 * turn.sin()
                    key[at, sine] += 1.3
                    key[at + 1, cosine] += 1.3
                    at += 2


def _start_text_as_matcher(model: LlavaForConditionalGeneration) -> None:
    """Start queries close to keys, so that a token first attends to tokens that resemble it."""
    text = model.config.text_config
    groups = text.num_attention_heads // text.num_key_value_heads
    for layer in model.model.language_model.layers:
        key = layer.self_attn.k_proj.weight
        shared = key.view(text.num_key_value_heads, 1, -1, HIDDEN).expand(-1, groups, -1, -1).reshape(-1, HIDDEN)
        layer.self_attn.q_proj.weight.mul_(0.6).add_(shared, alpha=0.8)


def save_reader(model: LlavaForConditionalGeneration, folder: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Write model and processor; the weights are rounded to `dtype` in the file only."""
    previous = next(model.parameters()).dtype
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    model.to(dtype).save_pretrained(folder)
    model.to(previous).load_state_dict(state)
    build_processor().save_pretrained(folder)
