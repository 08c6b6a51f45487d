"""The four published sizes: every tensor's name and shape, and the number of parameters, against transformers."""

import json
import math
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from flax import nnx

from sif_jax.models.qwen2_5_vl.config import Qwen2_5_VLConfig
from sif_jax.models.qwen2_5_vl.names import checkpoint_tensors, hub_name, transformers_name
from sif_jax.models.qwen2_5_vl.weights import abstract_model

MODELS = Path(__file__).parents[1] / "configs" / "models"
# As the hub counts them.
PARAMETERS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336, "72B": 73_410_777_344}
every_size = pytest.mark.parametrize("size", PARAMETERS)


def directory(size: str) -> Path:
    return MODELS / f"Qwen2.5-VL-{size}-Instruct"


def published(size: str) -> dict:
    return json.loads((directory(size) / "config.json").read_text())


@cache
def our_shapes(size: str) -> dict[str, tuple[int, ...]]:
    config = Qwen2_5_VLConfig.from_directory(directory(size))
    tensors = checkpoint_tensors(config, nnx.state(abstract_model(config, param_dtype="bfloat16")))
    return {name: tensor.shape for tensor in tensors.values() for name in tensor.names}


@cache
def their_shapes(size: str) -> dict[str, tuple[int, ...]]:
    config = transformers.Qwen2_5_VLConfig.from_pretrained(directory(size))
    with torch.device("meta"):
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return {name: tuple(value.shape) for name, value in model.named_parameters()}


@every_size
def test_every_tensor_of_a_published_size_has_the_name_and_shape_of_transformers(size):
    ours, theirs = our_shapes(size), their_shapes(size)
    assert {transformers_name(name): shape for name, shape in ours.items()} == theirs
    assert {hub_name(name): shape for name, shape in theirs.items()} == ours


@every_size
def test_a_published_size_has_the_published_number_of_parameters(size):
    assert sum(map(math.prod, our_shapes(size).values())) == PARAMETERS[size]


def test_only_3b_ties_its_head():
    assert [size for size in PARAMETERS if "lm_head.weight" not in our_shapes(size)] == ["3B"]


@every_size
def test_the_layout_that_transformers_5_writes_says_the_same(size, tmp_path):
    transformers.Qwen2_5_VLConfig.from_pretrained(directory(size)).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "hidden_size" not in written
    assert "rope_parameters" in written["text_config"]
    assert Qwen2_5_VLConfig.from_directory(tmp_path) == Qwen2_5_VLConfig.from_directory(directory(size))


@every_size
@pytest.mark.parametrize(
    "kind", [{"type": "mrope"}, {"rope_type": "default", "type": "default"}], ids=["mrope", "default"]
)
def test_both_published_spellings_of_the_rotary_embedding_say_the_same(size, kind):
    raw = published(size)
    respelt = raw | {"rope_scaling": kind | {"mrope_section": raw["rope_scaling"]["mrope_section"]}}
    assert Qwen2_5_VLConfig.from_dict(respelt) == Qwen2_5_VLConfig.from_dict(raw)
