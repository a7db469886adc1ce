"""`OwnerProcess`: an owner in a child process on this host, for the demo, the benchmark and tests."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Self

from cotra_rdma.errors import PeerError

_CPUCLOCK_SCHED = 2  # clock_getcpuclockid(3) makes a process's clock id of its pid and this


class OwnerProcess:
    """A child process that runs `cotra serve`. It ends at `close`, or when this process dies."""

    def __init__(
        self,
        paths: Sequence[str | os.PathLike[str]],
        *,
        listen: str = "127.0.0.1:0",
        transports: Sequence[str] = ("verbs", "shm", "rpc"),
        device: str | None = None,
        gid_index: int | None = None,
        shards: Sequence[int] = (),
        announce: bool = False,
        walk: bool = False,
        peers: Sequence[str] = (),
        halo: float | None = None,
    ) -> None:
        """Starts the process. `wait_ready` waits until it serves, and `wait_walks` until it walks all shards.

        The arguments are the options of `cotra serve`.
        `owners.json` is written only if `announce` is set.
        """
        command = [
            sys.executable,
            "-P",
            "-m",
            "cotra_rdma.cli",
            "serve",
            *(os.fspath(path) for path in paths),
            "--json",
        ]
        command += ["--until-stdin-closes", "--insecure", "--listen", listen, "--transport", ",".join(transports)]
        command += ["--device", device] if device is not None else []
        command += ["--gid-index", str(gid_index)] if gid_index is not None else []
        command += [f"--shard={number}" for number in shards]
        command += [] if announce else ["--no-announce"]
        command += ["--walk"] if walk else []
        command += [f"--peer={addresses}" for addresses in peers]
        command += ["--halo", str(halo)] if halo is not None else []
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr)
        self._ready: dict[str, Any] = {}
        self._read = b""  # of stdout: what follows the last line that was asked for

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def wait_ready(self, timeout_s: float = 60.0) -> dict[str, Any]:
        """Waits until it serves; what `cotra serve --json` printed. Raises `PeerError` when it ended or hangs."""
        if not self._ready:
            self._ready = self._line(time.monotonic() + timeout_s, "did not start", "was not ready in time")
        return self._ready

    def wait_walks(self, wanted: Callable[[list[str]], bool], timeout_s: float = 60.0) -> list[str]:
        """Waits until how it walks the shards (`--walk`), one path a shard, is what is `wanted`; raises as `wait_ready`."""
        self.wait_ready(timeout_s)
        deadline = time.monotonic() + timeout_s
        while True:
            walks: list[str] = self._line(deadline, "ended", "did not find the other owners in time")["walks"]
            if wanted(walks):
                return walks

    def _line(self, deadline: float, gone: str, late: str) -> dict[str, Any]:
        """The next line that it prints. Raises `PeerError` that says `gone` or `late`, once it was ended."""
        assert self._process.stdout is not None
        pipe, ended = self._process.stdout.fileno(), False
        while b"\n" not in self._read and not ended:
            if not select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
                break
            more = os.read(pipe, 1 << 16)
            self._read, ended = self._read + more, not more
        line, newline, self._read = self._read.partition(b"\n")
        if not newline:
            self._end()
            self._stderr.seek(0)
            said = self._stderr.read().decode("utf-8", "replace").strip()
            raise PeerError(f"the owner process {gone if ended else late}: {said or 'it said nothing'}")
        told: dict[str, Any] = json.loads(line)
        return told

    @property
    def addresses(self) -> list[str]:
        """The address of each of its shards, in the order of `paths`; waits until it serves."""
        return [shard["address"] for shard in self.wait_ready()["shards"]]

    def cpu_s(self) -> float:
        """Seconds of CPU that all its threads have used so far, to the nanosecond."""
        return time.clock_gettime((~self.pid << 3) | _CPUCLOCK_SCHED)

    def kill(self) -> None:
        """Ends it as a crash would, and waits until it is gone; `close` it all the same."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Ends it, by force after a few seconds."""
        self._end()
        self._stderr.close()

    def _end(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        for insist in (self._process.terminate, self._process.kill, lambda: None):
            try:
                self._process.wait(3.0)
                break
            except subprocess.TimeoutExpired:
                insist()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
