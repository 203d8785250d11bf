"""Command lines as jobs: a few processes at a time, each on one thread, resumable."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from emfuse_jax.artifacts.config import read_json, write_json
from experiments._divergence import EXIT_STATUS as DIVERGED
from experiments._stopping import EXIT_STATUS, StoppedError, until_asked

RECORD_FILE = "jobs.json"
_PARENT = "EMFUSE_JAX_PARENT"
_ROOT = pathlib.Path(__file__).parents[1]


class Job(NamedTuple):
    """One run of a command.

    Attributes:
        name: for the log, the stages and the jobs that need it.
        command: module and flags, as after ``python -m``.
        makes: a file that is there once the job has succeeded.
        needs: names of the jobs that must have succeeded before.
        options: more flags, which change nothing about what is made: a job that has
            succeeded without them is not run again.
    """

    name: str
    command: tuple[str, ...]
    makes: pathlib.Path
    needs: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


def run_jobs(
    jobs: Sequence[Job],
    folder: pathlib.Path,
    *,
    workers: int,
    stage: Callable[[str], contextlib.AbstractContextManager[Any]],
) -> None:
    """Runs every job once its needs are met, the first ones of the list first.

    What succeeded in an earlier call with the same command is not run again; what was
    killed is, and resumes by itself. Output goes to ``folder/logs/<name>.log`` and, with
    the job's name before each line, to the terminal.

    Args:
        jobs: in order of importance; a job may only need earlier ones.
        folder: for ``jobs.json`` and the logs.
        workers: processes at a time.
        stage: times a job by its name.

    Raises:
        ChildProcessError: if a job failed; the others are stopped.
        StoppedError: after SIGTERM, which is passed on: the jobs save and end first.
    """
    (folder / "logs").mkdir(exist_ok=True)
    record = folder / RECORD_FILE
    done = succeeded(jobs, record)
    waiting = [job for job in jobs if job.name not in done]
    running: list[_Running] = []
    try:
        with until_asked("the end of the jobs' chunks") as asked:
            while waiting or running:
                if asked():
                    raise StoppedError(f"with {len(waiting) + len(running)} jobs left")
                for job in [j for j in waiting if done.keys() >= set(j.needs)]:
                    if len(running) < workers:
                        waiting.remove(job)
                        order = f"{len(jobs) - len(waiting)}/{len(jobs)}"
                        line = f"[{job.name}] starts ({order})"
                        print(line, file=sys.stderr, flush=True)
                        running.append(_Running(job, folder / "logs", stage))
                time.sleep(0.1)
                if (
                    asked()
                ):  # schedulers signal the jobs too: that they end is no failure
                    continue
                for process in [p for p in running if p.finished()]:
                    running.remove(process)
                    process.close()
                    done[process.job.name] = list(process.job.command)
                    write_json(record, done)
    except StoppedError:
        _stop(running)
        raise
    finally:
        for process in running:
            process.kill()


def _stop(running: Sequence["_Running"]) -> None:
    """Passes SIGTERM on and waits; whoever is not done after a minute is killed."""
    for process in running:
        process.terminate()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not all(p.finished() for p in running):
        time.sleep(0.1)


def single_thread(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that leaves the other cores alone, and that does not
    take a whole accelerator's memory."""
    one = " --xla_cpu_multi_thread_eigen=false"
    return {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        **environment,
        "XLA_FLAGS": environment.get("XLA_FLAGS", "") + one,
        "OMP_NUM_THREADS": "1",
    }


def die_with_parent() -> None:
    """In a job: asks the kernel to end this process when the one that started it ends, so
    that a killed demo leaves nothing behind that holds its run directories."""
    parent = os.environ.pop(_PARENT, None)
    if parent is None or sys.platform != "linux":
        return
    import ctypes

    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the process that started this job has ended")


def succeeded(jobs: Sequence[Job], record: pathlib.Path) -> dict[str, list[str]]:
    """The jobs that have succeeded: their record, their file and all that they need."""
    known = read_json(record) if record.exists() else {}
    done: dict[str, list[str]] = {}
    for job in jobs:
        fresh = known.get(job.name) == list(job.command) and job.makes.exists()
        if fresh and done.keys() >= set(job.needs):
            done[job.name] = list(job.command)
    return done


class _Running:
    """A process, its log and its clock."""

    def __init__(self, job: Job, logs: pathlib.Path, stage: Any) -> None:
        self.job = job
        self._clock = contextlib.ExitStack()
        self._clock.enter_context(stage(job.name))
        self._log_path = logs / f"{job.name}.log"
        environment = single_thread(os.environ)
        # The checkout's modules, wherever the demo was started.
        paths = [str(_ROOT), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        self._process = subprocess.Popen(
            [sys.executable, "-m", *job.command, *job.options],
            env={**environment, _PARENT: str(os.getpid())},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self._reader = threading.Thread(target=self._copy, daemon=True)
        self._reader.start()

    def _copy(self) -> None:
        output = self._process.stdout
        assert output is not None
        with self._log_path.open("a") as log, output:
            for line in output:
                log.write(line)
                log.flush()
                print(f"[{self.job.name}] {line}", end="", file=sys.stderr, flush=True)

    def finished(self) -> bool:
        return self._process.poll() is not None

    def close(self) -> None:
        """Raises unless the job succeeded."""
        self._reader.join()
        self._clock.close()
        status = self._process.returncode
        if status == EXIT_STATUS:
            raise StoppedError(f"of {self.job.name}, which has saved")
        if status != 0:
            same = "the same command resumes"
            if status == DIVERGED:
                same = "it has diverged: --on_divergence=rollback goes on, more slowly"
            raise ChildProcessError(
                f"{self.job.name} ended with status {status}; its output is in "
                f"{self._log_path}, and {same}"
            )

    def terminate(self) -> None:
        self._process.terminate()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        self._clock.close()
