"""What a place in a tree, and the form of an array, are called in every room."""

#: Keys from the root of a tree, none joined: a key may hold any character.
Path = tuple[str, ...]
#: Where a variable is: its collection, then the keys in it.
Location = tuple[str, ...]
#: Sizes of the axes of an array.
Shape = tuple[int, ...]
