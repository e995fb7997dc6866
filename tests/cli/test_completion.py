import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from rlora.cli.main import main

ASK = """
source {script}
words=({words} "{last}")
COMP_WORDS=("${{words[@]}}") COMP_CWORD=$((${{#words[@]}} - 1)) COMPREPLY=()
_shtab_rlora
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "rlora.bash"
    command = [sys.executable, "-m", "rlora", "completion", "bash"]
    path.write_text(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    return path


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rlora tra", {"train"}),
        ("rlora train --learner.ra", {"--learner.rank"}),
        ("rlora train --resu", {"--resume"}),
        ("rlora sweep --algorithm.loss cl", {"clip"}),
        ("rlora submit --max-st", {"--max-staleness"}),
        ("rlora export --dtype ", {"bfloat16", "float32"}),
        ("rlora export --merge --dt", {"--dtype"}),
        ("rlora report --epi", {"--episodes-mib"}),
        ("rlora scale --learner.", set()),
        ("rlora completion ", {"bash", "zsh", "tcsh"}),
    ],
)
def test_bash_completes(script: Path, line: str, expected: set[str]) -> None:
    words, _, last = line.rpartition(" ")
    text = ASK.format(script=script, words=words, last=last)
    bash = shutil.which("bash")
    assert bash
    done = subprocess.run([bash, "-c", text], capture_output=True, text=True, check=True)
    assert {word for word in done.stdout.split() if word} == expected


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_a_script(
    shell: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlora", "completion", shell])
    main()
    assert "learner.rank" in capsys.readouterr().out


def test_an_unknown_shell_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["rlora", "completion", "fish"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "bash" in capsys.readouterr().err
