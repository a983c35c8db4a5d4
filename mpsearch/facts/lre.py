"""Facts from the LRE data set as published: a folder of JSON files, one a relation.

A file holds `name`, `prompt_templates`, `prompt_templates_zs` and `samples` of `subject` and
`object`. The first template is the main one, all others are paraphrases. A subject with several
objects is one fact: the first object is the answer, the others are aliases.

Source: Hernandez et al. 2023 (arXiv:2308.09124), github.com/evandez/relations.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from mpsearch.errors import FactsError
from mpsearch.facts.fact import Fact, clean

logger = logging.getLogger(__name__)


def read_folder(folder: Path) -> tuple[Fact, ...]:
    """Facts of all `*.json` files below a folder, sorted by relation.

    Raises:
        FactsError: no such file, or one that is not in the LRE format.
    """
    paths = sorted(folder.rglob("*.json"))
    if not paths:
        raise FactsError(
            f"facts folder '{folder}' holds no .json files; a folder must hold relations in the "
            "LRE format, own facts are one .jsonl file"
        )
    facts: list[Fact] = []
    owners: dict[str, Path] = {}
    repeated = several = 0
    for path in paths:
        relation = _read(path)
        name = relation["name"]
        if name in owners:
            raise FactsError(f"{path}: relation '{name}' stands in {owners[name]} already")
        owners[name] = path
        answers: dict[str, dict[str, str]] = {}  # subject -> object, both folded -> as spelled
        spelled: dict[str, str] = {}
        for subject, answer in relation["samples"]:
            known = answers.setdefault(subject.casefold(), {})
            spelled.setdefault(subject.casefold(), subject)
            repeated += answer.casefold() in known
            known.setdefault(answer.casefold(), answer)
        for key, found in answers.items():
            answer, *aliases = found.values()
            several += bool(aliases)
            template, *paraphrases = relation["templates"]
            facts.append(
                Fact(name, template, spelled[key], answer, tuple(aliases), tuple(paraphrases))
            )
    if repeated or several:
        logger.warning(
            "%s: %d samples repeat another and are read once; %d subjects have several objects, "
            "all of them right",
            folder,
            repeated,
            several,
        )
    return tuple(sorted(facts, key=lambda fact: fact.relation))


def _read(path: Path) -> dict[str, Any]:
    """A relation's name, templates without repetition, and samples as pairs of clean texts."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        name = _text(content["name"])
        templates = tuple(
            dict.fromkeys(
                _text(template)
                for key in ("prompt_templates", "prompt_templates_zs")
                for template in content.get(key, ())
            )
        )
        samples = [(_text(s["subject"]), _text(s["object"])) for s in content["samples"]]
    except UnicodeDecodeError:
        raise FactsError(f"facts file '{path}' is not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise FactsError(f"facts file '{path}': {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FactsError(
            f"{path}: not a relation in the LRE format ({type(error).__name__}: {error}); it needs "
            "name, prompt_templates, and samples with subject and object"
        ) from None
    if not templates or not samples:
        raise FactsError(f"{path}: has {len(templates)} templates and {len(samples)} samples")
    for template in templates:
        if template.count("{}") != 1:
            raise FactsError(
                f"{path}: template '{template}' needs exactly one {{}} for the subject"
            )
    return {"name": name, "templates": templates, "samples": samples}


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is not a text")
    value.encode()  # half of a pair of surrogates is no character, though JSON can spell it
    return clean(value)
