"""The weight bank: every (layer, format) quantized once, packed, on disk.

A file holds exactly the tensors that an export will hold. Its path is made of what decided them:
the model's fingerprint, the quantizer with its settings and library version, the calibration, the
layer and the format. So runs share it, and nothing stale is ever read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import re
import signal
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpsearch.calibration import Calibration, calibration_tokens, input_statistics
from mpsearch.codecs import decode
from mpsearch.device import available_memory_bytes, require_disk
from mpsearch.errors import CheckError, ResourceError, RunError, UsageError
from mpsearch.files import Claims, home, write_atomically
from mpsearch.formats import FORMATS, Format
from mpsearch.layers import Layer
from mpsearch.models import Model
from mpsearch.quantizers import QUANTIZERS, InputStatistics, Quantizer, get_quantizer
from mpsearch.tensor_files import intact, read_tensors, write_tensors

log = logging.getLogger(__name__)

Report = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """A progress report that goes nowhere."""


Wanted = list[tuple[Layer, Format]]


def holdings(wanted: Wanted, missing: Wanted) -> dict[str, tuple[int, int, int]]:
    """By format: files there, files wanted, and stored bytes of those that are there."""
    held: dict[str, tuple[int, int, int]] = {}
    lacking = set(missing)
    for layer, fmt in wanted:
        if fmt.quantized:
            there = (layer, fmt) not in lacking
            have, of, size = held.get(fmt.name, (0, 0, 0))
            held[fmt.name] = (have + there, of + 1, size + there * fmt.layer_bytes(layer))
    return held


def check_formats(quantizer: Quantizer, wanted: Iterable[tuple[Layer, Format]]) -> None:
    """Raise `UsageError` for a format that the quantizer or a layer's shape cannot take."""
    for layer, fmt in wanted:
        if fmt.quantized and not quantizer.makes(fmt):
            raise UsageError(
                f"quantizer '{quantizer.name}' does not make format '{fmt.name}'; use another, or "
                "leave the format out of the space"
            )
        if layer.rows % fmt.side_multiple or layer.columns % fmt.side_multiple:
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': its {layer.rows} x "
                f"{layer.columns} weights are no multiples of {fmt.side_multiple} on both sides; "
                "give it bf16 by a rule of the space"
            )
        if not fmt.fits(layer):
            other = _nearest_fit(fmt, layer)
            raise UsageError(
                f"format '{fmt.name}' cannot hold layer '{layer.name}': groups of "
                f"{fmt.group_size} do not divide its {layer.columns} columns; "
                + (f"use {other.name}, or " if other else "")
                + "give the layer bf16 by a rule of the space"
            )


def _nearest_fit(fmt: Format, layer: Layer) -> Format | None:
    """The same kind of format with the largest groups below its own that divide the columns."""
    alike = [
        other
        for other in FORMATS.values()
        if (other.container, other.bits, other.symmetric, other.number, other.packed)
        == (fmt.container, fmt.bits, fmt.symmetric, fmt.number, fmt.packed)
        and other.fits(layer)
        and (other.group_size or 0) < (fmt.group_size or 0)
    ]
    return max(alike, key=lambda other: other.group_size or 0, default=None)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """So many threads of torch's, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self._layers = {layer.name: layer for layer in model.every_layer}
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
        bank = cls(model, get_quantizer(name, containers[0]), Calibration.of(recipe))
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
    ) -> None:
        """Quantize what is missing or damaged among the wanted (layer, format) pairs.

        Any number of processes may build one bank: none does what another has done or is doing.

        Args:
            estimated: called with the seconds that the work will take, as soon as a layer of each
                shape is made, which is done first and timed if this is given.
        Raises:
            UsageError: a format that a layer's shape or the quantizer cannot take.
            ResourceError: the disk is or becomes too small; finished files stay.
            CheckError: NaN at a layer's input, or a quantizer that returned something else than
                its format stores.
        """
        missing: dict[str, list[Format]] = {}
        for layer, fmt in self.missing(wanted):
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
        statistics = self._statistics(report)
        if estimated is not None:
            missing, seconds = self._time(missing, statistics, report)
            if missing:
                estimated(seconds)
        with self._helpers(missing, statistics):
            self._fill(missing, statistics, report)

    def _statistics(self, report: Report) -> dict[str, InputStatistics]:
        """What calibration says about the inputs of every layer; empty if nothing asks for it."""
        if not self.quantizer.calibrated:
            return {}
        report("calibration text", 0, 1)
        text = calibration_tokens(self.model, self.calibration)
        statistics = input_statistics(
            self.model, text, lambda done, total: report("calibration", done, total)
        )
        unused = 0
        for name, seen in statistics.items():
            diagonal = seen.gram.diagonal()
            if bad := int((~diagonal.isfinite()).sum()):
                raise CheckError(
                    f"the inputs of '{name}' are NaN or infinite in {bad} of {len(diagonal)} "
                    "columns on the calibration text; the model or the text is broken"
                )
            unused += bool((diagonal == 0).any())
        if unused:
            log.warning(
                "%d of %d layers have input columns that the calibration text never uses; their "
                "weights there become zero",
                unused,
                len(statistics),
            )
        return statistics

    def _time(
        self,
        missing: Mapping[str, list[Format]],
        statistics: Mapping[str, InputStatistics],
        report: Report,
    ) -> tuple[dict[str, list[Format]], float]:
        """Quantize a layer of each shape; what is left, and the seconds that it will take.

        A layer takes the seconds that the timed one of its shape and formats took, and processes
        share them.
        """
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, formats in missing.items():
            layer = self._layers[name]
            alike.setdefault((layer.rows, layer.columns, *formats), []).append(name)
        left, seconds = dict(missing), 0.0

        def make(name: str) -> float:
            start = time.perf_counter()
            self._fill({name: left.pop(name)}, statistics, silent)
            return time.perf_counter() - start

        with _threads(1 if self._processes(missing) > 1 else torch.get_num_threads()):
            make(next(iter(missing)))  # libraries load meanwhile, so its time says nothing
            for index, same in enumerate(alike.values()):
                report("timing a layer of each shape", index, len(alike))
                if others := [name for name in same if name in left]:
                    seconds += make(others[0]) * (len(others) - 1)
        report("timing a layer of each shape", len(alike), len(alike))
        return left, seconds / self._processes(left)

    def _fill(
        self,
        missing: Mapping[str, list[Format]],
        statistics: Mapping[str, InputStatistics],
        report: Report,
    ) -> None:
        """Quantize the missing layers that no other process is working on, until all are there."""
        numbers = {layer.name: number for number, layer in enumerate(self.model.every_layer)}
        pending, parent = list(missing), os.getppid()
        with Claims(self.folder) as claims:
            while pending and os.getppid() == parent:
                before = len(pending)
                for name in list(pending):
                    done = len(missing) - len(pending)
                    report(f"quantizing ({self.quantizer.name})", done, len(missing))
                    if not claims.take(numbers[name]):
                        continue
                    try:
                        self._quantize(name, missing[name], statistics.get(name))
                    finally:
                        claims.release(numbers[name])
                    pending.remove(name)
                if len(pending) == before:
                    time.sleep(0.1)  # another process has all that is left
        report(f"quantizing ({self.quantizer.name})", len(missing), len(missing))

    def _quantize(
        self, name: str, formats: Iterable[Format], statistics: InputStatistics | None
    ) -> None:
        """Quantize one claimed layer in the formats that nobody has finished meanwhile."""
        formats = [fmt for fmt in formats if not intact(self.path(name, fmt))]
        if not formats:
            return
        stored = self.quantizer.quantize(self.model.originals[name].float(), formats, statistics)
        for fmt in formats:
            self._check(self._layers[name], fmt, stored[fmt.name])
            write_tensors(self.path(name, fmt), stored[fmt.name])

    def _processes(self, missing: Mapping[str, list[Format]]) -> int:
        """How many share the work: one a thread where processes can be forked."""
        forks = self.model.device.type == "cpu" and sys.platform == "linux"
        return max(1, min(torch.get_num_threads(), len(missing))) if forks else 1

    @contextmanager
    def _helpers(
        self, missing: Mapping[str, list[Format]], statistics: Mapping[str, InputStatistics]
    ) -> Iterator[None]:
        """A process a thread, each with one: quantizers spend their time between small products.

        They share the work by its claims, and what one leaves undone the caller does. Forked, as
        torch's data loaders are, since a started one would run the caller's script again.
        """
        count = self._processes(missing) - 1
        if not count:
            yield
            return

        def help_out() -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller is told, and ends us
            torch.set_num_threads(1)
            with suppress(Exception):  # the caller meets the same error
                self._fill(missing, statistics, silent)

        context = multiprocessing.get_context("fork")
        helpers = [context.Process(target=help_out, daemon=True) for _ in range(count)]
        for helper in helpers:
            helper.start()
        try:
            with _threads(1):
                yield
        finally:
            for helper in helpers:
                helper.terminate()
                helper.join()

    def stored(self, layer: str, fmt: Format) -> dict[str, Tensor]:
        """The tensors of one layer as the export will hold them, on the CPU."""
        if not fmt.quantized:
            return {"weight": self.model.originals[layer].to("cpu", torch.bfloat16)}
        path = self.path(layer, fmt)
        if not self.quantizer.calibrated and not path.exists():
            self.build([(self._layers[layer], fmt)])
        return read_tensors(path)

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
