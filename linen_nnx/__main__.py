"""`python -m linen_nnx`: the command, where its script is not on the path.

Law: the same as the script.
"""

from linen_nnx import main

if __name__ == "__main__":
    main()
