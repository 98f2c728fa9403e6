"""All pairs of equal models, and all faults planted into them: what `bridge.equivalence` is judged by.

Law: names are unique; what is not in this table is not tested. One file a family in `pairs/`.
"""

from tests.support.pairs import feedforward, language, lifted, recurrent, values, vision

FAMILIES = (feedforward, vision, language, recurrent, lifted, values)
PAIRS = {pair.name: pair for family in FAMILIES for pair in family.PAIRS}
FAULTS = {fault.name: fault for family in FAMILIES for fault in family.FAULTS}
