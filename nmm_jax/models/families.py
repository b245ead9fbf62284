"""Which class a config's `model.family` is."""

from ml_collections import ConfigDict

from nmm_jax.models.aim import PixelModel, PixelTextModel
from nmm_jax.models.contrastive import ContrastiveModel
from nmm_jax.models.model import LanguageModel, Model

FAMILIES: dict[str, type[Model]] = {
    "early_fusion": LanguageModel,
    "late_fusion": LanguageModel,
    "contrastive": ContrastiveModel,
    "aim": PixelModel,
    "aimv2": PixelTextModel,
}


def build(config: ConfigDict) -> Model:
    """The model a config describes, without allocating any of it."""
    return FAMILIES[config.model.family].of(config)
