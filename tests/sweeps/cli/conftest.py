"""The command line in this process, with its state below a folder of the test's own."""

import pytest

from sweeps import cli


@pytest.fixture
def home(tmp_path, monkeypatch):
    path = tmp_path / "home"
    monkeypatch.setenv("DP_SWEEPS_HOME", str(path))
    return path


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a command line; gives exit code, standard output and standard error."""

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["dp-sweeps", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run
