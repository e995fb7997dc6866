"""Runs a model's Python code where it can do no harm: in a process of its own that can reach nothing. Linux only.

`run` starts this file as a script, which takes from itself, before it runs the code that comes on its standard input:

- the network and other processes: new user, network, IPC and process namespaces, so that there is no process to signal,
  and with the first process in them all others die;
- files: Landlock lets it read Python's own library and the system's, and write in a directory of 16 MiB in memory;
- processes, sockets and other programs: seccomp lets it start threads only;
- time and memory: resource limits, and the caller ends it when its time is over.

Where one of these can't be had it runs nothing. See landlock(7), seccomp(2), user_namespaces(7).
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

_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 1, 22, 38  # of prctl
_NAMESPACES = 0x10000000 | 0x40000000 | 0x20000000 | 0x08000000 | 0x00020000  # user, network, process, IPC, mounts
_RULESET, _ADD_RULE, _RESTRICT = 444, 445, 446  # Landlock's system calls, the same on all machines
_READ, _ALL = 0b1100, (1 << 16) - 1  # Landlock: read files and directories; everything up to its version 5
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", "/dev/null", "/dev/urandom")
# Of a machine: seccomp's number for it, and system calls that are refused: those that open sockets (and io_uring, which
# could); start processes and programs; change what Landlock does not look after, as modes, owners, times and attributes
# of files; hold memory that no limit counts (System V's); let it outlive its caller (prctl); or go into the depths of
# the kernel (ptrace, keys, bpf, perf, userfaultfd, namespaces). Last, clone.
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
_KILLED = 128  # exit status of what a signal has ended
_FILE_BYTES = 2**20  # the longest file that it may write, its output among them


def run(code: str, seconds: float = 5.0, memory_mib: int = 512, characters: int = 2000) -> str:
    """What the code prints, errors included, cut to so many `characters`.

    It may take `seconds` and `memory_mib`. Raises RloraError where the machine can't confine it.
    """
    from rlora.records import RloraError  # the script below has no rlora

    if sys.platform != "linux":
        raise RloraError(f"the Python tool: it needs Linux, and this is {sys.platform}; set allow_python = false")
    with tempfile.TemporaryDirectory() as home, tempfile.TemporaryFile() as output:
        confined, told = os.pipe()
        command = [sys.executable, "-I", __file__, str(told), str(seconds), str(memory_mib)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=output, stderr=output, cwd=home, env={}, pass_fds=(told,),
            start_new_session=True,
        )  # fmt: skip
        os.close(told)
        late = False
        try:
            process.communicate(code.encode("utf-8", "replace"), timeout=seconds)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        with os.fdopen(confined, "rb") as pipe:
            is_confined = pipe.read() == b"confined"
        output.seek(0)
        text = output.read(4 * characters + 4).decode("utf-8", "replace")
    if not is_confined and not late:
        raise RloraError(f"the Python tool: this machine can't confine it ({text.strip()}); set allow_python = false")
    text = text if len(text) <= characters else text[:characters] + "..."
    return f"{text}\ntime is over" if late else f"{text}\nit was ended" if process.returncode == _KILLED else text


def _main() -> None:
    """Confine this process, and run the code of standard input in a child that is alone in its namespaces."""
    told, seconds, memory_mib = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    code = sys.stdin.buffer.read().decode()
    user, group = os.getuid(), os.getgid()
    _must(libc.unshare(_NAMESPACES), "namespaces")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)  # the same user and group: without any, nothing can be mounted
    home = os.getcwd()
    _must(libc.mount(b"none", home.encode(), b"tmpfs", 0, b"size=16m,nr_inodes=1k"), "file system in memory")
    os.chdir(home)
    child = os.fork()
    if child:
        os.close(told)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else _KILLED)
    libc.prctl(_PDEATHSIG, signal.SIGKILL)
    _must(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _limit(seconds, memory_mib)
    _confine_files(libc)
    _confine_calls(libc)
    os.write(told, b"confined")
    os.close(told)
    try:
        exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})
    except Exception as error:
        sys.stdout.flush()  # what it printed comes before what went wrong
        trace = error.__traceback__.tb_next if error.__traceback__ else None  # without this file's own frame
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
    """Read the libraries, write in the working directory: nothing else."""
    version = libc.syscall(_RULESET, None, ctypes.c_size_t(0), 1)
    _must(-1 if version < 3 else 0, "Landlock of version 3")  # before it files may be cut to nothing
    handled = _ALL if version >= 5 else _ALL >> 1
    scoped = 0b11 if version >= 6 else 0  # no signals, no abstract sockets
    attributes = struct.pack("=QQQ", handled, 0, scoped)[: 24 if version >= 6 else 8]
    ruleset = libc.syscall(_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    _must(ruleset, "a Landlock ruleset")
    python = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    rules = [(path, _READ) for path in (*_LIBRARIES, *python) if os.path.exists(path)] + [(".", handled & ~1)]
    for path, access in rules:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = access if os.path.isdir(path) else access & 0b0110  # a file is not listed
        rule = struct.pack("=Qi", allowed, descriptor)
        _must(libc.syscall(_ADD_RULE, ruleset, 1, rule, 0), f"a Landlock rule for {path}")
        os.close(descriptor)
    _must(libc.syscall(_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def _confine_calls(libc: ctypes.CDLL) -> None:
    """Refuse the system calls that start processes and programs, or open sockets (seccomp, in classic BPF)."""
    machine = platform.machine()
    _must(0 if machine in _CALLS else -1, f"seccomp on {machine}")
    audit, refused, clone = _CALLS[machine]
    load, equal, above, bits, give = 0x20, 0x15, 0x35, 0x45, 0x06
    kill, error, allow = 0x80000000, 0x00050000, 0x7FFF0000
    no, not_there = error | 1, error | 38  # EPERM; ENOSYS, after which libc starts threads by clone
    program = [
        (load, 0, 0, 4), (equal, 1, 0, audit), (give, 0, 0, kill),  # another machine's calls
        (load, 0, 0, 0), (above, 0, 1, 0x40000000), (give, 0, 0, kill),  # x32's
        (equal, 0, 1, _CLONE3), (give, 0, 0, not_there),
        *(step for call in refused for step in ((equal, 0, 1, call), (give, 0, 0, no))),
        (equal, 0, 3, clone), (load, 0, 0, 16), (bits, 1, 0, _CLONE_THREAD), (give, 0, 0, no),
        (give, 0, 0, allow),
    ]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in program))
    pointer = struct.pack("@HP", len(program), ctypes.addressof(code))
    _must(libc.prctl(_SECCOMP, 2, pointer, 0, 0), "seccomp")


def _must(result: int, what: str) -> None:
    """End where a system call has failed."""
    if result < 0:
        os.write(2, f"no {what}: {os.strerror(ctypes.get_errno())}".encode())
        os._exit(1)


if __name__ == "__main__":
    _main()
