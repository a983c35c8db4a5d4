"""Layers and groups: names, weights, depth, and which siblings stand together."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.layers import Layer, LayerGroup, group_layers

ATTENTION = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj")


def layers_named(*names: str) -> list[Layer]:
    return [Layer(name, 4, 8) for name in names]


def group_names(layers: list[Layer], *ties: tuple[str, ...]) -> list[str]:
    return [group.name for group in group_layers(layers, ties)]


def test_a_layer_counts_rows_times_columns() -> None:
    assert Layer("a.b", 576, 1536).weights == 884_736


def test_a_layer_and_a_group_are_frozen() -> None:
    layer = Layer("a.b", 2, 3)
    with pytest.raises(FrozenInstanceError):
        layer.rows = 5  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        LayerGroup((layer,)).layers = ()  # type: ignore[misc]


def test_a_group_of_one_has_its_layers_name() -> None:
    assert LayerGroup((Layer("model.layers.3.mlp.down_proj", 2, 3),)).name == (
        "model.layers.3.mlp.down_proj"
    )


def test_a_group_is_named_by_its_first_layer_and_the_last_names_of_the_others() -> None:
    group = LayerGroup(tuple(layers_named("model.layers.0.attn.q", "model.layers.0.attn.k", "v")))
    assert group.name == "model.layers.0.attn.q+k+v"


def test_a_group_weighs_what_its_layers_weigh() -> None:
    assert LayerGroup((Layer("a.q", 576, 576), Layer("a.k", 192, 576))).weights == 442_368


@pytest.mark.parametrize(
    ("name", "depth", "kind"),
    [
        ("model.layers.0.self_attn.o_proj", 0, "self_attn.o_proj"),
        ("model.layers.29.mlp.down_proj", 29, "mlp.down_proj"),
        ("transformer.h.11.c_attn", 11, "c_attn"),
        ("model.layers.7.mlp.experts.3.w2", 7, "mlp.experts.3.w2"),
        ("model.layer2.7.fc1", 7, "fc1"),
        ("lm_head", None, "lm_head"),
        ("model.head2.proj", None, "model.head2.proj"),
    ],
)
def test_depth_is_the_first_whole_number_and_kind_is_what_stands_below_it(
    name: str, depth: int | None, kind: str
) -> None:
    group = LayerGroup((Layer(name, 2, 2),))
    assert (group.depth, group.kind) == (depth, kind)


def test_groups_of_the_same_place_in_two_blocks_are_of_one_kind() -> None:
    layers = layers_named(*(f"m.{block}.attn.{name}" for block in (0, 12) for name in ATTENTION))
    first, second = group_layers(layers, [ATTENTION])
    assert first.kind == second.kind == "attn.q_proj+k_proj+v_proj"
    assert (first.depth, second.depth) == (0, 12)


def test_without_ties_every_layer_is_a_group() -> None:
    layers = layers_named("m.0.q_proj", "m.0.k_proj", "m.0.o_proj")
    assert group_layers(layers, []) == tuple(LayerGroup((layer,)) for layer in layers)


def test_tied_siblings_form_one_group_at_the_place_of_the_first() -> None:
    layers = layers_named("m.0.q_proj", "m.0.o_proj", "m.0.k_proj", "m.0.v_proj", "m.1.q_proj")
    assert group_names(layers, ATTENTION) == [
        "m.0.q_proj+k_proj+v_proj",
        "m.0.o_proj",
        "m.1.q_proj",
    ]


def test_a_tie_does_not_reach_across_parents() -> None:
    layers = layers_named("m.0.mlp.gate_proj", "m.0.shared.up_proj", "m.1.mlp.up_proj")
    assert group_names(layers, MLP) == [layer.name for layer in layers]


def test_a_tie_holds_with_a_member_missing() -> None:
    assert group_names(layers_named("m.0.k_proj", "m.0.v_proj"), ATTENTION) == ["m.0.k_proj+v_proj"]


def test_two_ties_of_one_parent_stay_two_groups() -> None:
    layers = layers_named("m.0.q_proj", "m.0.gate_proj", "m.0.k_proj", "m.0.up_proj")
    assert group_names(layers, ATTENTION, MLP) == ["m.0.q_proj+k_proj", "m.0.gate_proj+up_proj"]


def test_a_layer_at_the_root_can_be_tied() -> None:
    assert group_names(layers_named("q_proj", "k_proj"), ATTENTION) == ["q_proj+k_proj"]


names = st.builds(
    "{}.{}.{}".format,
    st.sampled_from(["a", "b"]),
    st.integers(0, 3),
    st.sampled_from([*ATTENTION, *MLP, "o_proj", "down_proj"]),
)


@given(
    st.lists(names, unique=True, max_size=30),
    st.lists(st.sampled_from([ATTENTION, MLP]), unique=True),
)
@settings(deadline=None, max_examples=100)
def test_groups_hold_every_layer_once_in_the_order_of_their_first(
    found: list[str], ties: list[tuple[str, ...]]
) -> None:
    layers = layers_named(*found)
    groups = group_layers(layers, ties)
    assert sorted(layer.name for group in groups for layer in group.layers) == sorted(found)
    firsts = [found.index(group.layers[0].name) for group in groups]
    assert firsts == sorted(firsts)
    assert len({group.name for group in groups}) == len(groups)
    for group in groups:
        places = [found.index(layer.name) for layer in group.layers]
        assert places == sorted(places)
        lasts = {layer.name.rpartition(".")[2] for layer in group.layers}
        assert len({layer.name.rpartition(".")[0] for layer in group.layers}) == 1
        assert len(lasts) == 1 or any(lasts <= set(tie) for tie in ties)
    for tie in ties:  # and none is split
        parents = [
            layer.name.rpartition(".")[0]
            for group in groups
            for layer in group.layers[:1]
            if layer.name.rpartition(".")[2] in tie
        ]
        assert len(parents) == len(set(parents))


# ------------------------------------------------------------------------------ experts


def expert_layers(*blocks: int) -> list[Layer]:
    return layers_named(
        *(
            f"m.{block}.mlp.experts.{expert}.{name}_proj"
            for block in blocks
            for expert in (0, 1)
            for name in ("gate", "up", "down")
        )
    )


def test_fused_experts_of_a_block_are_one_group_named_by_their_module() -> None:
    layers = [*expert_layers(0, 3), *layers_named("m.0.mlp.shared_expert.gate_proj")]
    groups = group_layers(layers, [MLP], fuse_experts=True)
    assert [group.name for group in groups] == [
        "m.0.mlp.experts",
        "m.3.mlp.experts",
        "m.0.mlp.shared_expert.gate_proj",
    ]
    assert [len(group.layers) for group in groups] == [6, 6, 1]
    assert [(group.depth, group.kind) for group in groups[:2]] == [
        (0, "mlp.experts"),
        (3, "mlp.experts"),
    ]


def test_experts_that_are_not_fused_are_grouped_each_alone() -> None:
    assert group_names(expert_layers(0), MLP) == [
        "m.0.mlp.experts.0.gate_proj+up_proj",
        "m.0.mlp.experts.0.down_proj",
        "m.0.mlp.experts.1.gate_proj+up_proj",
        "m.0.mlp.experts.1.down_proj",
    ]


def test_shared_experts_are_no_experts_of_a_block() -> None:
    names = ("m.0.shared_experts.up_proj", "m.0.experts_norm.3.proj", "m.0.experts.gate")
    groups = group_layers(layers_named(*names), [], fuse_experts=True)
    assert [group.name for group in groups] == list(names)


def test_shapes_stand_for_every_layer_once() -> None:
    layers = (
        Layer("m.experts.0.up_proj", 8, 4),
        Layer("m.experts.0.down_proj", 4, 8),
        Layer("m.experts.1.up_proj", 8, 4),
        Layer("embedding", 8, 4, tied="head"),
    )
    shapes = LayerGroup(layers).shapes
    assert shapes == ((layers[0], 2), (layers[1], 1), (layers[3], 1))
