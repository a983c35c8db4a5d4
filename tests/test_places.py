"""Places: every weight is a layer or kept with a reason, and putting and restoring are exact."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, tiny_config, tiny_family
from torch import Tensor, nn
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.places import (
    Place,
    expert_inputs,
    find_embedding,
    find_head,
    find_places,
    why_kept,
)

families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def models() -> Callable[[str], Model]:
    """Models by family, each built once; tests must leave the reference in place."""
    built: dict[str, Model] = {}

    def model(family: str) -> Model:
        if family not in built:
            built[family] = tiny_family(family)
        return built[family]

    return model


def digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        found.update(f"{name}{tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().view(torch.uint8).numpy())
    return found.hexdigest()


def logits(model: Model) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.module(torch.arange(5, 25)[None]).logits
    return found


# ------------------------------------------------------------------------------ all families


@families
def test_layers_and_kept_weights_are_all_there_is_once(
    models: Callable[[str], Model], family: str
) -> None:
    model = models(family)
    parameters = dict(model.module.named_parameters())  # a shared one once
    covered = dict.fromkeys(parameters.values(), 0)
    for name in model.kept:
        covered[parameters[name]] += parameters[name].numel()
    for layer in model.layers:
        covered[model.places[layer.name].parameter] += layer.weights
    assert all(count == parameter.numel() for parameter, count in covered.items())
    assert len({layer.name for layer in model.layers}) == len(model.layers)
    assert set(model.why_kept) == set(model.kept)


@families
def test_every_weight_of_a_known_family_is_recognised(
    models: Callable[[str], Model], family: str
) -> None:
    model = models(family)
    assert model.unrecognised == {}
    known = {"embedding", "embedding, shared with the output head", "output head", "norm", "bias"}
    known |= {"router"} if family == "mixtral" or family.endswith("moe") else set()
    assert set(model.why_kept.values()) <= known
    matrices = [name for name, tensor in model.kept.items() if tensor.ndim > 1]
    for name in matrices:
        assert model.why_kept[name] not in ("norm", "bias")


@families
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_is_kept_and_counted_once_tied_or_not(family: str, tied: bool) -> None:
    model = tiny_family(family, tie_word_embeddings=tied)
    reasons = list(model.why_kept.values())
    assert reasons.count("embedding, shared with the output head") == tied
    assert reasons.count("output head") == (not tied)
    head = model.module.get_output_embeddings().weight
    assert (head is model.module.get_input_embeddings().weight) == tied
    assert all(model.places[layer.name].parameter is not head for layer in model.layers)
    embedding = model.module.get_input_embeddings()
    named = {module: name for name, module in model.module.named_modules()}
    heads_name = named[model.module.get_output_embeddings()]
    assert model.embedding == Layer(named[embedding], 71, 64, tied=heads_name if tied else "")
    assert model.head == (None if tied else Layer(heads_name, 71, 64))
    assert model.places[named[embedding]].parameter is embedding.weight
    assert tied or model.places[heads_name].parameter is head


@families
def test_a_weight_put_in_place_is_the_one_that_the_model_computes_with(
    models: Callable[[str], Model], family: str
) -> None:
    model = models(family)
    before, reference = digest(model.module), logits(model)
    for name, original in model.originals.items():
        assert model.places[name].weight.data_ptr() == original.data_ptr()
    for layer in model.every_layer:
        place = model.places[layer.name]
        assert place.weight.shape == (layer.rows, layer.columns)
        other = torch.randn(layer.rows, layer.columns)
        place.put(other)
        assert torch.equal(place.weight, other)
    for name, original in model.originals.items():  # none was written to
        assert original.data_ptr() != model.places[name].weight.data_ptr()
    assert not torch.allclose(logits(model), reference, atol=0.1)
    model.restore()
    assert digest(model.module) == before
    assert torch.equal(logits(model), reference)
    for name, original in model.originals.items():
        assert model.places[name].weight.data_ptr() == original.data_ptr()


@families
def test_the_weight_multiplies_the_layers_input(
    models: Callable[[str], Model], family: str
) -> None:
    """Rows are outputs and columns inputs, however the module stores the weight."""
    model = models(family)
    for name, place in model.places.items():
        if place.expert is None and name != model.embedding.name:  # type: ignore[union-attr]
            module: Any = model.module.get_submodule(name)
            x = torch.randn(3, place.weight.shape[1])
            bias = 0 if module.bias is None else module.bias
            torch.testing.assert_close(module(x), x @ place.weight.T + bias)


@families
@pytest.mark.parametrize("tied", [True, False])
def test_an_embedding_put_in_place_is_looked_up_and_a_tied_head_multiplies_by_it(
    family: str, tied: bool
) -> None:
    model = tiny_family(family, tie_word_embeddings=tied)
    assert model.embedding is not None
    before, other = digest(model.module), torch.randn(71, 64)
    embedding, head = model.module.get_input_embeddings(), model.module.get_output_embeddings()
    tokens, x = torch.tensor([3, 70, 3]), torch.randn(2, 64)
    scale = getattr(embedding, "embed_scale", 1)  # Gemma's
    was = head(x)
    model.places[model.embedding.name].put(other)
    assert torch.equal(embedding(tokens), other[tokens] * scale)
    assert torch.equal(head(x), x @ other.T if tied else was)
    model.restore()
    assert digest(model.module) == before


# ------------------------------------------------------------------------------ one place


def test_a_transposed_place_points_at_the_tensor_and_is_not_a_copy() -> None:
    parameter = nn.Parameter(torch.randn(3, 5))
    place = Place(parameter, parameter.data, transposed=True)
    other = torch.randn(5, 3)
    place.put(other)
    assert parameter.shape == (3, 5)
    assert parameter.data_ptr() == other.data_ptr()
    place.put(place.original)
    assert parameter.data_ptr() == place.loaded.data_ptr()
    assert parameter.is_contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [slice(None), slice(4), slice(4, None), slice(1, None, 2)])
def test_an_expert_leaves_all_others_and_its_other_rows(transposed: bool, rows: slice) -> None:
    stack = torch.randn(3, 6, 8) if transposed else torch.randn(3, 8, 6)
    parameter = nn.Parameter(stack.clone())
    place = Place(parameter, parameter.data, transposed, 1, rows)
    other = torch.randn(place.weight.shape)
    place.put(other)
    assert torch.equal(place.weight, other)
    assert torch.equal(place.loaded, stack)
    expected = stack.clone()
    (expected[1].t() if transposed else expected[1])[rows] = other
    assert torch.equal(parameter.data, expected)
    place.put(place.original)
    assert torch.equal(parameter.data, stack)
    place.restore()
    assert parameter.data_ptr() == place.loaded.data_ptr()


def test_a_gradient_has_the_weights_orientation() -> None:
    model = tiny_family("gpt2")
    place = model.places["transformer.h.0.mlp.c_fc"]
    gradient = torch.arange(64 * 256.0).reshape(64, 256)
    assert torch.equal(place.part(gradient), gradient.T)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_experts_are_three_matrices_each_gate_above_up(family: str) -> None:
    model = tiny_family(family)
    experts = model.module.model.layers[1].mlp.experts
    half = experts.gate_up_proj.shape[1] // 2
    for expert in range(4):
        path = f"model.layers.1.mlp.experts.{expert}"
        gate, up, down = (model.originals[f"{path}.{word}_proj"] for word in ("gate", "up", "down"))
        assert torch.equal(gate, experts.gate_up_proj[expert, :half])
        assert torch.equal(up, experts.gate_up_proj[expert, half:])
        assert torch.equal(down, experts.down_proj[expert])


def test_experts_stored_in_turns_and_transposed_are_found() -> None:
    """As GPT-OSS does: `(experts, columns, rows)`, gate and up row by row in turns, with biases."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    torch.manual_seed(0)
    config = GptOssConfig(hidden_size=6, intermediate_size=4, num_local_experts=2)
    config._experts_implementation = "eager"
    experts = GptOssExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)

    class Wrapper(PreTrainedModel):
        config_class = GptOssConfig

        def __init__(self) -> None:
            super().__init__(config)
            self.experts = experts

        def get_output_embeddings(self) -> None:
            return None

    places = find_places(Wrapper())
    gate, up = places["experts.1.gate_proj"].weight, places["experts.1.up_proj"].weight
    assert torch.equal(gate, experts.gate_up_proj[1].T[::2])
    assert torch.equal(up, experts.gate_up_proj[1].T[1::2])
    x, chosen = torch.randn(5, 6), torch.tensor([[1], [0], [1], [1], [0]])
    with torch.no_grad():
        found = {expert: (a, b) for expert, a, b in expert_inputs(experts, x, chosen)}
        out = experts(x, chosen, torch.ones(5, 1))
    inputs, inner = found[1]
    assert torch.equal(inputs, x[[0, 2, 3]])
    down = places["experts.1.down_proj"].weight
    torch.testing.assert_close(inner @ down.T + experts.down_proj_bias[1], out[[0, 2, 3]])


# ------------------------------------------------------------------------------ what is kept


def test_routers_are_kept_also_as_linears() -> None:
    model = tiny_family("qwen2_moe")
    routers = {name for name, reason in model.why_kept.items() if reason == "router"}
    assert routers == {
        f"model.layers.{block}.mlp.{name}.weight"
        for block in (0, 1)
        for name in ("gate", "shared_expert_gate")
    }


def test_a_gate_without_experts_beside_it_is_a_layer() -> None:
    module = tiny_family("llama").module
    module.model.layers[0].mlp.gate = nn.Linear(64, 4)
    assert "model.layers.0.mlp.gate" in find_places(module)


def test_a_lookup_that_is_no_plain_table_is_no_embedding_and_a_head_of_two_matrices_no_head() -> (
    None
):
    model = tiny_family("llama").module
    model.set_input_embeddings(nn.Linear(71, 64, bias=False))
    assert find_embedding(model) == {}
    model.set_output_embeddings(nn.Bilinear(64, 1, 71))
    assert find_head(model) == {}


def test_only_the_text_model_of_a_multimodal_wrapper_is_searched() -> None:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    config = LlavaConfig(text_config=tiny_config("llama"), vision_config=vision)
    module = LlavaForConditionalGeneration(config)
    layers = find_places(module)
    assert len(layers) == 14
    assert all(name.startswith("model.language_model.layers.") for name in layers)
    assert set(find_embedding(module)) == {"model.language_model.embed_tokens"}
    assert set(find_head(module)) == {"lm_head"}
    names = [name for name, _ in module.named_parameters() if name[:-7] not in layers]
    reasons = why_kept(module, names)
    assert set(reasons.values()) == {
        "embedding",
        "output head",
        "norm",
        "vision tower, outside the text model",
        "multi modal projector, outside the text model",
    }
    tower = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    assert reasons[tower] == "vision tower, outside the text model"


def test_an_unknown_kind_of_weight_is_kept_and_said() -> None:
    class Strange(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cube = nn.Parameter(torch.zeros(4, 64, 64))
            self.inner = nn.Linear(64, 64)
            self.scale = nn.Parameter(torch.zeros(64))
            self.register_buffer("table", torch.zeros(8, 8))

    module = tiny_family("llama").module
    module.model.layers[1].strange = Strange()
    path = "model.layers.1.strange"
    assert f"{path}.inner" in find_places(module)
    names = [f"{path}.{leaf}" for leaf in ("cube", "scale", "table")]
    assert why_kept(module, names) == {
        names[0]: "not recognised: 3-D 'cube' of Strange",
        names[1]: "vector",
        names[2]: "buffer",
    }


def test_a_weight_that_two_linears_share_is_one_layer() -> None:
    module = tiny_family("llama").module
    first, second = (block.mlp.up_proj for block in module.model.layers)
    second.weight = first.weight
    places = find_places(module)
    assert "model.layers.1.mlp.up_proj" not in places
    places["model.layers.0.mlp.up_proj"].put(torch.ones(128, 64))
    assert torch.equal(second.weight, torch.ones(128, 64))
