"""A GGUF export loaded again is the candidate to the bit; a damaged one is named in one line."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import gguf
import pytest
import torch
from byte_level import byte_level_model
from gguf import GGUFReader

import mpsearch as mps
from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.errors import ModelError
from mpsearch.evaluate import Bench
from mpsearch.export import tensor_bytes
from mpsearch.export.gguf import is_gguf
from mpsearch.export.own_loader import load_as_served
from mpsearch.export.reload import load_any
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.quantizers import get_quantizer
from mpsearch.recall import RecallProxy
from mpsearch.space import ResolvedSpace, SearchSpace

Exported = tuple[Model, ResolvedSpace, Assignment, Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Read the folder, do not write to it."""
    model = byte_level_model(tie_word_embeddings=True)
    text = "version: 1\ntarget: gguf\nformats: [q4_0, q4_1, q5_1, q8_0]\nembedding: [q5_0]\n"
    space = SearchSpace.parse(text, "test").resolve(model)
    assignment = Assignment.of(
        {
            name: formats[i % len(formats)].name
            for i, (name, formats) in enumerate(space.options.items())
        }
    )
    out = tmp_path_factory.mktemp("gguf") / "export"
    return model, space, assignment, mps.export(model, assignment, to="gguf", out=out, space=space)


def test_it_has_the_weights_and_scores_of_its_candidate(
    exported: Exported, tiny_facts: FactSet
) -> None:
    model, space, assignment, folder = exported
    loaded = load_any(str(folder))
    assert loaded.dtype == model.dtype
    facts = tiny_facts.part("validation")
    proxy = RecallProxy(model, tiny_facts, facts, contrast=True)
    with Bench(space, Bank(model, get_quantizer(None, "gguf"))) as bench:
        scored = bench.evaluate(assignment, proxy).scores
        for layer in model.every_layer:
            assert torch.equal(loaded.places[layer.name].weight, model.places[layer.name].weight), (
                layer.name
            )
    reloaded = RecallProxy(loaded, tiny_facts, facts, contrast=True, against=proxy.first)
    assert scored.kl.max() > 0
    for name in ("log_prob", "kl", "top1", "margin"):
        assert (getattr(reloaded.reference, name) == getattr(scored, name)).all(), name
    assert [layer.name for layer in loaded.every_layer] == [
        layer.name for layer in model.every_layer
    ]


def test_it_is_served_by_transformers_as_it_was_scored(
    exported: Exported, tiny_facts: FactSet
) -> None:
    model, space, assignment, folder = exported
    facts = tiny_facts.part("validation")
    proxy = RecallProxy(model, tiny_facts, facts, contrast=True)
    with Bench(space, Bank(model, get_quantizer(None, "gguf"))) as bench:
        scored = bench.evaluate(assignment, proxy).scores
    served, loader = load_as_served(str(folder))
    assert loader == f"transformers {version('transformers')} with gguf {version('gguf')}"
    assert served.module.dtype == model.dtype
    answered = RecallProxy(served, tiny_facts, facts, contrast=True)
    assert answered.digest == proxy.digest
    assert (answered.reference.log_prob == scored.log_prob).all()


def test_its_bytes_are_those_of_its_tensors_alone(exported: Exported) -> None:
    _, space, assignment, folder = exported
    assert tensor_bytes(folder) == space.stored_bytes(assignment)
    assert tensor_bytes(folder) < (folder / "model.gguf").stat().st_size


def test_its_card_says_how_llama_cpp_and_transformers_load_it(exported: Exported) -> None:
    card = (exported[3] / "README.md").read_text(encoding="utf-8")
    assert "llama-server --model FOLDER/model.gguf" in card
    assert 'from_pretrained(FOLDER, gguf_file="model.gguf")' in card
    assert "everything else bf16, norms and biases float32." in card


def test_it_can_be_asked_in_its_chat_template(exported: Exported) -> None:
    assert load_any(str(exported[3]), chat_template=True).chat
    assert load_any(str(exported[3])).tokenizer.eos_token == "<|im_end|>"


def test_a_model_beside_a_gguf_file_is_a_model(exported: Exported, tmp_path: Path) -> None:
    assert is_gguf(exported[3])
    shutil.copy(exported[3] / "model.gguf", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not is_gguf(tmp_path)
    assert not is_gguf(tmp_path / "none")


def damaged(exported: Exported, folder: Path, content: bytes) -> str:
    """What is said of a folder whose file holds something else."""
    shutil.copytree(exported[3], folder)
    (folder / "model.gguf").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        load_any(str(folder))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("part", [0.0, 1e-4, 0.001, 0.02, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_refused(exported: Exported, tmp_path: Path, part: float) -> None:
    whole = (exported[3] / "model.gguf").read_bytes()
    said = damaged(exported, tmp_path / "cut", whole[: int(len(whole) * part)])
    assert said.startswith(f"export '{tmp_path / 'cut'}' does not load: ")


def test_what_is_no_gguf_file_is_refused(exported: Exported, tmp_path: Path) -> None:
    assert "does not load" in damaged(exported, tmp_path / "other", b"damaged" * 100)


def test_a_lost_tensor_is_named(exported: Exported, tmp_path: Path) -> None:
    """Written again without it."""
    source = GGUFReader(exported[3] / "model.gguf")
    folder = tmp_path / "lost"
    shutil.copytree(exported[3], folder)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    for name, field in source.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, *sub = field.types
            writer.add_key_value(name, field.contents(), kind, sub[0] if sub else None)
    for tensor in source.tensors:
        if tensor.name != "blk.1.attn_norm.weight":
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"lacks 'model\.layers\.1\.input_layernorm\.weight'"):
        load_any(str(folder))
