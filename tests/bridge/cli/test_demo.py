"""`linen-nnx demo --json`: the record of the demo, and nothing else on stdout."""

import json

import pytest

from bridge.demo import outdir
from bridge.demo import run as room


@pytest.mark.parametrize(("off", "code"), [([], 0), (["logits: 0.5"], 1)])
def test_json_is_what_the_demo_has_recorded(off, code, tmp_path, monkeypatch, run):
    def main(*, out, seed, quiet):
        print("tables")
        outdir.record(out, {"seed": seed, "epochs": 12, "figures": {"logits": 0.0}, "off": off})
        return code

    monkeypatch.setattr(room, "main", main)
    done, out, err = run("demo", "--out", tmp_path, "--seed", "3", "-q", "--json")
    document = json.loads(out)
    assert (done, err) == (code, "tables\n")
    assert (document["seed"], document["off"], document["exit_code"]) == (3, off, code)
    assert document["figures"] == {"logits": 0.0}
    assert document["out"] == str(tmp_path)
    assert document["files"] == ["demo.json"]
