"""Assignments: a frozen mapping with an id that is the same in every run."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpsearch.assignment import Assignment

PLAIN = {"m.0.q_proj+k_proj": "int4-g64", "m.0.o_proj": "int2-g64"}
mappings = st.dictionaries(st.text(max_size=8), st.text(max_size=4), max_size=6)


def test_it_reads_as_the_mapping_it_was_made_of() -> None:
    assignment = Assignment.of(PLAIN)
    assert dict(assignment) == PLAIN
    assert list(assignment) == list(PLAIN)
    assert len(assignment) == 2
    assert assignment["m.0.o_proj"] == "int2-g64"
    assert "m.0.o_proj" in assignment
    assert "m.1.o_proj" not in assignment
    with pytest.raises(KeyError):
        assignment["m.1.o_proj"]


def test_it_is_frozen_and_no_later_change_of_its_source_reaches_it() -> None:
    source = dict(PLAIN)
    assignment = Assignment.of(source)
    source["m.0.o_proj"] = "int8-g64"
    assert assignment["m.0.o_proj"] == "int2-g64"
    with pytest.raises(FrozenInstanceError):
        assignment.pairs = ()  # type: ignore[misc]
    with pytest.raises(TypeError):
        assignment["m.0.o_proj"] = "bf16"  # type: ignore[index]


def test_the_id_is_pinned_so_that_old_runs_keep_their_names() -> None:
    assert Assignment.of(PLAIN).id == "ef54af44"


def test_the_bank_is_no_part_of_identity() -> None:
    bare, scored = Assignment.of(PLAIN), Assignment.of(PLAIN, bank='{"quantizer": "gptq"}')
    assert bare == scored
    assert hash(bare) == hash(scored)
    assert bare.id == scored.id
    assert (bare.bank, scored.bank) == ("", '{"quantizer": "gptq"}')


def test_a_refined_assignment_is_another_candidate_for_each_bank_and_knows_its_parent() -> None:
    shared = Assignment.of(PLAIN, bank='{"quantizer": "gptq"}')
    first, second = (Assignment.of(PLAIN, bank, refined=True) for bank in ("1", "2"))
    assert dict(first) == dict(shared)
    assert len({shared, first, second}) == len({shared.id, first.id, second.id}) == 3
    assert first == Assignment.of(PLAIN, "1", refined=True)
    assert first.id == Assignment.of(PLAIN, "1", refined=True).id
    assert first.parent == second.parent == shared == shared.parent
    assert first.parent.id == shared.id


def test_one_other_format_makes_another_assignment() -> None:
    other = Assignment.of({**PLAIN, "m.0.o_proj": "int3-g64"})
    assert other != Assignment.of(PLAIN)
    assert other.id != Assignment.of(PLAIN).id


def test_an_assignment_equals_no_plain_mapping() -> None:
    assert Assignment.of(PLAIN) != PLAIN


@given(mappings)
@settings(deadline=None, max_examples=100)
def test_json_gives_it_back(mapping: dict[str, str]) -> None:
    assignment = Assignment.of(mapping)
    twin = Assignment.of(json.loads(json.dumps(dict(assignment))))
    assert twin == assignment
    assert hash(twin) == hash(assignment)
    assert twin.id == assignment.id


@given(mappings, mappings)
@settings(deadline=None, max_examples=100)
def test_ids_hashes_and_equality_agree(a: dict[str, str], b: dict[str, str]) -> None:
    first, second = Assignment.of(a), Assignment.of(b)
    same = list(a.items()) == list(b.items())
    assert (first == second) is same
    assert (first.id == second.id) is same
    assert len({first, second}) == (1 if same else 2)
    assert len(first.id) == 8
    assert set(first.id) <= set("0123456789abcdef")
