"""The reader that ships with the package, as a model of SGLang: its own Qwen2 behind transformers' SigLIP tower.

SGLang knows LLaVA with a CLIP tower alone, and runs other towers through transformers without its prefix cache. As a
model of its own the reader is served like any other: prefixes, chunks and images included.
"""

from array import array
from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.managers.mm_utils import general_mm_embed_routine, pad_mm_tokens
from sglang.srt.managers.schedule_batch import Modality, MultimodalProcessorOutput
from sglang.srt.models.qwen2 import Qwen2ForCausalLM
from sglang.srt.multimodal.processors.base_processor import BaseMultimodalProcessor, MultimodalSpecialTokens
from torch import Tensor, nn
from transformers import SiglipVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector


class ServedReader(nn.Module):
    """LLaVA of SigLIP and Qwen2."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.layer = config.vision_feature_layer
        # On a CPU SGLang sets this, and its Qwen2 takes heads to be as wide as they are in most models where it is set.
        vars(config.text_config).pop("original_num_attention_heads", None)
        self.vision_tower = SiglipVisionModel(config.vision_config)
        self.multi_modal_projector = LlavaMultiModalProjector(config)
        self.language_model = Qwen2ForCausalLM(config.text_config, quant_config, "language_model")

    def pad_input_ids(self, input_ids: "array[int]", mm_inputs: Any) -> Any:
        """Mark the tokens of each image by what is in it, so that prefixes with other images differ."""
        return pad_mm_tokens(input_ids, mm_inputs)

    def get_image_feature(self, items: list[Any]) -> Tensor:
        """Embed images: ``[tokens, hidden]``."""
        weight = self.multi_modal_projector.linear_1.weight
        pixels = torch.cat([item.feature for item in items]).to(weight)
        states = self.vision_tower(pixels, output_hidden_states=True).hidden_states[self.layer]
        embedded: Tensor = self.multi_modal_projector(states).flatten(0, 1)
        return embedded

    @torch.no_grad()
    def forward(self, input_ids: Tensor, positions: Tensor, forward_batch: Any, **more: Any) -> Any:
        """Run the text model over tokens and images."""
        return general_mm_embed_routine(
            input_ids=input_ids,
            forward_batch=forward_batch,
            language_model=self.language_model,
            data_embedding_funcs={Modality.IMAGE: self.get_image_feature},
            positions=positions,
        )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Take the weights of the file by the names that transformers gives them."""
        own = dict(self.named_parameters())
        text = []
        for name, weight in weights:
            if name.startswith("language_model."):
                text.append((name.removeprefix("language_model."), weight))
            else:
                own[name].data.copy_(weight)
        self.language_model.load_weights(text)


class ServedReaderProcessor(BaseMultimodalProcessor):
    """Text and images by the processor of the reader."""

    models = (ServedReader,)
    gpu_image_decode = False

    def __init__(self, hf_config: Any, server_args: Any, processor: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(hf_config, server_args, processor, *args, **kwargs)
        names = {"image_token": processor.image_token, "image_token_id": hf_config.image_token_id}
        self.mm_tokens = MultimodalSpecialTokens(**names).build(processor)

    async def process_mm_data_async(
        self, image_data: list[Any], audio_data: Any, input_text: str, request_obj: Any, **kwargs: Any
    ) -> MultimodalProcessorOutput:
        """Turn a prompt into ids, with one placeholder for each token of an image, and pixels."""
        loaded = await self.load_mm_data(prompt=input_text, image_data=image_data, multimodal_tokens=self.mm_tokens)
        items, ids, _ = await self.process_and_combine_mm_data_async(loaded, self.mm_tokens)
        return MultimodalProcessorOutput(
            input_ids=ids.tolist(), mm_items=items, im_token_id=self.mm_tokens.image_token_id
        )


EntryClass = ServedReader
