"""Programs that failed once, shrunk: each stays here when what it found is mended.

Law: a name says what went wrong. All run over one small graph, or the one that they need.
"""

from tests.fuzz import programs as p
from tests.support.graphs import Cell, Graph, Settings, Thing

SMALL = Graph(
    (Cell("Param", (2,), "float32", 1, ()), Cell("Count", (2,), "int32", 3, (("tag", "x"),))),
    (Thing("Node", (("a", ("cell", 0)), ("b", ("cell", 1)), ("c", ("thing", 1)))), Thing("Rngs", ())),
)
HALF = Graph((Cell("Param", (3,), "bfloat16", 1, ()),), (Thing("Node", (("a", ("cell", 0)),)),))
ARRAYS = Graph(
    (Cell("Param", (2,), "float32", 1, ()),),
    (Thing("Node", (("a", ("cell", 0)), ("t", ("array", 4)), ("n", ("numpy", 7)), ("l", ("list", (("array", 2),))))),),
)
CONFIG = Graph(SMALL.cells[:1], (Thing("Node", (("a", ("cell", 0)), ("config", ("static", Settings(3))))),))
IN_A_DICT = Graph(SMALL.cells[:1], (Thing("Node", (("d", ("dict", (("x", ("cell", 0)),))),)),))

EXAMPLES = {
    "an array written in a scan": p.Program(ARRAYS, (p.Scan(2, "Carry", (p.WritePlain(0, 1),)),), 1),
    "an array only read in a scan": p.Program(ARRAYS, (p.Scan(2, "Carry", (p.ReadPlain(0),)),), 1),
    "an array written in a while_loop": p.Program(ARRAYS, (p.While(2, (p.WritePlain(0, 1),)),), 1),
    "an array written in one branch": p.Program(ARRAYS, (p.Cond((p.WritePlain(0, 1),), (p.Shape(),)),), 1),
    "an array written in both branches": p.Program(ARRAYS, (p.CondSame((p.WritePlain(1, 1),)),), 1),
    "an array under None": p.Program(ARRAYS, (p.Scan(2, "None", (p.ReadPlain(0),)),), 1),
    "arrays in the carry": p.Program(ARRAYS, (p.Fori(2, True, (p.WritePlain(0, 1), p.WritePlain(2, 1))),), 1),
    "a closure of cond changes": p.Program(SMALL, (p.CondSame((p.ReadOutside("number"),)),), 2),
    "a closure of fori_loop changes": p.Program(SMALL, (p.Fori(2, True, (p.ReadOutside("array"),)),), 2),
    "a closure of while_loop changes": p.Program(SMALL, (p.While(2, (p.ReadOutside("array"),)),), 2),
    "a closure of scan changes": p.Program(SMALL, (p.Scan(2, "Carry", (p.ReadOutside("array"),)),), 2),
    "a closure of remat changes": p.Program(SMALL, (p.Remat((p.ReadOutside("array"),)),), 2),
    "a closure of vmap changes": p.Program(SMALL, (p.VmapShared((p.ReadOutside("array"),)),), 2),
    "a closure of grad changes": p.Program(SMALL, (p.Grad("x", (p.ReadOutside("array"), p.Square(0))),), 2),
    "a number written over an array": p.Program(SMALL, (p.Write(0, "number", 3), p.Read(0)), 1),
    "a scalar broadcast into an array": p.Program(SMALL, (p.Scan(2, "Carry", (p.Write(0, "broadcast", 3),)),), 1),
    "float32 written into bfloat16": p.Program(HALF, (p.Fori(2, True, (p.Write(0, "wide", 1),)),), 1),
    "a wrong shape written": p.Program(SMALL, (p.Write(0, "wrong shape", 1),), 1),
    "a State made anew in each step": p.Program(SMALL, (p.StateCarry("scan", (p.Write(0, "whole", 1),)),), 1),
    "merge in a transform": p.Program(SMALL, (p.Functional((p.Write(0, "whole", 1), p.Draw(0))),), 2),
    "a config without a hash": p.Program(CONFIG, (p.Jit((p.Read(0),)), p.Scan(1, "Carry", (p.Read(0),))), 1),
    "popped out of a dict": p.Program(IN_A_DICT, (p.Pop("Param"), p.Shape(), p.Pop("Param")), 1),
    "an attribute removed and set anew": p.Program(SMALL, (p.Jit((p.Delete(0, 0), p.Attach(0, "param", 0))),), 1),
}
