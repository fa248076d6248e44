import subprocess
import sys

import pytest

from detmix.cli.__main__ import COMMANDS, main


def test_help_lists_each_command(capsys):
    assert main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, (_, text) in COMMANDS.items():
        assert f"  {name:10}{text}" in lines


def test_no_command_is_a_mistake_that_shows_the_help(capsys):
    assert main([]) == 2
    assert "commands:" in capsys.readouterr().out


def test_an_unknown_command_is_one_line(capsys):
    assert main(["nope"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == "error: command must be one of fit, validate, preview, check, predict, export, ablate, but it is 'nope'\n"
    )


@pytest.mark.parametrize("name", ["preview", "check", "predict", "export", "ablate"])
def test_a_command_has_its_own_help(name, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main([name, "--help"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: detmix {name} ")


def test_arguments_reach_the_command(capsys, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main(["check", str(tmp_path / "nowhere")])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == f"error: root {tmp_path / 'nowhere'} is not a folder.\n"


@pytest.mark.parametrize("arguments", [["--help"], ["check", "--help"], ["predict", "--help"], ["export", "--help"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys\nfrom detmix.cli.__main__ import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
