"""Load a model and its tokenizer, find its layers, fingerprint it.

The reference is the model in bf16, the precision in which checkpoints are published and in which
unquantized weights are exported. Where the device is slow at bf16, arithmetic runs in float32 on
the same bf16 values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpsearch.blocks import find_blocks
from mpsearch.checkpoint import Checkpoint
from mpsearch.device import compute_dtype, pick_device, place_blocks
from mpsearch.errors import ModelError
from mpsearch.formats import StoredTensor
from mpsearch.layers import Layer
from mpsearch.model_files import check_folder, locate
from mpsearch.places import (
    UNRECOGNISED,
    Place,
    find_embedding,
    find_head,
    find_places,
    why_kept,
)
from mpsearch.refusals import check_attention, one_line, require_finite

ATTENTION = "sdpa"  # transformers' one that takes a general mask


@dataclass(frozen=True, eq=False)
class Model:
    """A loaded causal language model; the reference that candidates are compared with.

    Attributes:
        name: as the user gave it.
        folder: where its files are.
        module: the transformers model, in evaluation mode, without gradients.
        tokenizer: its fast tokenizer.
        layers: the weight matrices that may be quantized, in model order.
        embedding: the input embedding, kept unless a space gives it formats; None if it is no
            plain table.
        head: the output head, likewise; None if it has no weight of its own.
        places: name of any of these to where its weight lives in the module.
        originals: the same names to the weight as loaded `(rows, columns)`; never written to.
        kept: every stored tensor that is none of `layers`, by state-dict name, shared ones once, as
            bf16 if floating.
        why_kept: for each of those, why it is no layer.
        fingerprint: hex digest over all names, shapes and bf16 values.
        preparation: what was folded into the weights that were loaded, as JSON; see
            `mpsearch.awq`.
        chat: whether it is asked through its tokenizer's chat template.
        checkpoint: what the weights of its blocks are read from when they are needed; None where
            they are in memory. `originals` and `kept` are then read anew each time.
    """

    name: str
    folder: Path
    module: Any
    tokenizer: Any
    layers: tuple[Layer, ...]
    embedding: Layer | None
    head: Layer | None
    places: dict[str, Place]
    originals: Mapping[str, Tensor]
    kept: Mapping[str, Tensor]
    why_kept: dict[str, str]
    fingerprint: str
    preparation: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    checkpoint: Checkpoint | None = None

    @property
    def streamed(self) -> bool:
        """Whether its blocks hold no weights, so that only `mpsearch.walk` can run it."""
        return self.checkpoint is not None

    @property
    def device(self) -> torch.device:
        return self._embedded.device

    def device_of(self, layer: str) -> torch.device:
        """That a layer computes on, as blocks of a loaded model may lie on several."""
        return self.device if self.streamed else self.places[layer].parameter.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the arithmetic; see `mpsearch.device.compute_dtype`."""
        return self._embedded.dtype

    @property
    def _embedded(self) -> Tensor:
        weight: Tensor = self.module.get_input_embeddings().weight
        return weight

    @property
    def every_layer(self) -> tuple[Layer, ...]:
        """The layers, then the embedding and the head."""
        return (*self.layers, *(layer for layer in (self.embedding, self.head) if layer))

    @property
    def kept_stored(self) -> dict[str, StoredTensor]:
        """Dtype and shape of each of `kept`, for which none is read."""
        held = self.module.state_dict() if self.kept else {}
        weights = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        return {
            name: StoredTensor(
                "bfloat16"  # whatever the model computes in
                if name in weights and held[name].is_floating_point()
                else str(held[name].dtype).removeprefix("torch."),
                tuple(held[name].shape),
            )
            for name in self.kept
        }

    @property
    def kept_bytes(self) -> int:
        return sum(tensor.stored_bytes for tensor in self.kept_stored.values())

    @property
    def vector_weights(self) -> int:
        """Weights of the kept norms and biases, which some containers store in float32."""
        kept = self.kept_stored.values()
        return sum(tensor.weights for tensor in kept if len(tensor.shape) == 1)

    def kept_by_reason(self, searched: Collection[str] = ()) -> list[dict[str, Any]]:
        """The kept tensors: reason, names, weights and stored bytes, the largest sum first.

        Args:
            searched: names of layers that a space decides, which it so does not keep.
        """
        kept = self.kept_stored
        names: dict[str, list[str]] = {}
        for name, reason in self.why_kept.items():
            if name.removesuffix(".weight") not in searched:
                names.setdefault(reason, []).append(name)
        rows = [
            {
                "reason": reason,
                "names": alike,
                "weights": sum(kept[name].weights for name in alike),
                "stored_bytes": sum(kept[name].stored_bytes for name in alike),
            }
            for reason, alike in names.items()
        ]
        return sorted(rows, key=lambda row: -row["stored_bytes"])

    @property
    def unrecognised(self) -> dict[str, str]:
        """Kept weights above 1 % of the parameters that are of no known kind, and their kinds."""
        kept = self.kept_stored
        weights = sum(layer.weights for layer in self.layers)
        weights += sum(tensor.weights for tensor in kept.values())
        return {
            name: reason
            for name, reason in self.why_kept.items()
            if reason.startswith(UNRECOGNISED) and kept[name].weights > 0.01 * weights
        }

    def restore(self) -> None:
        """Give every layer its reference weight."""
        for place in self._one_a_parameter():
            place.restore()

    def _one_a_parameter(self) -> list[Place]:
        return list({id(place.parameter): place for place in self.places.values()}.values())


def load_whole(
    name: str, chat_template: bool = False, beside: Sequence[torch.device] = ()
) -> Model:
    """Load `builtin:smollm2-135m`, a folder (one safetensors file or shards) or a hub id, whole.

    Args:
        chat_template: ask facts as a user's turn in the tokenizer's chat template.
        beside: as of `from_module`.
    Raises:
        ModelError: it cannot be had, is stored as pickle, or is already quantized.
        CheckError: a weight is NaN or infinite.
        ResourceError: its blocks do not fit on the devices, or the disk is too small
            to prepare the built-in model.
    """
    folder = locate(name)
    check_folder(folder, name)
    device = pick_device()
    dtype = compute_dtype(device)
    with one_line(name):
        module, loaded = loader(folder).from_pretrained(
            folder,
            output_loading_info=True,
            dtype=torch.bfloat16,
            attn_implementation=ATTENTION,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = read_tokenizer(folder, name, chat_template)
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"model '{name}': its checkpoint lacks '{missing[0]}' and {len(missing) - 1} more "
            "weights that its architecture has; get it again"
        )
    model = from_module(name, folder, module, tokenizer, device, dtype, beside)
    return replace(model, chat=chat_template)


def loader(folder: Path) -> Any:
    """transformers' class that makes the causal language model of a folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    plain = config_of(folder).model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForCausalLM if plain else AutoModelForImageTextToText


def config_of(folder: Path) -> Any:
    """The folder's config, as transformers reads it."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def read_tokenizer(folder: Path, name: str, chat_template: bool) -> Any:
    """The folder's tokenizer, if it can do what recall needs of it.

    Raises:
        ModelError: it is not a fast one, or lacks a chat template that is asked for.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    )
    if not tokenizer.is_fast:
        raise ModelError(
            f"model '{name}' has no fast tokenizer, which locating answers needs; "
            "add its tokenizer.json"
        )
    if chat_template and not tokenizer.chat_template:
        raise ModelError(
            f"model '{name}' has no chat template in its tokenizer; leave --chat-template away"
        )
    return tokenizer


def from_module(
    name: str,
    folder: Path,
    module: Any,
    tokenizer: Any,
    device: torch.device,
    dtype: torch.dtype,
    beside: Sequence[torch.device] = (),
) -> Model:
    """Wrap a transformers model, whose weights are taken in bf16 precision.

    Args:
        beside: more devices, over all of which its blocks are spread; not verified on several.
    Raises:
        CheckError: a weight is NaN or infinite.
        ModelError: nothing in it can be quantized, or tokens reach each other past its attention.
    """
    module = module.eval().requires_grad_(False)
    _cast(module, torch.bfloat16)
    for tensor_name, tensor in module.state_dict().items():
        require_finite(name, tensor_name, tensor)
    searched = {place.parameter for place in find_places(module).values()}
    if not searched:
        raise ModelError(f"model '{name}' has no linear layers that could be quantized")
    kept: dict[str, Tensor] = {}
    seen = {parameter.data_ptr() for parameter in searched}
    for tensor_name, tensor in module.state_dict().items():
        if tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            kept[tensor_name] = tensor.detach().cpu()
    fingerprint = fingerprint_of(module.state_dict())
    blocks = find_blocks(module, find_places(module)) if beside else []
    if blocks:
        place_blocks(module, blocks, (device, *beside))
    else:
        module = module.to(device)
    _cast(module, dtype)
    # Again, now that its tensors are those that it computes with.
    found = find_places(module), find_embedding(module), find_head(module)
    layers, embedding, head = map(layers_at, found)
    places = {layer: place for part in found for layer, place in part.items()}
    check_attention(name, module, device, any(".experts." in layer for layer in places))
    return Model(
        name=name,
        folder=folder,
        module=module,
        tokenizer=tokenizer,
        layers=layers,
        embedding=embedding[0] if embedding else None,
        head=head[0] if head else None,
        places=places,
        originals={layer: place.original for layer, place in places.items()},
        kept=kept,
        why_kept=why_kept(module, kept),
        fingerprint=fingerprint,
    )


def layers_at(places: Mapping[str, Place]) -> tuple[Layer, ...]:
    """The layers whose weights live at these places."""
    shapes = {name: place.original.shape for name, place in places.items()}
    return tuple(
        Layer(name, rows, columns, places[name].tied) for name, (rows, columns) in shapes.items()
    )


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights only: rotary frequencies and other buffers lose too much in bf16."""
    for parameter in module.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """Hex digest of a state dict in bf16: over names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]  # looked up once, as one may be read from disk for it
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        del tensor  # or it would be held while the next is read
    return digest.hexdigest()
