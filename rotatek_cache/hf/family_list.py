"""The list of what transformers has that reads images, and what attach does with each: `docs/families.md`.

python -m rotatek_cache.hf.family_list      # prints the tables
"""

from collections.abc import Sequence

import transformers
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

from rotatek_cache.hf.families import FAMILIES, PARTS, refusal


def model_types() -> list[str]:
    """List the model types that this transformers has for text with images, videos or sound."""
    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def default_config(model_type: str) -> PreTrainedConfig:
    """Make the default config of a model type, once its modules are imported: they may bring cache layers."""
    getattr(transformers, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[model_type])
    return CONFIG_MAPPING[model_type]()


def untried() -> list[str]:
    """List the model types with images that are neither in the table nor refused."""
    rest = set(model_types()) - FAMILIES.keys() - PARTS.keys()
    configs = {name: default_config(name) for name in rest}
    return sorted(name for name, config in configs.items() if reads_images(config) and not refusal(config))


def reads_images(config: PreTrainedConfig) -> bool:
    """Tell whether a config has a part for images, of a name that says so."""
    return any(key.startswith(("vision", "vq")) for key in config.sub_configs) or config.is_encoder_decoder


def tables() -> str:
    """Write what attach does with each model type, as tables of Markdown."""
    listed = [_listed(name) for name in model_types() if name in FAMILIES or name in PARTS]
    others = [name for name in model_types() if name not in FAMILIES and name not in PARTS]
    refused = [(f"`{name}`", reason) for name in others if (reason := _reason(name))]
    return "\n".join(
        [
            "## What works",
            "",
            *_table(("`model_type`", "visual tokens of", "layers compressed", "VisionZip", "DivPrune"), listed),
            "",
            "## What is refused",
            "",
            *_table(("`model_type`", "why"), refused),
            "",
            "## What was not tried",
            "",
            f"{', '.join(f'`{name}`' for name in untried())}.",
        ]
    )


def _listed(name: str) -> tuple[str, ...]:
    if name in PARTS:
        return f"`{name}`", f"its `{PARTS[name]}`", "", "", ""
    family, text = FAMILIES[name], default_config(name).get_text_config(decoder=True)
    kinds = [type(layer) for layer in DynamicCache(config=text).layers]
    full = kinds.count(DynamicLayer)
    linear = any(kind.__name__ == "LinearAttentionLayer" for kind in kinds)
    return (
        f"`{name}`",
        "images, videos" if len(family.placeholders) > 1 else "images",
        "all" if full == len(kinds) else f"{full} of {len(kinds)}",
        "yes" if family.encoder and not linear else "",
        "yes" if family.features and not linear else "",
    )


def _reason(name: str) -> str:
    config = default_config(name)
    return refusal(config) or ("" if reads_images(config) else "reads no images")


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (titles, ["---"] * len(titles), *rows)]


if __name__ == "__main__":
    print(tables())  # noqa: T201
