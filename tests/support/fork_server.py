"""Python processes that start in milliseconds: forks of one process that has imported PyTorch already.

Importing PyTorch takes seconds, and hundreds of tests need a Python process of their own. The first call of
`run` starts this file as a server, which imports what almost every test needs from outside this repository
(and nothing of `llm_trainer`, so a fork runs whatever copy of the package its own `sys.path` finds). Each
command is then a fork of the server: it has its own folder, environment, arguments, streams and exit status,
as a fresh interpreter would have.

Use a fresh interpreter (`subprocess`) where a test is about start-up, imported modules or memory.
"""

from __future__ import annotations

import array
import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

PRELOADED = (
    "numpy", "psutil", "pydantic", "rich.console", "safetensors.torch", "tokenizers", "torch",
    "torch.distributed.checkpoint", "torch.distributed.device_mesh", "torch.distributed.fsdp",
    "torch.distributed.pipelining", "torch.distributed.run", "torch.distributed.tensor.parallel", "yaml",
)  # fmt: skip
_LOCK = threading.Lock()
_address: str | None = None


@dataclass
class ForkedProcess:
    """A process that `start` has forked: the part of `subprocess.Popen` that tests need."""

    pid: int
    arguments: list[str]
    stdin: IO[str] | None
    stdout: IO[str] | None
    _server: socket.socket
    returncode: int | None = None

    def wait(self, timeout: float = 300) -> int:
        """Waits for the end and returns the exit status, -N after signal N."""
        if self.returncode is None:
            self._server.settimeout(timeout)
            try:
                self.returncode = int.from_bytes(_read(self._server, 4), "big", signed=True)
            except TimeoutError:
                raise subprocess.TimeoutExpired(self.arguments, timeout) from None
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        """Returns the exit status, or None while the process runs."""
        if self.returncode is None and select.select([self._server], [], [], 0)[0]:
            self.wait()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to the process, if it has not ended."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kills the process, not those that it has started."""
        self.send_signal(signal.SIGKILL)

    def kill_all(self) -> None:
        """Kills the process and those that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def communicate(self, text: str = "") -> str:
        """Writes to the process's input, and reads what is left of its output until it has ended."""
        if self.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self.stdin.write(text)
                self.stdin.close()
        said = self.stdout.read() if self.stdout is not None else ""
        self.wait()
        if self.stdout is not None:
            self.stdout.close()
        return said


def start(
    arguments: Sequence[str | int | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    stdin: int | None = None,
    stdout: int | None = None,
    stderr: int | None = None,
    imports: Sequence[str] = (),
) -> ForkedProcess:
    """Starts Python with these command-line arguments, as `subprocess.Popen([sys.executable, …])` would.

    Args:
        arguments: `script.py …`, `-m module …` or `-c code …`.
        cwd: The folder to run in; by default the current one.
        env: The environment; by default this process's.
        stdin: A file descriptor or `subprocess.PIPE`; by default there is no input.
        stdout: A file descriptor or `subprocess.PIPE`; by default this process's.
        stderr: A file descriptor; by default this process's.
        imports: Modules to import first. The ranks of a torchrun inherit them.
    """
    command = [str(one) for one in arguments]
    request = {
        "arguments": command,
        "cwd": str(cwd or Path.cwd()),
        "env": dict(os.environ if env is None else env),
        "imports": list(imports),
    }
    to_close = []
    writer = reader = None
    if stdin == subprocess.PIPE:
        stdin, end = os.pipe()
        writer = os.fdopen(end, "w", encoding="utf-8")
        to_close.append(stdin)
    elif stdin is None:
        stdin = os.open(os.devnull, os.O_RDONLY)
        to_close.append(stdin)
    if stdout == subprocess.PIPE:
        end, stdout = os.pipe()
        reader = os.fdopen(end, encoding="utf-8", errors="replace")
        to_close.append(stdout)
    streams = [stdin, 1 if stdout is None else stdout, 2 if stderr is None else stderr]
    server = socket.socket(socket.AF_UNIX)
    server.connect(_server())
    body = json.dumps(request).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", streams))]
    server.sendmsg([len(body).to_bytes(4, "big")], rights)
    server.sendall(body)
    for descriptor in to_close:
        os.close(descriptor)
    pid = int.from_bytes(_read(server, 4), "big")
    return ForkedProcess(pid, command, writer, reader, server)


def run(
    arguments: Sequence[str | int | Path],
    *,
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 300,
    imports: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Runs Python to its end and captures its output, as `subprocess.run` would.

    Args:
        arguments: As for `start`.
        cwd: As for `start`.
        env: As for `start`.
        timeout: Seconds after which the process, and those that it has started, are killed.
        imports: As for `start`.

    Raises:
        subprocess.TimeoutExpired: The process took longer than `timeout`.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = start(
            arguments, cwd=cwd, env=env, stdout=out.fileno(), stderr=err.fileno(), imports=imports
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill_all()
            raise subprocess.TimeoutExpired(process.arguments, timeout, _text(out), _text(err)) from None
        return subprocess.CompletedProcess(process.arguments, status, _text(out), _text(err))


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _server() -> str:
    """The address of this process's server, which is started at the first call."""
    global _address
    with _LOCK:
        if _address is None:
            folder = tempfile.mkdtemp(prefix="fork-server-")
            address = f"{folder}/socket"
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            environment.pop("PYTHONPATH", None)
            server = subprocess.Popen(
                [sys.executable, "-P", __file__, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env=environment, cwd="/",
            )  # fmt: skip
            assert server.stdout is not None
            assert server.stdout.readline() == b"ready\n"

            def stop() -> None:
                server.kill()
                server.wait()
                Path(address).unlink(missing_ok=True)
                Path(folder).rmdir()

            atexit.register(stop)
            _address = address
        return _address


def _read(connection: socket.socket, count: int) -> bytes:
    read = b""
    while len(read) < count:
        piece = connection.recv(count - len(read))
        if not piece:
            raise ConnectionError("the server of forked processes has died")
        read += piece
    return read


def _serve(address: str) -> None:
    """Imports what is preloaded, then forks for every connection until the process that started it ends."""
    for name in PRELOADED:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a fork need not look through all these modules for garbage, nor copy their pages
    assert threading.active_count() == 1, "a fork takes no other thread along"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # connections' processes are reaped by the system
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(16)
    print("ready", flush=True)
    while True:
        readable, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in readable:  # closed: the process that started this one has ended
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _attend(connection)
        connection.close()


def _attend(connection: socket.socket) -> None:
    """Forks the command, tells its process number, waits for it and tells its exit status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, ancillary, _, _ = connection.recvmsg(4, socket.CMSG_SPACE(12))
    streams = array.array("i")
    streams.frombytes(ancillary[0][2])
    request = json.loads(_read(connection, int.from_bytes(head, "big")))
    child = os.fork()
    if child == 0:
        connection.close()
        os.setpgid(0, 0)
        _become(request, streams)
    connection.sendall(child.to_bytes(4, "big"))
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(4, "big", signed=True))
    os._exit(0)


def _become(request: dict[str, object], streams: Sequence[int]) -> None:
    """Turns this fork into the process that was asked for, and ends it as the interpreter would."""
    arguments, imports = request["arguments"], request["imports"]
    assert isinstance(arguments, list)
    assert isinstance(imports, list)
    os.environ.clear()
    os.environ.update(request["env"])  # type: ignore[call-overload]
    os.chdir(str(request["cwd"]))
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, max(streams) + 1)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", buffering=8192, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    paths = [one for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    first = str(Path(arguments[0]).resolve().parent) if not arguments[0].startswith("-") else str(Path.cwd())
    sys.path[:0] = [first, *paths]
    try:
        status = _status_of(arguments, imports)
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


def _status_of(arguments: list[str], imports: list[str]) -> int:
    """Runs the script, module or code; its exit status."""
    try:
        for name in imports:
            importlib.import_module(name)
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
