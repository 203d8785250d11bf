"""Run directories that resume, and the frame of every command line.

A run directory holds ``config.json``, ``provenance.json``, ``metrics.jsonl``,
``tensorboard/``, ``checkpoints/`` and ``stages.json``. Opening it again with the same
config continues it; with another one, or in a folder that is not a run, it is an error
and nothing is touched.
"""

import contextlib
import errno
import inspect
import os
import pathlib
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from emfuse_jax import artifacts
from experiments import _compiling, _devices, _divergence, _dry_run, _flags, _lock
from experiments._jobs import die_with_parent
from experiments._progress import Progress, Stages
from experiments._stopping import EXIT_STATUS, StoppedError, until_asked
from experiments._tables import to_plain

_KEEP = 3  # of the newest checkpoints


class Run:
    """An open run directory; made by `open_run`, closed by ``with``.

    Attributes:
        path: the directory.
        resumed: whether it was there before.
        done: the newest step of the directory in whose place a dry run has this one.
        checkpoints: the folder of this run's checkpoints.
        metrics: the writer behind `log`.
    """

    def __init__(
        self, path: pathlib.Path, *, resumed: bool, lock: _lock.Lock, done: int = 0
    ) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.resumed = resumed
        self.done = done
        self.metrics = artifacts.MetricWriter(
            path / "metrics.jsonl", tensorboard=path / "tensorboard"
        )
        self._stages = Stages(path / "stages.json")
        self._lock = lock
        self.stage = self._stages.stage
        self.seconds = self._stages.seconds

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one row of metrics."""
        self.metrics.write(step, metrics)

    def save(
        self, step: int, tree: Any, *, score: Any = None, keep: int = _KEEP
    ) -> None:
        """Writes a checkpoint; the newest ``keep`` and the best one stay.

        `log` the step's metrics first: what is logged after the last checkpoint is cut
        when the run resumes, and a row missing before it would stay missing.
        """
        artifacts.save(self.checkpoints, step, tree, score=score, keep=keep)
        self._stages.flush()

    def restore(self, like: Any) -> artifacts.Restored | None:
        """Goes back to the newest undamaged checkpoint, or to the very start.

        Damaged newer steps are deleted and later rows of metrics are cut, since the run
        is about to write them again.
        """
        found = artifacts.restore_latest(self.checkpoints, like, discard_damaged=True)
        self.metrics.truncate_after(-1 if found is None else found.step)
        for step, reason in () if found is None else found.damaged.items():
            print(f"checkpoint {step} was damaged ({reason})", file=sys.stderr)
        return found

    def fit(
        self,
        key: Any,
        learner: Any,
        state: Any,
        sample_batch: Callable[[Any, Any], Any],
        num_steps: int,
        *,
        data: Any = None,
        chunk: int = 1000,
        save_every: int = 1,
        evaluate: Callable[[int, Any], Mapping[str, Any]] | None = None,
        description: str = "",
        unit: str = "update",
        total: int | None = None,
        batch_axes: Any = 0,
    ) -> Any:
        """`loops.fit` that logs, saves, shows progress, and resumes where it was killed.

        Asked to stop by SIGTERM, it saves at the end of the chunk. That checkpoint is one
        more than an uninterrupted run writes, and goes when the next one is there.

        Args:
            key: the run's key.
            learner: anything with ``update(key, state, batch)``.
            state: the state at step 0; donated.
            sample_batch: ``(key, data) -> batch``.
            num_steps: updates in all.
            data: what ``sample_batch`` draws from.
            chunk: updates per compiled call and per row of metrics.
            save_every: chunks per checkpoint; the last one is always saved.
            evaluate: ``(step, state) -> metrics``, called before each checkpoint; its
                ``score``, higher is better, marks the best one.
            description: for the progress bar.
            unit: what an update of the learner is called.
            total: updates of all the fits that are to come, for a dry run, which ends
                with the first; None: this is the only one.
            batch_axes: the axis that counts rows in each leaf of a batch, for ``--devices``.

        Returns:
            The state after ``num_steps`` updates.

        Raises:
            _dry_run.Done: when the command runs dry.
            StoppedError: after SIGTERM; it has saved.
            DivergedError: if a metric or a parameter has diverged (see `_divergence`);
                nothing of that chunk is saved.
        """
        from emfuse_jax import loops

        if _dry_run.is_asked():
            options = {"data": data, "done": self.done, "unit": unit}
            steps = total or num_steps
            _dry_run.tell(
                description, key, learner, state, sample_batch, steps, **options
            )
            raise _dry_run.Done
        learner, state, data = _devices.place(learner, state, data, batch_axes)
        found = self.restore(state)
        start = 0 if found is None else found.step
        state = state if found is None else found.tree
        if start == num_steps:
            return _devices.own(state)
        shown = {"description": description, "unit": unit}
        bar = Progress(num_steps, initial=start, **shown)
        with bar, until_asked() as asked, _compiling.of(description):
            recorder = self._recorder(
                range(start, num_steps, chunk), save_every, evaluate, bar, asked
            )
            options = {"data": data, "chunk": chunk, "start": start}
            state, _ = loops.fit(
                key,
                learner,
                state,
                sample_batch,
                num_steps,
                on_chunk=recorder,
                **options,
            )
        return _devices.own(state)

    def _recorder(
        self,
        chunks: range,
        save_every: int,
        evaluate: Callable[[int, Any], Mapping[str, Any]] | None,
        bar: Progress,
        asked: Callable[[], bool],
    ) -> Callable[[int, Any, Mapping[str, Any]], None]:
        """What `fit` does at the end of a chunk; ``chunks`` are the steps of their starts
        up to the last step of all."""
        start, num_steps, chunk = chunks.start, chunks.stop, chunks.step

        def is_planned(step: int) -> bool:
            return step in (0, num_steps) or (step // chunk) % save_every == 0

        unplanned = set() if is_planned(start) else {start}

        def on_chunk(step: int, state: Any, metrics: Mapping[str, Any]) -> None:
            row, mine = dict(metrics), _devices.own(state)
            self.check(step, row, getattr(mine, "params", None))
            planned, stops = is_planned(step), _devices.anywhere(asked())
            if planned and evaluate is not None:
                row |= evaluate(step, mine)
            self.log(step, row)
            if planned or stops:
                keep = _KEEP + len(unplanned) + (not planned)
                self.save(step, state, score=row.get("score"), keep=keep)
                while unplanned:
                    artifacts.delete(self.checkpoints, unplanned.pop())
            bar.update(step, row)
            # After the last chunk there is no next one to hear what came meanwhile.
            if stops or (step == num_steps and _devices.anywhere(asked())):
                raise StoppedError(f"at step {step} of {num_steps}, which is saved")

        return on_chunk

    def check(self, step: int, metrics: Mapping[str, Any], params: Any = None) -> None:
        """To be called at a chunk's end, before it is saved.

        Raises:
            DivergedError: if a metric or a parameter has diverged; the row is logged.
        """
        finding = _divergence.find(metrics, params)
        if finding is None:
            return
        self.log(step, metrics)
        last = max(artifacts.steps(self.checkpoints), default=None)
        checkpoint = None if last is None else self.checkpoints / str(last)
        raise _divergence.DivergedError(step, finding, checkpoint)

    def write_json(self, name: str, value: Any) -> pathlib.Path:
        """Writes a result into the directory, whole or not at all."""
        path = self._inside(name)
        artifacts.write_json(path, value)
        return path

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A JSON result that is made once: by ``make()``, now or in an earlier start."""
        path = self._inside(name)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            artifacts.write_json(path, to_plain(make()))
        return artifacts.read_json(path)

    def _inside(self, name: str) -> pathlib.Path:
        """A place in the directory; names come from configs."""
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise ValueError(f"{name!r} is not inside of {self.path}; choose another")
        return path

    def close(self) -> None:
        """Closes the files and lets another process open the directory."""
        try:
            self.metrics.close()
            self._stages.flush()
        finally:
            self._lock.release()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # What could not be written is the news, not that closing says so again.
        again = contextlib.suppress(OSError) if kind else contextlib.nullcontext()
        with again:
            self.close()


def open_run(
    path: str | os.PathLike[str],
    config: Any,
    *,
    kind: str,
    seed: int | None = None,
    ignore: Sequence[str] = ("run_dir",),
) -> Run:
    """Creates a run directory, or continues the one that is there.

    Args:
        path: the directory.
        config: a config dataclass; kept in ``config.json``.
        kind: the command's name, such as ``train_dynamics``.
        seed: for the provenance.
        ignore: dotted names that may differ when a run is continued.

    Raises:
        ValueError: if the directory is not empty and no run of ours, or was made by
            another command or with another config (the keys that differ are named), or
            another process has it open, which is named. Nothing is changed then.
        OSError: if it cannot be written.
    """
    config = _divergence.as_asked(artifacts.to_json(config))
    return _devices.open_together(
        lambda place: _open(place, config, kind=kind, seed=seed, ignore=ignore),
        pathlib.Path(path).absolute(),
    )


def _open(
    path: pathlib.Path,
    config: Any,
    *,
    kind: str,
    seed: int | None,
    ignore: Sequence[str],
) -> Run:
    resumed, done = _check(path, kind, config, ignore), 0
    if _dry_run.is_asked():
        done = max(artifacts.steps(path / "checkpoints"), default=0)
        path, resumed = _dry_run.place(), False
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock.take(path)
    except OSError as error:
        raise type(error)(
            error.errno,
            f"run directory {path} cannot be written ({error.strerror}); "
            "choose another with --run_dir",
        ) from error
    try:
        _divergence.check_scale(path)
        if lock.taken_over is not None:
            print(f"{path}: {lock.taken_over} has ended; going on", file=sys.stderr)
        if not resumed:
            artifacts.write_json(path / "config.json", {"kind": kind, "config": config})
        _write_provenance(path / "provenance.json", seed)
        return Run(path, resumed=resumed, lock=lock, done=done)
    except BaseException:
        lock.release()
        raise


def run_main(
    main_fn: Callable[[Any], Any],
    config_cls: type,
    argv: Sequence[str] | None = None,
    *,
    presets: _flags.Presets | None = None,
    default_preset: str | None = None,
    trains: bool = False,
    shares: bool = False,
) -> int:
    """The frame of a command line: parses the flags, calls ``main_fn(config)``.

    Args:
        main_fn: does the work; the docstring of its module is the help text.
        config_cls: the dataclass that the flags are made from.
        argv: the program's name and flags; None is ``sys.argv``.
        presets: see `_flags.parse`.
        default_preset: see `_flags.parse`.
        trains: whether ``--on_divergence`` and ``--dry_run`` make sense.
        shares: whether it can train on many ``--devices``.

    Returns:
        The exit status: 0, or 2 for bad input, which prints one paragraph and no
        traceback unless ``--traceback`` is given, or 3 where training diverged, or 75
        after SIGTERM, when what was trained so far is saved, or 130 when interrupted.
    """
    from absl import flags

    argv = list(sys.argv if argv is None else argv)
    doc = inspect.getdoc(inspect.getmodule(main_fn)) or ""
    options = {"presets": presets, "default_preset": default_preset, "doc": doc}
    try:
        parsed = _flags.parse(config_cls, argv, trains=trains, shares=shares, **options)
        if parsed.help is not None:
            print(parsed.help)
            return 0
        die_with_parent()
        _compiling.use_cache()
        with (
            _devices.chosen(parsed.devices, rolls_back=parsed.on_divergence != "stop"),
            _compiling.told(),
            _dry_run.asked(parsed.dry_run),
        ):
            _call(main_fn, parsed)
        return 0
    except _dry_run.Done:
        return 0
    except (ValueError, OSError, ImportError, flags.Error) as error:
        if "--traceback" in argv:
            raise
        text = str(error).strip().split("\n\n")[0] + _way_out(error)
        # Paths and flags stay whole, so that they can be copied.
        whole = {"break_long_words": False, "break_on_hyphens": False}
        print(textwrap.fill(f"error: {text}", 88, **whole), file=sys.stderr)
        print("(--traceback shows where)", file=sys.stderr)
        return 2
    except _divergence.DivergedError as error:
        print(f"error: {error}", file=sys.stderr)
        print(_after_divergence(parsed.on_divergence), file=sys.stderr)
        return _divergence.EXIT_STATUS
    except StoppedError as error:
        print(error, file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130


def _call(main_fn: Callable[[Any], Any], parsed: _flags.Parsed) -> None:
    """Again from the last checkpoint with smaller steps, where that is asked for."""
    scale = 1.0
    while True:
        with _divergence.attempt(scale, parsed.on_divergence) as attempt:
            try:
                main_fn(_divergence.rescale(parsed.config, scale))
                return
            except _divergence.RescaleError as error:
                scale = error.scale
            except _divergence.DivergedError as error:
                if parsed.on_divergence != "rollback":
                    raise
                scale = _divergence.roll_back(attempt, parsed.config, error)
                print(f"{error}; back to it", file=sys.stderr)
        print(f"learning rates are scaled by {scale:g} from here on", file=sys.stderr)


def _after_divergence(mode: str) -> str:
    if mode == "stop":
        return (
            "--on_divergence=rollback goes back to it with half of every learning rate"
        )
    return (
        f"not rolled back: {_divergence.MAX_ROLLBACKS} times are enough, or no setting "
        "is a learning rate"
    )


def _way_out(error: Exception) -> str:
    """What to do about an error of the disk, which does not know it."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return (
            ". The disk (or a quota, or a limit on files) is full: make room and give the "
            "same command again; it goes on from the last checkpoint"
        )
    if number == errno.EROFS:
        return ". The place is read-only: choose another one"
    return ""


def _check(path: pathlib.Path, kind: str, config: Any, ignore: Sequence[str]) -> bool:
    """Whether ``path`` holds this very run; raises if it holds anything else."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise NotADirectoryError(f"run directory {path} is a file; choose another")
    try:
        known = artifacts.read_json(path / "config.json")
        found_kind, found = known["kind"], known["config"]
    except FileNotFoundError:
        # A kill before config.json was complete leaves these two.
        entries = [p.name for p in path.iterdir()]
        names = [
            n
            for n in entries
            if n != _lock.LOCK_FILE and not n.startswith(".config.json.")
        ]
        if names:
            raise ValueError(
                f"{path} is not empty and no run directory (it has no config.json, but "
                f"{min(names)!r}); choose another with --run_dir"
            ) from None
        return False
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path}/config.json was not written by this package ({error!r}); choose "
            "another --run_dir"
        ) from error
    if found_kind != kind:
        raise ValueError(
            f"{path} is a run of {found_kind!r}, not of {kind!r}; choose another --run_dir"
        )
    changed = artifacts.differences(found, config)
    changed = [c for c in changed if c.split(":")[0] not in ignore]
    if changed:
        raise ValueError(
            f"{path} was made with another config ({'; '.join(changed[:5])}); give the "
            "same values to resume it, or choose another --run_dir"
        )
    return True


def _write_provenance(path: pathlib.Path, seed: int | None) -> None:
    """The facts of the latest start, and one entry for each."""
    facts = artifacts.provenance(seed=seed)
    starts = artifacts.read_json(path)["starts"] if path.exists() else []
    brief = {k: facts[k] for k in ("time", "command", "commit", "dirty", "versions")}
    artifacts.write_json(path, {**facts, "starts": [*starts, brief]})
