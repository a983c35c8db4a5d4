"""The weight bank: every (layer, format) quantized once, packed, on disk.

A file holds exactly the tensors that an export will hold. Its path is made of what decided them:
the model's fingerprint, the quantizer with its settings and library version, the calibration, the
layer and the format. So runs share it, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpsearch.builtin import home
from mpsearch.calibration import Calibration, input_statistics, sample_text
from mpsearch.codecs import decode
from mpsearch.device import available_memory_bytes, require_disk
from mpsearch.errors import CheckError, ResourceError, RunError, UsageError
from mpsearch.files import write_atomically
from mpsearch.formats import Format
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.quantizers import QUANTIZERS, Quantizer, get_quantizer

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress report that goes nowhere."""


def check_shapes(wanted: Iterable[tuple[Layer, Format]]) -> None:
    """Raise `UsageError` if a layer's sides do not divide into a format's groups and words."""
    for layer, fmt in wanted:
        if layer.rows % fmt.side_multiple or layer.columns % fmt.side_multiple:
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': its {layer.rows} x "
                f"{layer.columns} weights are no multiples of {fmt.side_multiple} on both sides; "
                "give it bf16 by a rule of the space"
            )
        if fmt.group_size and layer.columns % fmt.group_size:
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': groups of "
                f"{fmt.group_size} do not divide its {layer.columns} columns; give it bf16 by a "
                "rule of the space"
            )


class Bank:
    """Quantized weights of one model by one quantizer.

    Args:
        model: must hold its reference weights while `build` runs.
        quantizer: decides codes and scales.
        calibration: for quantizers that need inputs.
        root: folder of all banks.
    """

    def __init__(
        self,
        model: Model,
        quantizer: Quantizer,
        calibration: Calibration | None = None,
        root: Path | None = None,
    ):
        self.model = model
        self.quantizer = quantizer
        self.calibration = calibration or Calibration()
        self._layers = {layer.name: layer for layer in model.layers}
        key = hashlib.sha256(json.dumps(self.settings, sort_keys=True).encode()).hexdigest()
        self.folder = (
            (root or home() / "bank") / model.fingerprint[:16] / f"{quantizer.name}-{key[:12]}"
        )
        self._decoded: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._decoded_bytes = 0
        self._most_decoded_bytes = available_memory_bytes(model.device) // 4

    @classmethod
    def of(cls, model: Model, settings: Mapping[str, Any]) -> Bank:
        """The bank with those settings.

        Raises:
            RunError: the installed libraries would make other codes.
        """
        name = str(settings["quantizer"])
        containers = [c for c, names in QUANTIZERS.items() if name in names]
        if not containers:
            raise RunError(f"the weights were quantized by '{name}', which is not known here")
        recipe = settings.get("calibration", {})
        known = {key: recipe[key] for key in ("sequences", "length", "seed") if key in recipe}
        bank = cls(model, get_quantizer(name, containers[0]), Calibration(**known))
        if bank.settings != settings:
            raise RunError(
                f"the weights were quantized with {json.dumps(settings)} and this installation "
                f"would use {json.dumps(bank.settings)}; install the same versions"
            )
        return bank

    @property
    def settings(self) -> dict[str, object]:
        """Everything that decides the bank's content, beside the model."""
        settings: dict[str, object] = {
            "quantizer": self.quantizer.name,
            **self.quantizer.settings,
        }
        if self.quantizer.calibrated:
            settings["calibration"] = dict(self.calibration.settings)
        return settings

    def path(self, layer: str, fmt: Format) -> Path:
        """A file inside the bank, whatever characters the layer's name has."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', layer)}.{fmt.name}.safetensors"

    def build(self, wanted: Iterable[tuple[Layer, Format]], report: Report = silent) -> None:
        """Quantize what is missing among the wanted (layer, format) pairs.

        Raises:
            UsageError: a format that a layer's shape cannot take.
            ResourceError: the disk is or becomes too small; finished files stay.
            CheckError: a quantizer returned something else than its format stores.
        """
        wanted = list(wanted)
        check_shapes(wanted)
        missing: dict[str, list[Format]] = {}
        for layer, fmt in wanted:
            if fmt.quantized and not self.path(layer.name, fmt).exists():
                missing.setdefault(layer.name, []).append(fmt)
        if not missing:
            return
        needed = sum(
            fmt.layer_bytes(self._layers[name])
            for name, formats in missing.items()
            for fmt in formats
        )
        require_disk(int(needed * 1.1), self.folder, "the weight bank")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ResourceError(
                f"cannot create the weight bank '{self.folder}' ({error.strerror}); set "
                "MPSEARCH_HOME to a folder that can be written"
            ) from None
        write_atomically(self.folder / "settings.json", json.dumps(self.settings, indent=1))
        statistics = {}
        if self.quantizer.calibrated:
            report("calibration text", 0, 1)
            text = sample_text(self.model, self.calibration)
            statistics = input_statistics(
                self.model, text, lambda done, total: report("calibration", done, total)
            )
        for index, (name, formats) in enumerate(missing.items()):
            report(f"quantizing ({self.quantizer.name})", index, len(missing))
            weight = self.model.originals[name].float()
            stored = self.quantizer.quantize(weight, formats, statistics.get(name))
            for fmt in formats:
                self._write(self._layers[name], fmt, stored[fmt.name])
        report(f"quantizing ({self.quantizer.name})", len(missing), len(missing))

    def stored(self, layer: str, fmt: Format) -> dict[str, Tensor]:
        """The tensors of one layer as the export will hold them, on the CPU."""
        if not fmt.quantized:
            return {"weight": self.model.originals[layer].to("cpu", torch.bfloat16)}
        path = self.path(layer, fmt)
        try:
            stored: dict[str, Tensor] = load_file(path)
            return stored
        except (OSError, SafetensorError) as error:
            raise CheckError(
                f"bank file '{path}' cannot be read ({error}); delete it and run again"
            ) from None

    def weight(self, layer: str, fmt: Format) -> Tensor:
        """The decoded `(rows, columns)` weight on the model's device in its computing dtype.

        Do not write to it: recent ones are kept and handed out again.
        """
        if not fmt.quantized:
            return self.model.originals[layer]
        key = (layer, fmt.name)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        device = self.model.device
        stored = {name: tensor.to(device) for name, tensor in self.stored(layer, fmt).items()}
        weight = decode(stored, fmt).to(self.model.dtype)
        self._decoded[key] = weight
        self._decoded_bytes += weight.nbytes
        while self._decoded_bytes > self._most_decoded_bytes and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return weight

    def _write(self, layer: Layer, fmt: Format, stored: dict[str, Tensor]) -> None:
        promised = fmt.tensors(layer.rows, layer.columns)
        found = {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.items()}
        if found != {name: (spec.dtype, spec.shape) for name, spec in promised.items()}:
            raise CheckError(
                f"quantizer '{self.quantizer.name}' made {found} for '{layer.name}', but "
                f"{fmt.name} stores {promised}"
            )
        path = self.path(layer.name, fmt)
        handle, name = tempfile.mkstemp(prefix=".", suffix=".unfinished", dir=self.folder)
        os.close(handle)
        unfinished = Path(name)
        try:
            tensors = {suffix: tensor.cpu().contiguous() for suffix, tensor in stored.items()}
            save_file(tensors, unfinished)
            unfinished.chmod(0o644)
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            raise ResourceError(
                f"the weight bank could not write '{path}' ({error}); free some disk space and "
                "run again, finished layers are kept"
            ) from None
        finally:
            unfinished.unlink(missing_ok=True)
