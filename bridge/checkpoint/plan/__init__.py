"""A conversion before it runs: which leaf of the target is made how, from which leaves of the source.

Law: planning reads no arrays.
Knows trees, rules and targets; knows no formats.
"""

from bridge.checkpoint.plan.places import CollectionClashError, UnknownCollectionsError
from bridge.checkpoint.plan.plan import ConversionReport, Plan, make_plan

__all__ = ["CollectionClashError", "ConversionReport", "Plan", "UnknownCollectionsError", "make_plan"]
