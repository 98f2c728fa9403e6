"""`python -m bridge` is the command `linen-nnx`."""

from bridge.cli.app import main

if __name__ == "__main__":
    main()
