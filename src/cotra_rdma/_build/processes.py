"""Builder processes on this host, which build one graph.

Each process takes one step of one shard at a time (`steps`), and the builders' messages are files.
A process reads its orders from stdin and writes its answers to stdout, one line of JSON each.
It ends when its stdin is closed, and so it ends with its parent.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self, TextIO

import msgspec

from cotra_rdma import errors
from cotra_rdma._build.spec import BuildSpec, Progress
from cotra_rdma._build.steps import FIRST_ALONE, STEPS, GraphResult, builder_in, result_of
from cotra_rdma.datasets import VectorFile, open_vectors
from cotra_rdma.errors import CotraError, PeerError

_END_S = 3.0


@dataclass(frozen=True, slots=True)
class Usage:
    """What a builder used.

    Attributes:
        cpu_s: the CPU time of all its threads, in seconds.
        peak_bytes: the most memory that was resident at once (VmHWM, proc(5)).
    """

    cpu_s: float
    peak_bytes: int

    @classmethod
    def of_this_process(cls) -> Self:
        """Returns what this process has used so far."""
        with Path("/proc/self/status").open(encoding="ascii") as status:
            peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
        return cls(time.process_time(), peak)


class BuildProcesses:
    """Processes that build one graph. A context manager: its end kills processes that are still at work.

    Args:
        n_processes: the number of processes. At most one for each shard is started.
        spec: what is built.
        vectors: the input.
        directory: the directory that the processes share, which gets the shards' files.
        usage: called with the usage of each process when its work is done.
    """

    def __init__(
        self,
        n_processes: int,
        spec: BuildSpec,
        vectors: VectorFile,
        directory: Path,
        *,
        usage: Callable[[Usage], None] | None = None,
    ) -> None:
        n_processes = min(n_processes, spec.n_shards)
        threads = spec.params.n_threads or max(1, len(os.sched_getaffinity(0)) // n_processes)
        self._spec = replace(spec, params=replace(spec.params, n_threads=threads))
        self._vectors, self._directory, self._usage = vectors, directory, usage
        self._lock = threading.Lock()
        self._processes: list[_Process] = []
        try:
            for _ in range(n_processes):
                self._processes.append(_Process(self._spec, vectors, directory))
        except BaseException:
            self.close()
            raise

    def run(self, progress: Progress | None = None) -> GraphResult:
        """Takes all steps, and returns the result.

        Raises:
            CotraError: a builder raised this error.
            PeerError: a process ended before its work was done.
        """
        for step in STEPS:
            waiting = iter(range(1 if step in FIRST_ALONE else self._spec.n_shards))
            with ThreadPoolExecutor(len(self._processes)) as pool:
                for done in [pool.submit(self._work, process, step, waiting, progress) for process in self._processes]:
                    done.result()
        for process in self._processes:
            used = process.used()
            if self._usage:
                self._usage(used)
        return result_of(builder_in(self._spec, self._vectors, self._directory, 0, None))

    def _work(self, process: _Process, step: str, waiting: Iterator[int], progress: Progress | None) -> None:
        """Takes a step of one shard after the other in a process, until no shard is left."""

        def report(number: int, phase: str, done: int) -> None:
            if progress is not None:
                with self._lock:
                    progress(number, phase, done)

        while True:
            with self._lock:
                number = next(waiting, None)
            if number is None:
                return
            try:
                process.take(step, number, report)
            except BaseException:
                for other in self._processes:  # their work is of no use any more
                    other.kill()
                raise

    def close(self) -> None:
        """Ends the processes. It may be called twice."""
        for process in self._processes:
            process.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Process:
    """One builder process."""

    def __init__(self, spec: BuildSpec, vectors: VectorFile, directory: Path) -> None:
        source = {"path": os.path.abspath(vectors.path), "dataset": vectors.dataset, "count": vectors.count}
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (closed by close)
        # Waiting threads of BLAS spin. With one for each core in each process, they would double the CPU time.
        blas = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(spec.params.n_threads))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "cotra_rdma._build.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            text=True,
            env=blas | dict(os.environ),
        )
        self._send({"spec": asdict(spec), "source": source, "directory": os.path.abspath(directory)})

    def _send(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the wait for its answer reports it
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()

    def _answers(self, what: str, shard: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields the answers of the process.

        Raises:
            PeerError: the process ended. `what` says when, for the error message.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield json.loads(line)
        status = self._process.wait()
        self._stderr.seek(0)
        said = self._stderr.read().decode("utf-8", "replace").strip()
        raise PeerError(
            f"the builder process ended {what}, with status {status}: {said or 'it said nothing'}", shard=shard
        )

    def take(self, step: str, number: int, progress: Progress) -> None:
        """Takes a step of a shard."""
        self._send({"step": step, "shard": number})
        for answer in self._answers(f"in step {step!r} of shard {number}", number):
            if "error" in answer:
                raise _error_of(answer["error"])
            if "done" in answer:
                return
            progress(number, *answer["progress"])

    def used(self) -> Usage:
        """Returns what the process has used so far."""
        self._send({"step": None, "shard": 0})
        return Usage(**next(self._answers("when its work was done"))["used"])

    def kill(self) -> None:
        """Kills the process."""
        self._process.kill()

    def close(self) -> None:
        """Ends the process, and kills it if it does not end soon."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._stderr.close()


def _error_of(failure: dict[str, Any]) -> Exception:
    """Makes the error that a process reported."""
    kind = getattr(errors, failure["type"], None)
    if isinstance(kind, type) and issubclass(kind, CotraError):
        return kind(failure["message"], shard=failure["shard"])
    if failure["type"] == "MemoryError":
        return MemoryError(failure["message"])
    if failure["errno"]:
        return OSError(failure["errno"], failure["message"])
    return PeerError(f"a builder process failed: {failure['type']}: {failure['message']}")


def _answer(out: TextIO, answer: dict[str, Any]) -> None:
    out.write(json.dumps(answer) + "\n")
    out.flush()


def main() -> None:
    """Runs a builder process."""
    begin = json.loads(sys.stdin.readline())
    spec, source, directory = msgspec.convert(begin["spec"], BuildSpec), begin["source"], Path(begin["directory"])
    with open_vectors(source["path"], source["dataset"]) as whole:
        vectors = whole if whole.count == source["count"] else whole.first(source["count"])

        def progress(_number: int, phase: str, done: int) -> None:
            _answer(sys.stdout, {"progress": [phase, done]})

        for line in sys.stdin:
            order = json.loads(line)
            if order["step"] is None:
                _answer(sys.stdout, {"used": asdict(Usage.of_this_process())})
                continue
            try:
                builder_in(spec, vectors, directory, order["shard"], progress).run(order["step"])
            except (CotraError, OSError, MemoryError) as error:
                failure = {"type": type(error).__name__, "message": str(error), "shard": getattr(error, "shard", None)}
                _answer(sys.stdout, {"error": failure | {"errno": getattr(error, "errno", 0) or 0}})
            else:
                _answer(sys.stdout, {"done": True})


if __name__ == "__main__":
    main()
