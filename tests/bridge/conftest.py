"""What the tests of the command share."""

import pytest

from bridge import cli


@pytest.fixture
def run(capfd):
    """Run `linen-nnx` with these words: exit code, stdout, stderr. It never shows a traceback."""

    def call(*words):
        with pytest.raises(SystemExit) as caught:
            cli.main([str(word) for word in words])
        out, err = capfd.readouterr()
        assert "Traceback" not in out + err
        return caught.value.code, out, err

    return call
