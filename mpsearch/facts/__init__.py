"""Facts: what the model is asked, read from files, and split by subject.

The built-in facts are JSON lines, one file a relation, beside this module.
"""

from __future__ import annotations

from mpsearch.facts.fact import PARTITIONS, Fact, Relation
from mpsearch.facts.fact_set import DISTRACTORS, FactSet

__all__ = ["DISTRACTORS", "PARTITIONS", "Fact", "FactSet", "Relation"]
