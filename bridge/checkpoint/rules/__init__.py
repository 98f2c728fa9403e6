"""Rules: where leaves go and what is done to them, in TOML or Python, with an inverse.

Law: a set of rules is right or refused, all errors at once; what it does can be undone by its inverse.
Knows locations and expressions over leaves; knows no models and no files but the rules' own.
"""

from bridge.checkpoint.rules.apply import RuleResult, Rules, apply_rules, read_rules
from bridge.checkpoint.rules.rule import Rule, RulesError

__all__ = ["Rule", "RuleResult", "Rules", "RulesError", "apply_rules", "read_rules"]
