r"""Do damaged and hostile files ever crash, hang or flood a reader?

    python -m benchmarks.soak_readers --output=runs/soak/readers.json
    python -m benchmarks.soak_readers --readers=hdf5 --inputs=2000

Every reader works in a process of its own, which may take 1 GiB more than it has at the
start, and must answer each input within ten seconds. An input is read, or refused by an
error of ours; anything else fails: another exception (``escaped``), memory, a hang, or the
end of the process inside a C or Rust library (``crash``). Inputs that fail are kept beside
the result, under the name that their number gives them. A process that ends is replaced
and goes on with the next input.
"""

import collections
import dataclasses
import os
import pathlib
import resource
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import _readers as readers
from emfuse_jax import artifacts
from emfuse_jax.artifacts.config import unknown_name

_GIB = 2**30
_FINE = ("read", "refused")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoakConfig:
    """Settings.

    Attributes:
        readers: names; none: all of them.
        inputs: per reader.
        seed: of the inputs.
        start: number of the first input.
        seconds: that one input may take.
        memory: bytes that a reader may take beyond what its process starts with.
        kept: failing inputs that are kept per reader and kind.
        output: the result; inputs that fail go into the folder beside it.
    """

    readers: tuple[str, ...] = ()
    inputs: int = 100_000
    seed: int = 0
    start: int = 0
    seconds: float = 10.0
    memory: int = _GIB
    kept: int = 5
    output: str = "runs/soak/readers.json"

    def __post_init__(self) -> None:
        for name in self.readers:
            if name not in readers.READERS:
                raise ValueError(unknown_name("reader", name, readers.READERS))


class Tally:
    """Outcomes of one reader, and the inputs that failed.

    Args:
        name: of the reader.
        config: the soak's.
        wholes: the files that inputs are made from.
    """

    def __init__(self, name: str, config: SoakConfig, wholes: list[bytes]) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.examples: dict[str, list[dict[str, Any]]] = {}
        self._name, self._config, self._wholes = name, config, wholes

    def add(self, index: int, outcome: str, text: str) -> None:
        """Counts an outcome and keeps the input if it failed."""
        self.counts[outcome] += 1
        kept = self.examples.setdefault(outcome, [])
        if outcome == "refused" or len(kept) >= self._config.kept:
            return
        kept.append({"input": index, "text": text[:300]})
        if outcome not in _FINE:
            folder = pathlib.Path(self._config.output).with_suffix("")
            folder.mkdir(parents=True, exist_ok=True)
            reader = readers.READERS[self._name]
            data = readers.make_input(reader, self._wholes, self._config.seed, index)
            (folder / f"{self._name}-{index}").write_bytes(data)


def soak(config: SoakConfig) -> dict[str, Any]:
    """Reads everything, writes the result and returns it.

    Processes are forked: to be called before jax has started its devices' threads, and
    once, since the provenance starts them.
    """
    results = {}
    for name in config.readers or readers.READERS:
        started = time.monotonic()
        tally = _soak_reader(name, config)
        failed = sum(n for kind, n in tally.counts.items() if kind not in _FINE)
        results[name] = {
            "inputs": sum(tally.counts.values()),
            "failed": failed,
            "outcomes": dict(tally.counts),
            "examples": {k: v for k, v in tally.examples.items() if k not in _FINE},
            "seconds": round(time.monotonic() - started, 1),
        }
        print(f"{name}: {dict(tally.counts)}, {results[name]['seconds']} s", flush=True)
    document = {
        "config": artifacts.to_json(config),
        "provenance": artifacts.provenance(seed=config.seed),
        "results": results,
    }
    output = pathlib.Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    artifacts.write_json(output, document)
    return document


def _soak_reader(name: str, config: SoakConfig) -> Tally:
    wholes = readers.READERS[name].wholes()
    tally = Tally(name, config, wholes)
    index, end = config.start, config.start + config.inputs
    with tempfile.TemporaryDirectory(dir=_memory_disk()) as folder:
        while index < end:
            index = _work(name, config, wholes, tally, pathlib.Path(folder), index, end)
    return tally


def _work(
    name: str,
    config: SoakConfig,
    wholes: list[bytes],
    tally: Tally,
    folder: pathlib.Path,
    first: int,
    end: int,
) -> int:
    """A process that reads inputs until it ends; the number to go on with."""
    import select

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(receiver)
            _child(name, config, wholes, folder, range(first, end), sender)
        finally:
            os._exit(1)  # whatever happens, never on as a second parent
    os.close(sender)
    index, hung = first, False
    with os.fdopen(receiver, "rb") as answers:
        descriptor = answers.fileno()
        buffer = b""
        while index < end:
            if not select.select([descriptor], [], [], config.seconds)[0]:
                hung = True
                os.kill(child, signal.SIGKILL)
                break
            received = os.read(descriptor, 1 << 16)
            if not received:
                break
            buffer += received
            while len(buffer) >= 4:
                (size,) = struct.unpack("<I", buffer[:4])
                if len(buffer) < 4 + size:
                    break
                outcome, _, text = buffer[4 : 4 + size].decode().partition("\0")
                tally.add(index, outcome, text)
                buffer, index = buffer[4 + size :], index + 1
    _, status = os.waitpid(child, 0)
    if index < end:
        why = "no answer" if hung else f"status {os.waitstatus_to_exitcode(status)}"
        tally.add(index, "hang" if hung else "crash", why)
        index += 1
    return index


def _child(
    name: str,
    config: SoakConfig,
    wholes: list[bytes],
    folder: pathlib.Path,
    indices: range,
    sender: int,
) -> None:
    """Reads and answers; never returns."""
    reader = readers.READERS[name]
    path = folder / reader.name
    for whole in wholes:  # what reading imports is not the input's memory
        path.write_bytes(whole)
        _outcome(reader, path)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # panics of Rust write there
    limit = _address_space() + config.memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for index in indices:
        path.write_bytes(readers.make_input(reader, wholes, config.seed, index))
        outcome, text = _outcome(reader, path)
        answer = f"{outcome}\0{text}"[:1000].encode(errors="replace")
        os.write(sender, struct.pack("<I", len(answer)) + answer)
    os._exit(0)


def _outcome(reader: readers.Reader, path: pathlib.Path) -> tuple[str, str]:
    try:
        reader.read(path)
    except readers.REFUSALS as error:
        return "refused", str(error)
    except MemoryError as error:
        return "memory", str(error)
    except BaseException as error:  # a Rust panic is no Exception
        return f"escaped {type(error).__name__}", str(error)
    return "read", ""


def _address_space() -> int:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def _memory_disk() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main(config: SoakConfig) -> None:
    """The command line."""
    document = soak(config)
    failed = sum(result["failed"] for result in document["results"].values())
    if failed:
        raise ValueError(f"{failed} inputs failed; they lie beside {config.output}")


def run(argv: Sequence[str] | None = None) -> int:
    """`main` in the frame of a command line."""
    from experiments._run import run_main

    return run_main(main, SoakConfig, argv)


if __name__ == "__main__":
    sys.exit(run())
