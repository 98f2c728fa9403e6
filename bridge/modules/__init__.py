"""bridge.Module: modules written as in Linen, whose state is Variables of NNX.

Law: Linen's names and keys, NNX's objects.
Knows the host that NNX code runs in; knows no wrappers.
"""
