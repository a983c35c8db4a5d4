"""The weight bank: every (layer, format) quantized once, packed, on disk.

A file holds exactly the tensors that an export will hold. Its path is made of what decided them:
the model's fingerprint, the quantizer with its settings and library version, the calibration (and
with it the model's config), the layer and the format. So runs share it, and nothing stale is ever
read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch.calibration import Calibration, calibration_tokens, check_statistics
from mpsearch.codecs import decode
from mpsearch.device import available_memory_bytes, require_disk
from mpsearch.errors import CheckError, ResourceError, RunError
from mpsearch.files import Claims, home, write_atomically
from mpsearch.flow import is_placeholder
from mpsearch.formats import Format
from mpsearch.helpers import helping, processes, threads
from mpsearch.in_order import inputs_in_order, reading_order
from mpsearch.layers import Layer
from mpsearch.model_files import config_digest
from mpsearch.models import Model
from mpsearch.portions import portions
from mpsearch.quantizers import (
    QUANTIZERS,
    InputStatistics,
    Quantizer,
    get_quantizer,
    working_bytes,
)
from mpsearch.tensor_files import CheckedFiles, intact, write_tensors
from mpsearch.wanted import Wanted, check_formats, digest_of

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress report that goes nowhere."""


def _warn(unused: int, layers: int) -> None:
    if unused:
        log.warning(
            "%d of %d layers have input columns that the calibration text never uses; their "
            "weights there become zero",
            unused,
            layers,
        )


class Bank:
    """Quantized weights of one model by one quantizer.

    Args:
        model: a loaded one must hold its reference weights while `build` runs. Of a streamed one
            then a block's weights are in memory at a time, and what its quantization takes.
        quantizer: decides codes and scales.
        calibration: for quantizers that need inputs.
        root: folder of all banks.
        in_order: `digest_of` the one assignment that this bank holds, if its layers are quantized
            one after another, each by what it reads when those before it are quantized. Otherwise
            every layer is quantized on its own, by what it reads in the reference.
    """

    def __init__(
        self,
        model: Model,
        quantizer: Quantizer,
        calibration: Calibration | None = None,
        root: Path | None = None,
        in_order: str = "",
    ):
        self.model = model
        self.quantizer = quantizer
        self.in_order = in_order
        self.calibration = calibration or Calibration()
        self._layers = {layer.name: layer for layer in model.every_layer}
        decided = self.settings
        if quantizer.calibrated:  # what layers read follows from more than the weights
            decided["config"] = config_digest(model.folder)
        key = hashlib.sha256(json.dumps(decided, sort_keys=True).encode()).hexdigest()
        self.folder = (
            (root or home() / "bank") / model.fingerprint[:16] / f"{quantizer.name}-{key[:12]}"
        )
        self._files = CheckedFiles()
        self._decoded: OrderedDict[tuple[str, str], Tensor] = OrderedDict()
        self._decoded_bytes = 0
        most_bytes = available_memory_bytes(model.device) // 4
        self._most_decoded_bytes = 0 if model.streamed else most_bytes  # the newest is kept anyway

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
        quantizer, in_order = get_quantizer(name, containers[0]), str(settings.get("in_order", ""))
        bank = cls(model, quantizer, Calibration.of(recipe), in_order=in_order)
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
        if self.in_order:
            settings["in_order"] = self.in_order
        return settings

    def path(self, layer: str, fmt: Format) -> Path:
        """A file inside the bank, whatever characters the layer's name has."""
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_.-]', '_', layer)}.{fmt.name}.safetensors"

    def missing(self, wanted: Iterable[tuple[Layer, Format]]) -> Wanted:
        """Those of the wanted that have no file, or a damaged one. Reads every file.

        Raises:
            UsageError: a format that a layer's shape or the quantizer cannot take.
        """
        wanted = list(wanted)
        check_formats(self.quantizer, wanted)
        return [
            (layer, fmt)
            for layer, fmt in wanted
            if fmt.quantized and not intact(self.path(layer.name, fmt))
        ]

    def build(
        self,
        wanted: Iterable[tuple[Layer, Format]],
        report: Report = silent,
        estimated: Callable[[float], None] | None = None,
        missed: Callable[[int], None] | None = None,
    ) -> None:
        """Quantize what is missing or damaged among the wanted (layer, format) pairs.

        Any number of processes may build one bank: none does what another has done or is doing.

        Args:
            estimated: called with the seconds that the work will take, as soon as a layer of each
                shape is made, which is done first and timed if this is given.
            missed: called with how many files are missing, before any is made; it may refuse.
        Raises:
            UsageError: a format that a layer's shape or the quantizer cannot take.
            ResourceError: the disk is or becomes too small; finished files stay.
            CheckError: NaN at a layer's input, or a quantizer that returned something else than
                its format stores.
            RunError: a bank quantized in order is asked for another assignment than its own.
        """
        wanted = list(wanted)
        if self.in_order and digest_of(wanted) != self.in_order:
            raise RunError(
                f"'{self.folder}' holds the codes of another assignment; refine this one"
            )
        missing: dict[str, list[Format]] = {}
        for layer, fmt in self.missing(wanted):
            missing.setdefault(layer.name, []).append(fmt)
        if not missing:
            return
        if missed is not None:
            missed(sum(map(len, missing.values())))
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
        if self.in_order:
            self._build_in_order(wanted, report)
            return
        self._build_apart(missing, report, estimated)

    def _text(self, report: Report) -> Tensor:
        count = partial(report, "calibration text")
        return calibration_tokens(self.model, self.calibration, count, self.folder.parent)

    def _build_apart(
        self,
        missing: Mapping[str, list[Format]],
        report: Report,
        estimated: Callable[[float], None] | None,
    ) -> None:
        """Quantize the missing layers, each by what it reads in the reference."""
        stage, done, unused, watched = f"quantizing ({self.quantizer.name})", 0, 0, 0
        embedding = self.model.embedding.name if self.model.embedding else ""
        reads = self.quantizer.calibrated and any(name != embedding for name in missing)
        tokens = self._text(report) if reads else None

        def lacks(name: str) -> bool:
            return not all(intact(self.path(name, fmt)) for fmt in missing[name])

        def entering(block: int, of: int) -> None:
            report(f"{stage}, calibration {block} of {of} blocks", done, len(missing))

        def progress(here: int) -> None:
            report(stage, done + here, len(missing))

        start = time.perf_counter()
        with closing(portions(self.model, list(missing), lacks, tokens, entering)) as found:
            for portion in found:
                statistics = portion.statistics
                unused, watched = unused + check_statistics(statistics), watched + len(statistics)
                here = {name: missing[name] for name in portion.layers}
                first = len(here)
                if estimated is not None:
                    walking = (time.perf_counter() - start) * (1 / portion.walked - 1)
                    here, seconds = self._time(here, missing, statistics, report)
                    if first - len(here) < len(missing):
                        estimated(walking + seconds)
                    estimated, done = None, first - len(here)
                work = partial(self._fill, here, statistics)
                with helping(self._processes(here) - 1, work):
                    self._fill(here, statistics, progress)
                done += len(here)
        if done < len(missing):  # other processes have made the rest
            report(stage, len(missing), len(missing))
        _warn(unused, watched)

    def _build_in_order(self, wanted: Wanted, report: Report) -> None:
        """Quantize layer after layer, each behind those before it; the reference is restored.

        What an earlier process has finished is put in place and not quantized again.
        """
        stage = f"re-quantizing in order ({self.quantizer.name})"
        formats = {layer.name: fmt for layer, fmt in wanted if fmt.quantized}
        tokens = self._text(report)
        with Claims(self.folder) as claims:
            while not claims.take(0):
                report("waiting for another process that quantizes this", 0, 1)
                time.sleep(0.5)
            missing = {layer.name for layer, _ in self.missing(wanted)}
            order = reading_order(self.model, tokens[:1])
            done, unused = 0, 0
            report(stage, done, len(missing))
            try:
                for names, statistics in inputs_in_order(self.model, tokens, order, missing):
                    unused += check_statistics(statistics)
                    for name in names:
                        if fmt := formats.get(name):
                            self._quantize(name, [fmt], statistics.get(name))
                            self.model.places[name].put(self.weight(name, fmt))
                    done += len(missing.intersection(names))
                    report(stage, done, len(missing))
            finally:
                self.model.restore()
        _warn(unused, len(missing))

    def _time(
        self,
        here: Mapping[str, list[Format]],
        missing: Mapping[str, list[Format]],
        statistics: Mapping[str, InputStatistics],
        report: Report,
    ) -> tuple[dict[str, list[Format]], float]:
        """Quantize a layer of each shape that is here; what is left, and the seconds that all that
        is missing then takes.

        A layer takes the seconds that the timed one of its shape and formats took, or as many a
        weight as the timed ones, and processes share them.
        """
        alike = {
            name: (self._layers[name].rows, self._layers[name].columns, *formats)
            for name, formats in missing.items()
        }
        left, timed = dict(here), dict[str, float]()

        def make(name: str) -> float:
            start = time.perf_counter()
            self._fill({name: left.pop(name)}, statistics)
            return time.perf_counter() - start

        def codes(name: str) -> int:
            return self._layers[name].weights * len(missing[name])

        first, shapes = next(iter(here)), list(dict.fromkeys(alike[name] for name in here))
        with threads(1 if self._processes(here) > 1 else torch.get_num_threads()):
            warming = make(first)  # libraries load meanwhile, so it says little
            for index, shape in enumerate(shapes):
                report("timing a layer of each shape", index, len(shapes))
                if other := next((name for name in left if alike[name] == shape), None):
                    timed[other] = make(other)
        report("timing a layer of each shape", len(shapes), len(shapes))
        timed = timed or {first: warming}
        seconds_of = {alike[name]: seconds for name, seconds in timed.items()}
        a_code = sum(timed.values()) / sum(map(codes, timed))
        rest = [name for name in missing if name in left or name not in here]
        seconds = sum(seconds_of.get(alike[name], a_code * codes(name)) for name in rest)
        return left, seconds / self._processes(left or missing)

    def _fill(
        self,
        missing: Mapping[str, list[Format]],
        statistics: Mapping[str, InputStatistics],
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Quantize the missing layers that no other process is working on, until all are there.

        Args:
            progress: called with how many are done.
        """
        numbers = {layer.name: number for number, layer in enumerate(self.model.every_layer)}
        pending, parent = list(missing), os.getppid()
        with Claims(self.folder) as claims:
            while pending and os.getppid() == parent:
                before = len(pending)
                for name in list(pending):
                    progress(len(missing) - len(pending))
                    if not claims.take(numbers[name]):
                        continue
                    try:
                        self._quantize(name, missing[name], statistics.get(name))
                    finally:
                        claims.release(numbers[name])
                    pending.remove(name)
                if len(pending) == before:
                    time.sleep(0.1)  # another process has all that is left
        progress(len(missing))

    def _quantize(
        self, name: str, formats: Iterable[Format], statistics: InputStatistics | None
    ) -> None:
        """Quantize one claimed layer in the formats that nobody has finished meanwhile."""
        formats = [fmt for fmt in formats if not intact(self.path(name, fmt))]
        if not formats:
            return
        stored = self.quantizer.quantize(self._reference(name).float(), formats, statistics)
        for fmt in formats:
            self._check(self._layers[name], fmt, stored[fmt.name])
            write_tensors(self.path(name, fmt), stored[fmt.name])

    def _reference(self, name: str) -> Tensor:
        """A layer's `(rows, columns)` weight, which is not read again where it is in place."""
        if self.model.streamed:
            weight = self.model.places[name].weight
            if not is_placeholder(weight):
                return weight
        return self.model.originals[name]

    def _processes(self, missing: Iterable[str]) -> int:
        """How many share the work."""
        layers = [self._layers[name] for name in missing]
        needed_bytes = max((working_bytes(layer, self.quantizer) for layer in layers), default=0)
        return processes(self.model.device, len(layers), needed_bytes)

    def stored(self, layer: str, fmt: Format) -> dict[str, Tensor]:
        """The tensors of one layer as the export will hold them, on the CPU."""
        if not fmt.quantized:
            return {"weight": self.model.originals[layer].to("cpu", torch.bfloat16)}
        path = self.path(layer, fmt)
        if not self.quantizer.calibrated and not path.exists():
            self.build([(self._layers[layer], fmt)])
        return self._files.read(path)

    def weight(self, layer: str, fmt: Format) -> Tensor:
        """The decoded `(rows, columns)` weight on the layer's device in its computing dtype.

        Do not write to it: recent ones are kept and handed out again.
        """
        if not fmt.quantized:
            return self.model.originals[layer]
        key = (layer, fmt.name)
        if key in self._decoded:
            self._decoded.move_to_end(key)
            return self._decoded[key]
        device = self.model.device_of(layer)
        stored = {name: tensor.to(device) for name, tensor in self.stored(layer, fmt).items()}
        weight = decode(stored, fmt).to(self.model.dtype)
        self._decoded[key] = weight
        self._decoded_bytes += weight.nbytes
        while self._decoded_bytes > self._most_decoded_bytes and len(self._decoded) > 1:
            self._decoded_bytes -= self._decoded.popitem(last=False)[1].nbytes
        return weight

    def forget(self) -> None:
        """Drop the decoded weights that are kept for reuse."""
        self._decoded.clear()
        self._decoded_bytes = 0

    def _check(self, layer: Layer, fmt: Format, stored: Mapping[str, Tensor]) -> None:
        """Raise `CheckError` unless a quantizer returned what the format stores."""
        promised = fmt.tensors(layer.rows, layer.columns)
        found = {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in stored.items()}
        if found != {name: (spec.dtype, spec.shape) for name, spec in promised.items()}:
            raise CheckError(
                f"quantizer '{self.quantizer.name}' made {found} for '{layer.name}', but "
                f"{fmt.name} stores {promised}"
            )
