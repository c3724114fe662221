"""Tiny random models of many VLM families, each with its real processor and a chat template.

One function per family builds what ``vlm_safeguard.load`` would give for a checkpoint of it: the
model from its configuration classes, the processor from its own classes with the
processors for pictures that need no torchvision, and a tokenizer that reads byte by byte. The
templates write a picture and its wrapper as the published templates do.
"""

# isort: off
# In the order of the tables that ``tests.family_table`` writes.
from tests.families.base import BOS, FAMILIES, LAYERS, PAD, TEXT, WIDTH, Family, photo
from tests.families.llava_family import llava, llava_onevision
from tests.families.qwen_family import qwen2_vl
from tests.families import internvl_family
from tests.families.gemma_family import gemma3
from tests.families.idefics_family import IDEFICS_TEMPLATE, idefics3, idefics3_split, tiled
from tests.families.mllama_family import mllama
from tests.families import pixtral_family
from tests.families import glm_family
from tests.families import deepseek_family, lfm_family, ovis_family
from tests.families import kimi_family, minicpm_family
from tests.families.refused import REFUSED
# isort: on

__all__ = [
    "BOS",
    "FAMILIES",
    "IDEFICS_TEMPLATE",
    "LAYERS",
    "PAD",
    "REFUSED",
    "TEXT",
    "WIDTH",
    "Family",
    "deepseek_family",
    "gemma3",
    "glm_family",
    "idefics3",
    "idefics3_split",
    "internvl_family",
    "kimi_family",
    "lfm_family",
    "llava",
    "llava_onevision",
    "minicpm_family",
    "mllama",
    "ovis_family",
    "photo",
    "pixtral_family",
    "qwen2_vl",
    "tiled",
]
