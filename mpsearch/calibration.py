"""What the model sees while GPTQ learns which inputs matter: the user's text, or its own.

Text that the model writes itself needs no download and is of the kind that it produces. A seed
decides it, so the bank can name it before it exists.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mpsearch.device import available_memory_bytes
from mpsearch.errors import CheckError, ResourceError, UsageError
from mpsearch.files import Claims
from mpsearch.flow import flowing
from mpsearch.models import Model
from mpsearch.places import expert_inputs
from mpsearch.quantizers import InputStatistics
from mpsearch.sizes import format_size
from mpsearch.tensor_files import intact, read_tensors, write_tensors

BATCH = 8  # sequences

Count = Callable[[int, int], None]


def uncounted(done: int, total: int) -> None:
    """A count that goes nowhere."""


@dataclass(frozen=True)
class Calibration:
    """Recipe of the calibration text; with the model it decides every token.

    Attributes:
        sequences, length: how many texts, and tokens in each.
        seed: of the sampling; unused with a text.
        text: to use instead of sampling, cut into `sequences` pieces from its beginning.
        digest: SHA-256 of a text that is not at hand, so that its bank can still be named.
    """

    sequences: int = 64
    length: int = 128
    seed: int = 0
    text: str = field(default="", repr=False)
    digest: str = ""

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """A UTF-8 text file. Raises `UsageError` if it cannot be read."""
        try:
            return cls(text=Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"calibration text '{path}' cannot be read: {error}") from None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Calibration:
        """The recipe with those settings, without its text."""
        known = ("sequences", "length", "seed", "digest")
        return cls(**{key: settings[key] for key in known if key in settings})

    @property
    def settings(self) -> Mapping[str, int | str]:
        size = {"sequences": self.sequences, "length": self.length}
        if self.text or self.digest:
            digest = self.digest or hashlib.sha256(self.text.encode()).hexdigest()
            return {"text": "of a file", "digest": digest, **size}
        return {"text": "sampled from the model by inversion", **size, "seed": self.seed}


def calibration_tokens(
    model: Model, recipe: Calibration, report: Count = uncounted, kept: Path | None = None
) -> Tensor:
    """`(sequences, length)` tokens of a recipe.

    Args:
        report: called with tokens of each text done and in all.
        kept: folder of this model in which a text that it writes is kept, and found again.
    Raises:
        UsageError: the text is too short, or only its digest is at hand.
        ResourceError: as `sample_text`.
    """
    if recipe.digest and not recipe.text:
        raise UsageError(
            "these weights were calibrated on a text file and are not all in the bank; make "
            "them with 'mpsearch bank', or 'mpsearch refine', and the same --calibration file"
        )
    if not recipe.text:
        return _kept(kept, model, recipe, report) if kept else sample_text(model, recipe, report)
    tokens = model.tokenizer(recipe.text, add_special_tokens=False)["input_ids"]
    needed = recipe.sequences * recipe.length
    if len(tokens) < needed:
        raise UsageError(
            f"the calibration text has {len(tokens)} tokens, and {needed} are needed "
            f"({recipe.sequences} pieces of {recipe.length}); give a longer text"
        )
    cut = torch.tensor(tokens[:needed], device=model.device)
    return cut.reshape(recipe.sequences, recipe.length)


def _kept(folder: Path, model: Model, recipe: Calibration, report: Count) -> Tensor:
    """The model's own text, written once by one process: a streamed model takes long over it."""
    key = hashlib.sha256(json.dumps(recipe.settings, sort_keys=True).encode()).hexdigest()
    path = folder / f"text-{key[:12]}.tokens"
    with Claims(folder) as claims:
        while not claims.take(0):
            report(0, recipe.length)
            time.sleep(0.5)
        if not intact(path):
            write_tensors(path, {"tokens": sample_text(model, recipe, report)})
    return read_tensors(path)["tokens"].to(model.device)


@torch.no_grad()
def sample_text(model: Model, recipe: Calibration, report: Count = uncounted) -> Tensor:
    """`(sequences, length)` tokens, each text begun with a random token and continued at
    temperature 1.

    The newest tokens of all texts run together, so a streamed model reads its blocks once a token.
    The keys and values of all texts stay in memory.

    Args:
        report: called with tokens of each text done and in all.
    Raises:
        ResourceError: there is no memory for the keys and values.
    Source: data-free calibration from the model's own samples, LLM-QAT (arXiv:2305.17888).
    """
    generator = torch.Generator(model.device).manual_seed(recipe.seed)
    # A tokenizer may know more tokens than its model was trained with, and the other way round.
    vocabulary = min(len(model.tokenizer), len(model.module.get_input_embeddings().weight))
    tokens = torch.randint(
        vocabulary, (recipe.sequences, 1), generator=generator, device=model.device
    )
    cache = None
    newest = tokens
    with flowing(model):
        while (done := tokens.shape[1]) < recipe.length:
            report(done, recipe.length)
            output = model.module(newest, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            if done == 1:
                _require_cache(model, cache, recipe)
            # By the inverse of the distribution function: one random number a text, not one a
            # token.
            below = output.logits[:, -1, :vocabulary].float().softmax(-1).cumsum(-1)
            drawn = torch.rand(len(below), 1, generator=generator, device=model.device)
            newest = torch.searchsorted(below, drawn * below[:, -1:]).clamp(max=vocabulary - 1)
            tokens = torch.cat([tokens, newest], dim=1)
    report(recipe.length, recipe.length)
    return tokens


def _require_cache(model: Model, cache: Any, recipe: Calibration) -> None:
    """Raise `ResourceError` if the keys and values of all tokens will not fit.

    Args:
        cache: those of one token of each text.
    """
    needed = (recipe.length - 2) * _cached_bytes(cache)
    if (available := available_memory_bytes(model.device)) < needed:
        raise ResourceError(
            f"the model's own calibration text of {recipe.sequences} x {recipe.length} tokens "
            f"needs {format_size(needed)} of memory for keys and values, and "
            f"{format_size(available)} is available on {model.device.type}; give a text with "
            "--calibration FILE, which needs none"
        )


def _cached_bytes(cache: Any) -> int:
    """What a transformers cache holds."""
    parts = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(part.nbytes for part in parts if part is not None)


class WatchedInputs:
    """Gram matrices of every layer's inputs over whatever runs through the model meanwhile.

    Layers that read the same tensor (q, k, v) share one matrix. An expert's is of its own tokens;
    one that no token reached gets the identity of one token, by which all inputs matter alike. An
    embedding reads no vectors and so has no matrix.

    Args:
        model: watched from entering until leaving as a context manager.
        names: of the layers to watch, all by default.
    """

    def __init__(self, model: Model, names: Collection[str] | None = None):
        self._model = model
        readers = (*model.layers, *([model.head] if model.head else []))
        self._read = {r.name: r for r in readers if names is None or r.name in names}
        self._grams: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._leader_of: dict[str, str] = {}
        self._last: tuple[object, str] = (None, "")
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> WatchedInputs:
        stacks: set[str] = set()
        modules = self._model.module
        for name in self._read:
            place = self._model.places[name]
            if place.expert is None:
                hook = self._watch(name)
                self._hooks.append(modules.get_submodule(name).register_forward_pre_hook(hook))
                continue
            path, part = name.rsplit(".", 2)[0], name.rpartition(".")[2]
            if part == "gate_proj":
                self._leader_of[name] = f"{path}.{place.expert}.up_proj"
            if path not in stacks:
                stacks.add(path)
                hook = self._watch_experts(path)
                self._hooks.append(modules.get_submodule(path).register_forward_pre_hook(hook))
        return self

    def __exit__(self, *_: object) -> None:
        self._last = (None, "")
        for hook in self._hooks:
            hook.remove()

    @property
    def statistics(self) -> dict[str, InputStatistics]:
        """What was seen so far, by layer."""
        found = {}
        for layer in self._read.values():
            name = self._leader_of.get(layer.name, layer.name)
            seen, device = self._grams.get(name), self._model.device_of(layer.name)
            gram = seen if seen is not None else torch.eye(layer.columns, device=device)
            found[layer.name] = InputStatistics(gram, self._counts.get(name, 1))
        return found

    def add(self, name: str, inputs: Tensor) -> None:
        """Count inputs `(..., columns)` that a layer reads."""
        flat = inputs.detach().reshape(-1, inputs.shape[-1]).float()
        self._counts[name] = self._counts.get(name, 0) + len(flat)
        if name in self._grams:
            self._grams[name].addmm_(flat.T, flat)
        else:
            self._grams[name] = flat.T @ flat

    def _watch(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            last, leader = self._last
            if inputs[0] is last:
                self._leader_of[name] = leader
                return
            self._last = (inputs[0], name)
            self.add(name, inputs[0])

        return hook

    def _watch_experts(self, path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            for expert, of_first, of_down in expert_inputs(module, inputs[0], inputs[1]):
                for part, read in (("up_proj", of_first), ("down_proj", of_down)):
                    if (name := f"{path}.{expert}.{part}") in self._read:
                        self.add(name, read)

        return hook


def batches(tokens: Tensor) -> list[Tensor]:
    """Of `(sequences, length)` tokens those that run through the model together."""
    return [tokens[start : start + BATCH] for start in range(0, len(tokens), BATCH)]


@torch.no_grad()
def input_statistics(model: Model, tokens: Tensor, report: Count) -> dict[str, InputStatistics]:
    """Gram matrices of every input that is a vector over the reference model's pass of the text.

    That is every layer's, and the head's, which reads what the decoder gives at each token.

    Args:
        tokens: `(sequences, length)`.
        report: called with sequences done and in all.
    """
    done = 0
    with WatchedInputs(model) as seen:
        for batch in batches(tokens):
            output = model.module.get_decoder()(batch, use_cache=False)
            if model.head:
                seen.add(model.head.name, output.last_hidden_state)
            report(done := done + len(batch), len(tokens))
    return seen.statistics


def check_statistics(statistics: Mapping[str, InputStatistics]) -> int:
    """How many layers have an input column that was zero at every token.

    Raises:
        CheckError: an input was NaN or infinite.
    """
    unused = 0
    for name, seen in statistics.items():
        diagonal = seen.gram.diagonal()
        if bad := int((~diagonal.isfinite()).sum()):
            raise CheckError(
                f"the inputs of '{name}' are NaN or infinite in {bad} of {len(diagonal)} "
                "columns on the calibration text; the model or the text is broken"
            )
        unused += bool((diagonal == 0).any())
    return unused
