"""A point's layers quantized again in order, by what they read then: a new candidate of its run.

A search quantizes every layer on its own, by the inputs that it has in the reference. Once the
formats are chosen, each layer can be quantized by the inputs that the quantized layers before it
will really give it. Bytes stay as they are; codes and scales change.
"""

from __future__ import annotations

import json

from mpsearch.assignment import Assignment
from mpsearch.bank import Bank, Report, silent
from mpsearch.calibration import Calibration
from mpsearch.device import require_memory
from mpsearch.errors import InfeasibleError, RunError, UsageError
from mpsearch.evaluate import Bench, quantized_layers
from mpsearch.facts import FactSet
from mpsearch.models import Model
from mpsearch.points import Point
from mpsearch.quantizers import QUANTIZERS, Quantizer, get_quantizer
from mpsearch.run import Run
from mpsearch.scorer import Scorer
from mpsearch.searched import check_model
from mpsearch.text import Text
from mpsearch.wanted import digest_of


def refine(
    model: Model,
    run: Run,
    point: Point,
    *,
    facts: FactSet | None = None,
    text: Text | None = None,
    calibration: Calibration | None = None,
    report: Report = silent,
) -> Point:
    """Quantize a point's layers in order, and score the result beside it.

    It is scored on the search and validation facts of the run. If it becomes the pick of a
    finished run, the test facts are read for it, which is another look at them: the choice between
    it and what it refines was made on validation facts. What has been quantized or scored before
    is not done again, so a call that was interrupted goes on where it was.

    Args:
        model: as it was searched, holding its reference weights.
        point: any validated one that is not refined itself.
        facts, text: those of the run; the built-in ones by default.
        calibration: by default the run's own; of a text file, that file has to be given again.
        report: called with (stage, done, total).
    Returns:
        The refined point, whose `parent` is the id of the other.
    Raises:
        UsageError, RunError, InfeasibleError: of `check_refinable`, or another model or arithmetic.
        CheckError: NaN at a layer's input, or from the refined candidate.
        ResourceError: memory or disk is too small; what is finished is kept.
    """
    quantizer = check_refinable(run, point, facts, text)
    check_model(run, model)
    for key, now in (("dtype", str(model.dtype)), ("chat_template", model.chat)):
        if now != (before := run.question.get(key, now)):
            raise RunError(
                f"'{run.folder}' was searched with {key} {before}, and this model is loaded with "
                f"{now}; refine it as it was searched"
            )
    shared = Bank.of(model, run.question["bank"])
    wanted = quantized_layers(run.space, point.assignment)
    calibration = calibration or shared.calibration
    bank = Bank(model, quantizer, calibration, in_order=digest_of(wanted))
    settings = json.dumps(bank.settings, sort_keys=True)
    refined = Assignment(point.assignment.pairs, settings, refined=True)
    if not model.streamed:  # else a block's decoded weights are in memory at a time
        weights = sum(layer.weights for layer, _ in wanted)
        require_memory(model.dtype.itemsize * weights + 1_000_000_000, model.device, "refining")
    with run.locked():
        run = Run.open(run.folder)  # as whoever held it has left it
        run.mend()
        bank.build(wanted, report)
        with Bench(run.space, shared) as bench:
            scorer = Scorer(model, facts or FactSet.builtin(), text or Text.builtin(), run, bench)
            partitions = ("search", "validation")
            for done, partition in enumerate(partitions):
                report("scoring the refined point", done, len(partitions))
                scorer.score(refined, "refined", partition)
            report("scoring the refined point", len(partitions), len(partitions))
            pick = run.front().pick
            if run.finished and pick is not None and pick.assignment == refined:
                scorer.read_test(report)
    return run.find(refined.id)


def check_refinable(
    run: Run, point: Point, facts: FactSet | None = None, text: Text | None = None
) -> Quantizer:
    """The quantizer that refines a point: the run's own if it reads inputs, else GPTQ.

    Rounding and HQQ look at weights alone and so would choose the same codes again. Where they
    filled the bank, the gain of refining holds what GPTQ gains in itself.

    Raises:
        RunError: the point is refined already, or a search is running.
        InfeasibleError: none of its layers is quantized.
        UsageError: facts or text are not the run's, or nothing that reads inputs makes its formats.
    """
    if point.parent:
        raise RunError(
            f"point {point.id} is refined already, from {point.parent}; there is no more to gain "
            "in the same way, refine another point"
        )
    if not any(fmt.quantized for fmt in run.space.layer_formats(point.assignment).values()):
        raise InfeasibleError(
            f"every layer of point {point.id} is bf16: there is nothing to quantize again; refine "
            "another point"
        )
    given = {"facts": (facts or FactSet.builtin()).digest, "text": text and text.digest}
    for flag, digest in given.items():
        if digest != run.question.get(flag):
            raise UsageError(
                f"the {flag} are not those that '{run.folder}' was searched with; give the same "
                f"--{flag} FILE, or none if it had none"
            )
    container = run.space.target.container
    quantizer = get_quantizer(run.question["bank"]["quantizer"], container)
    if not quantizer.calibrated:
        if "gptq" not in QUANTIZERS[container]:
            raise UsageError(
                f"refining quantizes by what a layer reads, and no quantizer of {container} "
                "formats does; search a space of compressed-tensors or gptq"
            )
        quantizer = get_quantizer("gptq", container)
    with run.locked():
        return quantizer
