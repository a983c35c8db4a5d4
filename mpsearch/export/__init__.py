"""Exports: one file a target, reached through one function."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank
from mpsearch.device import require_disk
from mpsearch.errors import CheckError, InfeasibleError, RunError, UsageError
from mpsearch.evaluate import quantized_layers
from mpsearch.export.bitsandbytes import write_bitsandbytes
from mpsearch.export.card import FIGURE, model_card
from mpsearch.export.compressed_tensors import write_compressed_tensors
from mpsearch.export.dequantized import DEQUANTIZED, as_stored, write_dequantized
from mpsearch.export.gguf import check_model as check_gguf
from mpsearch.export.gguf import gguf_tensor_bytes, is_gguf, write_gguf
from mpsearch.export.gptq import write_gptq
from mpsearch.files import published
from mpsearch.formats import Format, nearest
from mpsearch.manifest import NAME as MANIFEST
from mpsearch.manifest import read_manifest, unlisted, write_manifest
from mpsearch.model_files import config_digest
from mpsearch.models import Model
from mpsearch.plot import plot_bits
from mpsearch.promise import promise
from mpsearch.quantizers import get_quantizer
from mpsearch.run import Run
from mpsearch.searched import check_model
from mpsearch.space import ResolvedSpace, SearchSpace
from mpsearch.targets import TARGETS

log = logging.getLogger(__name__)

# By container.
WRITERS = {
    "compressed-tensors": write_compressed_tensors,
    "gptq": write_gptq,
    "bitsandbytes": write_bitsandbytes,
    "gguf": write_gguf,
}
_VERSIONS = ("mpsearch", "torch", "transformers", "safetensors")
EXPORT_TARGETS = tuple(name for name, target in TARGETS.items() if target.container in WRITERS)


def export(
    model: Model,
    assignment: Assignment,
    *,
    to: str = "compressed-tensors",
    out: str | Path,
    space: ResolvedSpace | None = None,
    run: Run | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an assignment as a checkpoint that other libraries load.

    Codes and scales come from the bank that the assignment was scored with; only what is no longer
    there is quantized again. The folder appears when it is whole, with a model card and a manifest,
    by which `mpsearch.verify` finds out whether it still is.

    Args:
        model: the one that was searched, holding its reference weights.
        assignment: from a run's point; one made by hand gets the target's default quantizer.
        to: the target, or `dequantized`.
        out: must not exist, unless `overwrite`.
        space: the groups that the assignment names; by default the run's, or those that `to` ties.
        run: where the assignment was scored; what it measured is then promised.
        overwrite: replace an earlier export in `out`, once the new one is whole.
    Returns:
        The folder.
    Raises:
        UsageError: an unknown target, or one that cannot hold a layer's format.
        RunError: `out` exists, the assignment is for another model, or its codes are gone and would
            be made otherwise now.
        InfeasibleError: nothing is quantized.
        ResourceError: the disk is too small.
        CheckError: what was written has another size than was predicted.
    """
    out = Path(out)
    check_out(out, overwrite)
    if to not in (known := (*EXPORT_TARGETS, DEQUANTIZED)):
        raise UsageError(f"no export target '{to}'{nearest(to, known)}")
    if run:
        check_model(run, model)
    space = space or (run.space if run else SearchSpace.default().resolve(model))
    names = {group.name for group in space.groups}
    if set(assignment) != names:
        odd = sorted(set(assignment) ^ names)[0]
        raise RunError(f"the assignment does not fit this model: group '{odd}' is in one only")
    formats = space.layer_formats(assignment)
    if to != DEQUANTIZED:
        _check_target(model, formats, to)
    if not any(fmt.quantized for fmt in formats.values()):
        raise InfeasibleError("every layer of this point is bf16: nothing to export, use the model")
    bank = (
        Bank.of(model, json.loads(assignment.bank))
        if assignment.bank
        else Bank(model, get_quantizer(None, space.target.container))
    )
    stored = as_stored(assignment, to)
    predicted = space.stored_bytes(stored)
    if to == DEQUANTIZED and space.target.float32_vectors:  # which stay bf16 in a plain checkpoint
        predicted -= 2 * model.vector_weights
    require_disk(int(predicted * 1.05) + 10_000_000, out, "the export")
    missed = partial(_check_codes, run, model, bank) if run and assignment.bank else None
    bank.build(quantized_layers(space, assignment), missed=missed)
    point = run.find(assignment.id) if run else None
    promised = promise(run, point) if run and point else None
    with published(out, overwrite) as unfinished:
        write = write_dequantized if to == DEQUANTIZED else WRITERS[TARGETS[to].container]
        write(model, bank, formats, unfinished)
        if (written := tensor_bytes(unfinished)) != predicted:
            raise CheckError(
                f"the export holds {written:,} bytes of tensors and {predicted:,} were predicted; "
                "this is our fault, please report it"
            )
        about = {
            "base_model": model.name,
            "base_revision": _revision(model.folder),
            "base_fingerprint": model.fingerprint,
            "base_config": config_digest(model.folder),
            "awq": bool(model.preparation),
            "target": to,
            "assignment_id": assignment.id,
            "assignment": dict(assignment),
            "bank": bank.settings,
            "stored_bytes": predicted,
            "bits_per_weight": space.bits_per_weight(stored),
            "versions": {name: version(name) for name in _VERSIONS},
            "promise": promised and promised.to_json(),
        }
        plot_bits(space, assignment, assignment.id, unfinished / FIGURE)
        able, tables = _able(model, formats), _quantizes_tables(model, formats)
        card = model_card(about, space, formats, able, tables, run, point, promised)
        (unfinished / "README.md").write_text(card, encoding="utf-8")
        write_manifest(unfinished, about)
    return out


def _check_codes(run: Run, model: Model, bank: Bank, lacking: int) -> None:
    """Say that codes of a run are made again; refuse where they would be others.

    Raises:
        RunError: the quantizer reads what layers compute, which is in another dtype than then.
    """
    then, now = run.question["dtype"], str(model.dtype)
    if bank.quantizer.calibrated and then != now:
        raise RunError(
            f"{lacking} layers that '{run.folder}' scored are no longer in the weight bank "
            f"'{bank.folder}', and {bank.quantizer.name} would make other codes in {now} than it "
            f"did in {then}; bring that folder back, or search again"
        )
    log.warning(
        "%d layers that '%s' scored are no longer in the weight bank '%s', so they are quantized "
        "again; 'mpsearch verify' says whether the export still is what was scored",
        lacking,
        run.folder,
        bank.folder,
    )


def check_writable(model: Model, target: str) -> None:
    """Raise `UsageError` if no point of a model can be written for a target, whatever it is."""
    if TARGETS[target].container == "gguf":
        check_gguf(model)


def check_out(out: Path, overwrite: bool) -> None:
    """Raise `RunError` unless a folder may be written there."""
    there = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise RunError(f"'{out}' cannot be written: '{there}' is no folder; choose another -o")
    if not out.exists():
        return
    if not overwrite:
        raise RunError(f"'{out}' exists; choose another -o, or say --overwrite to replace it")
    if not (out / MANIFEST).is_file():
        raise RunError(
            f"'{out}' was not written by mpsearch export, so it is not overwritten; choose "
            "another -o"
        )
    if more := unlisted(out, read_manifest(out)):
        raise RunError(
            f"'{more[0]}' in '{out}' was not written by mpsearch export, so the folder is not "
            "overwritten; move what is yours, or choose another -o"
        )


def tensor_bytes(folder: Path) -> int:
    """Bytes of all tensors in a folder's safetensors files, or its GGUF file."""
    if is_gguf(folder):
        return gguf_tensor_bytes(folder)
    total = 0
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
        total += path.stat().st_size - 8 - header_bytes
    return total


def _revision(folder: Path) -> str:
    """The commit of a model from the hub, which is the name of its folder in the cache."""
    return folder.name if folder.parent.name == "snapshots" else ""


def _misfits(model: Model, formats: Mapping[str, Format], to: str) -> dict[str, str]:
    embedding = model.embedding.name if model.embedding else ""
    head = model.head.name if model.head else ""
    return TARGETS[to].misfits(formats, embedding, head)


def _quantizes_tables(model: Model, formats: Mapping[str, Format]) -> bool:
    """Whether the embedding or the head is among what is quantized."""
    tables = [layer.name for layer in (model.embedding, model.head) if layer is not None]
    return any(name in formats and formats[name].quantized for name in tables)


def _able(model: Model, formats: Mapping[str, Format]) -> list[str]:
    """The targets that can hold them."""
    return [to for to in EXPORT_TARGETS if not _misfits(model, formats, to)]


def _check_target(model: Model, formats: Mapping[str, Format], to: str) -> None:
    """Raise `UsageError`, naming a layer and the targets that would do, if `to` cannot hold it."""
    wrong = _misfits(model, formats, to)
    if not wrong:
        return
    layer, what = next(iter(wrong.items()))
    more = f" and {len(wrong) - 1} more layers do not fit" if len(wrong) > 1 else ""
    able = _able(model, formats)
    held = ", ".join(fmt.name for fmt in TARGETS[to].formats)
    raise UsageError(
        f"a checkpoint for {to} cannot hold this point: '{layer}' {what}{more}; it holds {held}: "
        f"search a space with 'target: {to}', or export to {' or '.join((*able, DEQUANTIZED))}"
    )
