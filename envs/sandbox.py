"""Runs a model's Python code in a confined process. Linux only.

`run` starts this file as a script. Before it runs the code from its standard input, the script gives up:

- network and other processes: new user, network, IPC and process namespaces, so that the code sees no process to
  signal, and the kernel kills all processes of the namespace when the first one ends;
- files: Landlock allows the code to read the libraries of Python and the system, and to write to 16 MiB in memory;
- new processes, sockets and programs: seccomp allows the code to start threads only;
- time and memory: resource limits, and the caller kills the process after the time limit.

If one of these mechanisms is unavailable, the code does not run. See landlock(7), seccomp(2), user_namespaces(7).
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
import sysconfig
import tempfile
import traceback

_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 1, 22, 38  # prctl options
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000  # user, network, process, IPC, mounts
_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446  # Landlock's system calls, the same on all architectures
_READ, _ALL = 0b1100, (1 << 16) - 1  # Landlock: read files and directories; everything up to its version 5
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
# By machine: seccomp's architecture number, the denied system calls, and the number of clone. Denied are calls that
# open sockets (also io_uring, which could); start processes and programs; change what Landlock does not cover (modes,
# owners, times and attributes of files); hold memory that no limit counts (System V); let the process outlive its
# caller (prctl); or reach deep into the kernel (ptrace, keys, bpf, perf, userfaultfd, namespaces).
_CALLS = {
    "x86_64": (
        0xC000003E,
        (29, 64, 68, 157, 41, 53, 425, 57, 58, 59, 322, 90, 91, 92, 93, 94, 260, 268, 452, 132, 235, 261, 280, 188,
         189, 190, 197, 198, 199, 463, 466, 469, 101, 248, 249, 250, 298, 321, 323, 272, 308, 109, 112, 161, 165),
        56,
    ),
    "aarch64": (
        0xC00000B7,
        (186, 190, 194, 167, 198, 199, 425, 221, 281, 52, 53, 54, 55, 452, 88, 5, 6, 7, 14, 15, 16, 463, 466, 469, 117,
         217, 218, 219, 241,
         280, 282, 97, 268, 154, 157, 51, 40),
        220,
    ),
}  # fmt: skip
_CLONE3, _CLONE_THREAD = 435, 0x10000
_KILLED = 128  # exit status if a signal ended the code
_FILE_BYTES = 2**20  # size limit of each file that it writes, including its output


def run(code: str, seconds: float = 5.0, memory_mib: int = 512, characters: int = 2000) -> str:
    """Run Python code in a confined process, and return its output, including errors, cut to `characters` characters.

    Blocks until the code has ended, for at most `seconds` seconds. Code that takes longer is killed; then the output
    ends with "time is over". Code that a signal ends adds "it was ended". `memory_mib` limits the address space of the
    process in MiB. Raises RloraError if the machine can't confine the code.
    """
    from rlora.records import RloraError  # not at the top of the file: the script runs without rlora

    if sys.platform != "linux":
        raise RloraError(
            f"the Python tool needs Linux, and this is {sys.platform}; run it on Linux, or use an env without this tool"
        )
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as output:
        status_pipe, script_pipe = os.pipe()
        command = [sys.executable, "-I", __file__, str(script_pipe), str(seconds), str(memory_mib)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=home, env={},
            pass_fds=(script_pipe,), start_new_session=True,
        )  # fmt: skip
        os.close(script_pipe)
        late = False
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with os.fdopen(status_pipe, "rb") as pipe:
            is_confined = pipe.read() == b"confined"
        output.seek(0)
        text = output.read(4 * characters + 4).decode("utf-8", "replace")
    if not is_confined and not late:
        raise RloraError(
            f"the Python tool: this machine can't confine code ({text.strip()}); allow user namespaces, Landlock and "
            "seccomp on this machine, or use an env without this tool"
        )
    text = text if len(text) <= characters else text[:characters] + "..."
    return f"{text}\ntime is over" if late else f"{text}\nit was ended" if process.returncode == _KILLED else text


def _main() -> None:
    """Confine this process, and run the code from standard input in a child that is alone in its namespaces."""
    status_pipe, seconds, memory_mib = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    code = sys.stdin.buffer.read().decode()
    user, group = os.getuid(), os.getgid()
    _must(libc.unshare(_NAMESPACES), "namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)  # map the same user and group: mounting needs a mapping
    home = os.getcwd()
    _must(libc.mount(b"none", home.encode(), b"tmpfs", 0, b"size=16m,nr_inodes=1k"), "file system in memory")
    os.chdir(home)
    child = os.fork()
    if child:
        os.close(status_pipe)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else _KILLED)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    _must(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _limit(seconds, memory_mib)
    _confine_files(libc)
    _confine_calls(libc)
    os.write(status_pipe, b"confined")
    os.close(status_pipe)
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        sys.stdout.flush()  # its output comes before the error
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's frame
        traceback.print_exception(error.with_traceback(trace), chain=False)


def _limit(seconds: float, memory_mib: int) -> None:
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 1,
        resource.RLIMIT_AS: memory_mib * 2**20,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 64,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def _confine_files(libc: ctypes.CDLL) -> None:
    """Allow reading the libraries and writing to the working directory, and nothing else."""
    version = libc.syscall(_RULESET, None, ctypes.c_size_t(0), 1)
    _must(-1 if version < 3 else 0, "Landlock of version 3")  # earlier versions can't deny truncating files
    handled = _ALL if version >= 5 else _ALL >> 1
    scoped = 0b11 if version >= 6 else 0  # deny signals and abstract sockets
    attributes = struct.pack("=QQQ", handled, 0, scoped)[: 24 if version >= 6 else 8]
    ruleset = libc.syscall(_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _must(ruleset, "a Landlock ruleset")
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    rules = [(path, _READ) for path in (*_LIBRARIES, *python) if os.path.exists(path)] + [(".", handled & ~1)]
    for path, access in rules:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = access if os.path.isdir(path) else access & 0b0110  # files: no directory rights
        rule = struct.pack("=Qi", allowed, descriptor)
        _must(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"a Landlock rule for {path}")
        os.close(descriptor)
    _must(libc.syscall(_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def _confine_calls(libc: ctypes.CDLL) -> None:
    """Deny the system calls in `_CALLS` and clone without threads (seccomp, in classic BPF)."""
    machine = platform.machine()
    _must(0 if machine in _CALLS else -1, f"seccomp on {machine}")
    audit, denied, clone = _CALLS[machine]
    load, equal, at_least, bits, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, error, allow = 0x80000000, 0x00050000, 0x7FFF0000
    eperm, enosys = error | 1, error | 38  # after ENOSYS, libc starts threads with clone
    program = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (ret, 0, 0, kill),  # calls of a different architecture
        (load, 0, 0, 0), (at_least, 0, 1, 0x40000000), (ret, 0, 0, kill),  # x32 calls
        (equal, 0, 1, _CLONE3), (ret, 0, 0, enosys),
        *(step for call in denied for step in ((equal, 0, 1, call), (ret, 0, 0, eperm))),
        (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD), (ret, 0, 0, eperm),
        (ret, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    _must(libc.prctl(_SECCOMP, 2, pointer, 0, 0), "seccomp")


def _must(result: int, feature: str) -> None:
    """Exit with status 1 if a system call failed, after writing the missing feature to stderr."""
    if result < 0:
        os.write(2, f"no {feature}: {os.strerror(ctypes.get_errno())}".encode())
        os._exit(1)


if __name__ == "__main__":
    _main()
