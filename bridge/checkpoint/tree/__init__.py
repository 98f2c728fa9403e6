"""A checkpoint without bytes: trees of leaves, what each leaf is, how one is made from others.

Law: nothing here opens a file.
Knows key paths, shapes and dtypes, and the objects in memory that have them; knows no formats and no plans.
"""
