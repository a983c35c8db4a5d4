"""Is a checkpoint what its run promised? Files by digest, then answers by its own loader.

The facts are asked in a fresh process, by the library that will serve the checkpoint, so that
nothing that made it can help it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpsearch import errors
from mpsearch.bootstrap import Interval, relation_interval
from mpsearch.errors import CheckError, ModelError, ResourceError, RunError, UsageError
from mpsearch.manifest import faults, read_manifest
from mpsearch.promise import Answers, Promise

AGREEMENT = 0.99  # of answers: kernels round in other ways than what scored the candidate
# Where the loader computes in another dtype than the search did, or on another device. transformers
# itself agrees with itself on 97.5 % of 200 facts between bf16 and float32, gptqmodel's fp16 on
# 98.4 % of 320, and a CPU's bf16 with an H200's on 98.8 % of 320.
AGREEMENT_OTHERWISE = 0.96
AGREEMENT_INT8 = 0.95  # LLM.int8's kernels round inputs to 8 bits, too, on every device
# By how much kernels may move the mean answer loss; another point's weights move it more.
_NEAR_NATS, _NEAR_SHARE = 0.1, 0.1
MOST_FACTS = 320  # of a checkpoint that promises none
SHOTS = 4
_SERVED = (
    "import sys; sys.path = [p for p in sys.path if p]; from mpsearch.served import main; main()"
)
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: a word.
        passed: whether it is as it should be.
        said: what was found, in words.
    """

    name: str
    passed: bool
    said: str


@dataclass(frozen=True)
class Verification:
    """What was found of a checkpoint.

    Attributes:
        checks: in the order in which they were made; files that differ end it.
        loader: the library that answered, with its version; None where it came to no answers.
        agreeing: facts answered as promised, right or wrong; None without a promise.
        recall: with its 95 % interval over subjects.
        promised_recall: of the candidate that was searched.
        answer_loss: nats, against the reference; None where that is not known.
        forgotten, gained: facts, against the reference; None likewise.
        seconds: of loading it, and of asking it.
    """

    folder: str
    checks: tuple[Check, ...]
    loader: str | None = None
    facts: int = 0
    agreeing: int | None = None
    recall: Interval | None = None
    promised_recall: Interval | None = None
    answer_loss: Interval | None = None
    forgotten: int | None = None
    gained: int | None = None
    load_seconds: float | None = None
    ask_seconds: float | None = None

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def reasons(self) -> list[str]:
        """What failed, in words."""
        return [check.said for check in self.checks if not check.passed]

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, **asdict(self)}


def verify(
    folder: str | Path,
    *,
    facts: str | None = None,
    reference: str | None = None,
    max_loss_nats: float | None = None,
    report: Report = lambda stage, done, total: None,
) -> Verification:
    """Check an export against the promise in its manifest, or any checkpoint against a reference.

    Args:
        folder: an export of mpsearch; with a reference, any quantized checkpoint.
        facts: the file that was searched with; the built-in facts by default.
        reference: the unquantized model, which is then asked, too.
        max_loss_nats: the largest answer loss that passes.
        report: called with (stage, done, total).
    Raises:
        RunError: no export, and no reference to set it against; or other facts than were promised.
        UsageError: a library is missing.
        ResourceError: the memory ran out.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise RunError(f"'{folder}' is no folder; pass what mpsearch export wrote")
    about, promise, checks = _promised(folder, reference)
    report("files", 0, 1)
    if about is not None:
        checks += [Check("files", False, said) for said in faults(folder, about)] or [
            Check("files", True, f"{len(about['files'])} files are as they were written")
        ]
        if not all(check.passed for check in checks):
            return Verification(str(folder), tuple(checks))
    report("files", 1, 1)
    if promise is None and max_loss_nats is None:
        raise UsageError(f"'{folder}' promises nothing that could be checked; say --max-loss NATS")
    known = None if promise is None else promise.reference
    told = reference is not None or (known is not None and known.log_prob_nats is not None)
    if max_loss_nats is not None and not told:
        raise RunError(
            f"'{folder}' does not say what the unquantized model answered; say --reference MODEL "
            "to measure the answer loss"
        )
    request = _request(promise, facts)
    stage = "asking the checkpoint in a fresh process"
    report(stage, 0, 1)
    try:
        answered = ask_fresh({**request, "model": str(folder), "own": True})
    except (ModelError, CheckError) as error:
        return Verification(str(folder), (*checks, Check("loads", False, str(error))))
    report(stage, 1, 1)
    if promise is not None and _asked_otherwise(promise, answered):
        raise RunError(
            f"facts '{facts or 'built-in'}' are not those that were searched with; pass that file "
            "with --facts"
        )
    checks.append(Check("loads", True, f"{answered['loader']} loads it"))
    if about is not None:
        stored, promised = answered["stored_bytes"], about.get("stored_bytes")
        said = f"{stored:,} bytes of tensors are stored"
        same = stored == promised
        checks.append(Check("bytes", same, said if same else f"{said}, promised were {promised}"))
    said_by_reference = None if promise is None else promise.reference
    if reference is not None:
        report("asking the reference", 0, 1)
        keys = list(zip(answered["relations"], answered["subjects"], strict=True))
        asked = ask_fresh({**request, "keys": keys, "model": reference, "own": False})
        report("asking the reference", 1, 1)
        enough = _enough(None, promise, asked)
        checks.append(_of_reference(asked, answered, about, said_by_reference, enough))
        said_by_reference = Answers.of(asked)
    enough = _enough(about, promise, answered)
    return _compare(folder, checks, answered, promise, enough, said_by_reference, max_loss_nats)


def _promised(
    folder: Path, reference: str | None
) -> tuple[dict[str, Any] | None, Promise | None, list[Check]]:
    """The manifest and the promise in it, each None where there is none."""
    try:
        about = read_manifest(folder)
    except RunError as error:
        if reference is None or (folder / "mpsearch.json").exists():
            raise RunError(
                f"{error}; to check another checkpoint say --reference MODEL and --max-loss NATS"
            ) from None
        return None, None, []
    if about.get("promise") is None:
        return about, None, []
    try:
        return about, Promise.of(about["promise"]), []
    except (KeyError, TypeError, ValueError, AttributeError):
        return about, None, [Check("promise", False, "the promise in mpsearch.json was edited")]


def _request(promise: Promise | None, facts: str | None) -> dict[str, Any]:
    """What a process is asked to ask."""
    plain = {"keys": None, "partition": "test", "most": MOST_FACTS, "shots": SHOTS}
    request = {"facts": facts, "chat_template": False, **plain}
    if promise is None:
        return request
    keys = list(zip(promise.relations, promise.subjects, strict=True))
    asked = {"keys": keys, "shots": promise.shots, "chat_template": promise.chat_template}
    return {**request, **asked}


def _asked_otherwise(promise: Promise, answered: Mapping[str, Any]) -> bool:
    """Whether other questions were asked because the facts are others, not the tokenizer.

    A file that only gained facts may still ask the same.
    """
    return bool(promise.facts != answered["facts"] and promise.tokens != answered["tokens"])


def ask_fresh(request: Mapping[str, Any]) -> dict[str, Any]:
    """What a fresh process answers.

    Raises:
        MpsearchError: what loading or asking it raised there.
        CheckError: the process failed in another way.
        ResourceError: it was killed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "answers.json"
        done = subprocess.run(
            # With -m, a torch.py that lies in the current folder would be run.
            [sys.executable, "-c", _SERVED],
            input=json.dumps({**request, "out": str(out)}),
            capture_output=True,
            text=True,
        )
        if not out.exists():
            if done.returncode in (-9, 137):
                raise ResourceError(
                    f"the process that asked '{request['model']}' was killed, as happens when "
                    "memory runs out; close other programs or use a larger machine"
                )
            last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            if "MemoryError" in last or errors.exhausted(RuntimeError(last)):
                raise ResourceError(
                    f"asking '{request['model']}' ran out of memory; close other programs or use a "
                    "larger machine"
                )
            raise CheckError(f"asking '{request['model']}' failed: {last[:300]}")
        answers: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    if "error" in answers:
        raise getattr(errors, answers["kind"])(answers["error"])
    return answers


def _of_reference(
    asked: Mapping[str, Any],
    answered: Mapping[str, Any],
    about: Mapping[str, Any] | None,
    known: Answers | None,
    enough: float,
) -> Check:
    """Whether it is the model that the checkpoint was made from.

    AWQ's scales were folded into the weights that were searched, so there no digest of the
    reference's can tell, but its answers can: folding keeps them. Nor can one tell where the same
    weights lie beside a config that is written otherwise, which may mean the same.
    """
    made_of = about or {}
    same = asked["fingerprint"] == made_of.get("base_fingerprint")
    other_config = made_of.get("base_config", asked["config"]) != asked["config"]
    if made_of and not made_of.get("awq") and not (same and other_config):
        is_it = "" if same else "not "
        said = f"the reference is {is_it}the model it was made from, '{made_of.get('base_model')}'"
    elif asked["tokens"] != answered["tokens"]:
        same, said = False, "the reference reads the facts as other tokens"
    elif known is not None:
        alike = sum(a == b for a, b in zip(known.correct, asked["correct"], strict=True))
        same = alike >= enough * len(known.correct)
        said = (
            f"the reference answers {alike} of {len(known.correct)} facts as the model it was "
            "made from did"
        )
    else:
        same, said = True, "the reference reads the facts as the same tokens"
    return Check("reference", same, said)


def _enough(
    about: Mapping[str, Any] | None, promise: Promise | None, answered: Mapping[str, Any]
) -> float:
    """Share of the facts that have to be answered as promised."""
    bitsandbytes = about is not None and about.get("target") == "bitsandbytes"
    if about is not None and bitsandbytes and "int8" in about["assignment"].values():
        return AGREEMENT_INT8
    if promise is None:
        return AGREEMENT
    other_device = promise.device not in (None, answered["device"])
    other = other_device or promise.dtype != answered["dtype"]
    return AGREEMENT_OTHERWISE if other else AGREEMENT


def _compare(
    folder: Path,
    checks: list[Check],
    answered: Mapping[str, Any],
    promise: Promise | None,
    enough: float,
    reference: Answers | None,
    max_loss_nats: float | None,
) -> Verification:
    relations, subjects = answered["relations"], answered["subjects"]

    def interval(values: Any) -> Interval:
        return relation_interval(values, relations, subjects)

    recall = interval(answered["correct"])
    loss, agreeing, forgotten, gained = None, None, None, None
    if promise is not None:
        if promise.tokens is not None:
            same = promise.tokens == answered["tokens"]
            said = "the tokenizer reads the facts as it did" if same else (
                "the tokenizer reads the facts as other tokens than the run's did"
            )  # fmt: skip
            checks.append(Check("tokens", same, said))
        pairs = zip(promise.candidate.correct, answered["correct"], strict=True)
        agreeing = sum(a == b for a, b in pairs)
        share = agreeing / len(relations)
        checks.append(
            Check(
                "answers",
                len(relations) - agreeing <= max(1, (1 - enough) * len(relations)),
                f"{agreeing} of {len(relations)} {promise.partition} facts are answered as "
                f"promised ({share:.1%}; {enough:.0%} are enough, computed in "
                f"{answered['dtype'].removeprefix('torch.')} on {answered['device']})",
            )
        )
        low, high = promise.recall.low, promise.recall.high
        # The same facts are asked, so few may have turned; an interval may have no width at all.
        few = max(1 - enough, 1 / len(relations))
        checks.append(
            Check(
                "recall",
                low - few <= recall.mean <= high + few,
                f"recall is {recall.mean:.1%}, promised were {promise.recall.mean:.1%} "
                f"[{low:.1%}, {high:.1%}]",
            )
        )
        if promise.candidate.log_prob_nats is not None:
            told = zip(promise.candidate.log_prob_nats, answered["log_prob_nats"], strict=True)
            moved = interval([before - after for before, after in told]).mean
            allowed = _NEAR_NATS + _NEAR_SHARE * abs(promise.answer_loss.mean)
            checks.append(
                Check(
                    "promised loss",
                    abs(moved) <= allowed,
                    f"an answer loses {moved:+.3f} nats more than the promised "
                    f"{promise.answer_loss.mean:.3f}; {allowed:.3f} either way pass",
                )
            )
    if reference is not None:
        flips = list(zip(reference.correct, answered["correct"], strict=True))
        forgotten = sum(was and not now for was, now in flips)
        gained = sum(now and not was for was, now in flips)
        if reference.log_prob_nats is not None:
            pairs_nats = zip(reference.log_prob_nats, answered["log_prob_nats"], strict=True)
            loss = interval([before - after for before, after in pairs_nats])
    if max_loss_nats is not None:
        assert loss is not None  # `verify` refuses where nothing can tell it
        checks.append(
            Check(
                "loss",
                loss.mean <= max_loss_nats,
                f"an answer loses {loss.mean:.3f} nats [{loss.low:.3f}, {loss.high:.3f}], "
                f"{max_loss_nats:g} are allowed",
            )
        )
    return Verification(
        str(folder),
        tuple(checks),
        answered["loader"],
        len(relations),
        agreeing,
        recall,
        None if promise is None else promise.recall,
        loss,
        forgotten,
        gained,
        answered["load_seconds"],
        answered["ask_seconds"],
    )
