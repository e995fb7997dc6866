import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rlora.envs.python_tool import PythonTool
from rlora.envs.sandbox import run
from rlora.records import Prompt, RloraError

if sys.platform != "linux":
    pytest.skip("Linux only", allow_module_level=True)
try:
    run("", seconds=60)
except RloraError as error:
    pytest.skip(str(error), allow_module_level=True)


def test_code_runs_with_the_standard_library_and_its_own_files() -> None:
    assert run("import decimal, random, itertools\nprint(347 * 28)") == "9716\n"
    assert run("open('a', 'w').write('hi')\nprint(open('a').read())") == "hi\n"
    assert run("import threading\nt = threading.Thread(target=print, args=('hi',))\nt.start()\nt.join()") == "hi\n"
    assert run("1 / 0").endswith('  File "<code>", line 1, in <module>\nZeroDivisionError: division by zero\n')
    assert run("import sys\nprint('a')\nsys.exit(3)") == "a\n"
    assert run("print(\udcff)").endswith("SyntaxError: invalid syntax\n")


@pytest.mark.parametrize(
    "code",
    [
        "import socket\nsocket.socket()",
        "import socket\nsocket.socketpair()",
        "import socket\nsocket.socket(socket.AF_UNIX)",
        "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
        "open('/etc/passwd')",
        "open('/proc/1/environ')",
        "import os\nos.listdir('/')",
        "import os\nos.listdir(os.path.expanduser('~'))",
        "open('/tmp/mark', 'w')",
        "import os\nos.mkdir('/tmp/mark')",
        "import os\nos.symlink('/etc/passwd', 'a')\nopen('a')",
        "import os\nos.link('/etc/passwd', 'a')",
        "import os\nos.fork()",
        "import subprocess\nsubprocess.run(['true'])",
        "import os\nos.execv('/bin/sh', ['sh'])",
        "import os\nos.kill(-1, 9)",
        "import os\nos.kill(OUTSIDE, 9)",
        "import os\nos.setsid()",
        "import os\nos.chroot('.')",
        "open('a', 'w').write('a' * 2 ** 21)",
        "for i in range(99): open(str(i), 'w').write('a' * 2 ** 20)",
        "x = [0] * 10 ** 9",
        "files = [open(str(i), 'w') for i in range(99)]",
    ],
)
def test_what_is_refused(code: str) -> None:
    output = run(code.replace("OUTSIDE", str(os.getpid())) + "\nprint('done')")
    assert "Error" in output
    assert "done" not in output


@pytest.mark.parametrize(
    "change",
    ["chmod(path, 0)", "chown(path, -1, -1)", "utime(path)", "setxattr(path, 'user.a', b'')", "truncate(path, 0)",
     "unlink(path)", "rename(path, path + 'a')"],
)  # fmt: skip
def test_a_file_elsewhere_can_not_be_changed(change: str, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("kept")
    old = path.stat()
    original = (old.st_mode, old.st_uid, old.st_size, old.st_mtime_ns, old.st_ctime_ns)
    output = run(f"import os\npath = {str(path)!r}\nos.{change}\nprint('done')")
    assert "PermissionError" in output
    assert "done" not in output
    new = path.stat()
    assert (new.st_mode, new.st_uid, new.st_size, new.st_mtime_ns, new.st_ctime_ns) == original


def command_lines() -> list[str]:
    """The command lines of this process's descendants."""
    lines = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            lines.append(" ".join(child.cmdline()))
    return lines


def test_it_ends_after_its_time_limit_and_leaves_no_process() -> None:
    for code in ("while True: pass", "import time\ntime.sleep(60)"):
        start = time.monotonic()
        assert run(code, seconds=1.0) == "\ntime is over"
        assert time.monotonic() - start < 3
    deadline = time.monotonic() + 5
    while any("sandbox.py" in line for line in command_lines()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_output_is_cut() -> None:
    assert run("print('a' * 10 ** 7)", characters=10) == "a" * 10 + "..."


def test_a_crash_is_not_the_callers() -> None:
    assert run("import ctypes\nctypes.string_at(0)") == "\nit was ended"


def test_it_inherits_nothing_from_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "kept")
    read, write = os.pipe()
    os.set_inheritable(write, True)
    code = f"import os\nprint(os.environ.get('SECRET'), os.getppid())\nos.write({write}, b'x')"
    try:
        output = run(code)
    finally:
        os.close(read)
        os.close(write)
    assert output.startswith("None 0\n")
    assert "OSError: [Errno 9]" in output


def test_the_policy_gets_what_its_code_prints() -> None:
    env = PythonTool("rlora.envs.arithmetic:Arithmetic", allow_python=True, max_calls=2, low=1, high=4)
    state: dict[str, object] = {}
    prompt = Prompt("?")
    assert env.reply(prompt, "So <python>\nprint(3 * 4)\n</python>", state) == "\n<result>\n12\n</result>\n"
    assert "ZeroDivisionError" in str(env.reply(prompt, "<python>1/0</python>", state))
    assert env.reply(prompt, "<python>1</python>", state) is None
    assert state == {"calls": 3}
    assert env.reply(prompt, "The answer is 12.", {}) is None
    assert env.reply(prompt, "</python>", {}) is None


def test_problems_are_the_wrapped_envs_with_an_instruction() -> None:
    env = PythonTool("rlora.envs.arithmetic:Arithmetic", allow_python=True, low=1, high=2, held_out_share=0.0)
    assert next((prompt.text, prompt.answer) for prompt in env.train()) == (
        "What is 1 + 1?\nYou can run Python: write <python> code that prints </python>, and you get its output. "
        "Then answer.",
        2,
    )
    assert list(env.held_out()) == []
    calculator = PythonTool("rlora.envs.calculator:Calculator", allow_python=True, instruction="Go.", size=1)
    (prompt,) = calculator.train()
    assert prompt.text[-1]["content"] == f"{prompt.columns['question']}\nGo."  # type: ignore[index]


def test_it_is_off_by_default() -> None:
    with pytest.raises(RloraError, match=r"env_args\.allow_python = false"):
        PythonTool("rlora.envs.arithmetic:Arithmetic")
    with pytest.raises(RloraError, match="max_calls = 0"):
        PythonTool("rlora.envs.arithmetic:Arithmetic", allow_python=True, max_calls=0)
    with pytest.raises(RloraError, match="memory_mib = 1"):
        PythonTool("rlora.envs.arithmetic:Arithmetic", allow_python=True, memory_mib=1)


def test_nothing_runs_on_other_systems_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RloraError, match="the Python tool needs Linux, and this is darwin"):
        run("print(1)")
