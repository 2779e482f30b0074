"""`svb extract --devices`: the GPUs of this machine, and a process on each. They share the videos by leases.

Imports no torch: a process must choose its GPU before torch looks for one.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from svb.data.feature_store import read_store_description
from svb.data.publish import FolderLock
from svb.errors import Interrupted, SvbError, UsageError
from svb.extract.config import ExtractConfig
from svb.extract.plan import Plan
from svb.extract.pool.worker import die_with_parent
from svb.extract.progress import ExtractProgress, progress_of_all, what_limited
from svb.extract.together.leases import release_those_of
from svb.interrupts import deferred_interrupts

logger = logging.getLogger(__name__)

# How often a process tells how far it is, and the command looks whether it was interrupted.
TELL_SECONDS = 0.2
# What CUDA_VISIBLE_DEVICES may list: numbers, and the ids of GPUs and of their parts. CUDA ignores the rest.
_VISIBLE = re.compile(r"\d+|(GPU|MIG)-.+")

Share = Callable[[Sequence[Path | str], Path, ExtractConfig, Callable[[ExtractProgress], None]], None]


def visible_gpus() -> list[str]:
    """Return what CUDA_VISIBLE_DEVICES lists, or would list, for each GPU that this process may use."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(number) for number in range(_count_gpus())]
    gpus: list[str] = []
    for entry in listed.split(","):
        if not _VISIBLE.fullmatch(entry.strip()):
            break
        gpus.append(entry.strip())
    return gpus


def _count_gpus() -> int:
    """Ask NVIDIA's driver, which counts only those that a container lets us use."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    count = ctypes.c_uint(0)
    if nvml.nvmlInit_v2() == 0:
        nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
        nvml.nvmlShutdown()
    return count.value


def see_one_gpu(number: int) -> bool:
    """Have this process and those that it starts see one of its GPUs, counted round; False if it has none."""
    gpus = visible_gpus()
    if gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[number % len(gpus)]
    return bool(gpus)


def device_of(out: Path) -> str:
    """Return the device that a store was made on; empty if there is none, or it does not say."""
    if not (out / "store.json").exists():
        return ""
    return str(read_store_description(out)["provenance"].get("device", ""))


def own_device(config: ExtractConfig, out: Path) -> str:
    """Return the device; of several processes of one machine each takes a GPU, where there are any.

    A store that was made on the CPU stays there with `auto`: a GPU's rows may differ in their last bits.
    """
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID")
    takes_own = config.device in ("auto", "cuda") and config.place is not None and local is not None
    # If torch is imported already, CUDA may have been asked for its GPUs, and would not look again.
    sees_one = takes_own and "torch" not in sys.modules and see_one_gpu(int(local or 0))

    import torch

    if config.device == "auto" and torch.cuda.is_available() and device_of(out) == "cpu":
        logger.info(f"{out} was made on the CPU: new videos are computed there too - give --device to change that")
        return "cpu"
    if not takes_own or sees_one:
        return config.device
    gpus = torch.cuda.device_count()
    return f"cuda:{int(local or 0) % gpus}" if gpus else config.device


@contextlib.contextmanager
def turn_to_choose_engine(config: ExtractConfig, out: Path) -> Iterator[ExtractConfig]:
    """Yield the options; of several processes that may choose a new store's engine, one comes in at a time.

    The first one measures and makes the store; the others then take its engine.
    """
    has_gpu = config.device != "cpu" and bool(visible_gpus())
    if config.place is None or config.engine != "auto" or has_gpu:
        yield config
        return
    (out / "leases").mkdir(parents=True, exist_ok=True)
    lock = FolderLock(out / "leases")
    try:
        while not lock.take_alone():
            time.sleep(TELL_SECONDS)
        if (out / "store.json").exists():
            lock.close()
            config = config.settled(read_store_description(out))
        yield config
    finally:
        lock.close()


def chosen_devices(asked: str) -> list[str]:
    """Return the devices that `--devices` names: GPUs as CUDA_VISIBLE_DEVICES has them, or `cpu` for each process.

    Raises:
        UsageError: There is no such GPU.
    """
    names = asked.split(",")
    if set(names) == {"cpu"}:
        return names
    gpus = visible_gpus()
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    why = "NVIDIA's driver tells of them" if listed is None else f"CUDA_VISIBLE_DEVICES is {listed!r}"
    found = f"found {len(gpus)} GPUs ({why})"
    if not gpus:
        raise UsageError(f"--devices {asked}: {found} - leave out --devices to compute on the CPU")
    chosen = gpus if names == ["all"] else [_gpu(name, gpus, f"--devices {asked}: {found}") for name in names]
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"--devices {asked} names a GPU twice - expected each once")
    return chosen


def _gpu(name: str, gpus: Sequence[str], found: str) -> str:
    if name.isdecimal() and int(name) < len(gpus):
        return gpus[int(name)]
    if not name.isdecimal() and _VISIBLE.fullmatch(name):
        return name
    raise UsageError(f"{found} - expected all, or numbers from 0 to {len(gpus) - 1} with commas between them")


def extract_on_devices(
    share: Share,
    videos: Sequence[Path | str],
    out: Path,
    config: ExtractConfig,
    plan: Plan,
    on_progress: Callable[[ExtractProgress], None],
) -> str:
    """Fill a store by one process a device, and return what limited them in a sentence.

    A process that dies costs no video: the others take its videos.

    `share` does one process's part, in that process; `plan` says what there is to do for all.

    Raises:
        Interrupted: SIGINT or SIGTERM came, and was passed on to all.
        SvbError: No process came to the end; it is the error of the last one.
    """
    devices = chosen_devices(config.devices or "")
    if os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise UsageError("got --devices under a launcher that starts several processes here - use one of the two")
    logger.info(f"a process on each of {_names(devices)}")
    said = set(plan.messages)
    passed_on = 0
    with deferred_interrupts() as interrupted, _started(share, videos, out, config, devices) as processes:
        while running := [process for process in processes if process.runs]:
            wait([process.connection for process in running], TELL_SECONDS)
            for process in running:
                process.listen(said)
                if process.failure is not None:
                    release_those_of(process.pid, out / "leases")
                    if not passed_on and any(other.runs for other in processes):
                        words = f"the process on {process.name} ended ({process.failure})"
                        logger.warning(f"{words}: the others take its videos")
            if interrupted() != passed_on:
                passed_on = interrupted()
                for process in running:
                    process.interrupt(passed_on)
            on_progress(_together(processes, plan, devices))
    progress = _together(processes, plan, devices)
    if passed_on:
        words = f"interrupted - {progress.videos_done} videos of this run are in {out}"
        raise Interrupted(passed_on, f"{words}; run the same command again to go on")
    failures = [process.failure for process in processes if process.failure is not None]
    if len(failures) == len(processes):
        raise failures[-1]
    return what_limited(progress)


@contextlib.contextmanager
def _started(
    share: Share, videos: Sequence[Path | str], out: Path, config: ExtractConfig, devices: Sequence[str]
) -> Iterator[list[_Process]]:
    """Start a process on each device, and yield them; what still runs in the end is killed."""
    processes: list[_Process] = []
    try:
        for number in range(len(devices)):
            own_config = _config_of(config, devices, number)
            processes.append(_Process(share, videos, out, own_config, devices, number))
        yield processes
    finally:
        for process in processes:
            process.kill()
            if process.runs:
                release_those_of(process.pid, out / "leases")


def _names(devices: Sequence[str]) -> str:
    return f"{len(devices)} times the CPU" if devices[0] == "cpu" else f"the GPUs {', '.join(devices)}"


def _config_of(config: ExtractConfig, devices: Sequence[str], number: int) -> ExtractConfig:
    """Return the options of one process: its rank among all, and its part of the decoders."""
    rank, world = config.place or (0, 1)
    return replace(
        config,
        devices=None,
        device="cpu" if devices[number] == "cpu" else "cuda",
        rank=rank * len(devices) + number,
        world_size=world * len(devices),
        workers=None if config.workers is None else max(1, config.workers // len(devices)),
    )


def _together(processes: Sequence[_Process], plan: Plan, devices: Sequence[str]) -> ExtractProgress:
    told = [process.progress for process in processes if process.progress is not None]
    return progress_of_all(
        told, len(plan.todo), plan.num_bytes, device="cpu" if devices[0] == "cpu" else _names(devices)
    )


@dataclass(frozen=True)
class _Said:
    """A message of the library in another process."""

    logger: str
    level: int
    words: str


@dataclass(frozen=True)
class _Ended:
    """The last message of a process: how far it came, and its error if it failed."""

    progress: ExtractProgress | None
    failure: SvbError | OSError | None


class _Process:
    """The process of one device, and what it has reported.

    Attributes:
        runs: Whether it has not ended yet.
        failure: The error of a process that has ended before all videos were done.
    """

    def __init__(
        self,
        share: Share,
        videos: Sequence[Path | str],
        out: Path,
        config: ExtractConfig,
        devices: Sequence[str],
        number: int,
    ) -> None:
        self.name = devices[number] if devices[number] == "cpu" else f"GPU {devices[number]}"
        self.progress: ExtractProgress | None = None
        self.failure: SvbError | OSError | None = None
        self.runs = True
        self._is_ready = False
        self._ended: _Ended | None = None
        self.connection, theirs = multiprocessing.Pipe(duplex=False)
        # spawn: a fork would copy torch's threads and CUDA's state, and break them.
        context = multiprocessing.get_context("spawn")
        arguments = (share, videos, out, config, theirs)
        self._process = context.Process(target=_work, args=arguments)  # no daemon, which could start no decoders
        own = {"LOCAL_WORLD_SIZE": str(len(devices))}
        with _environment(own if devices[number] == "cpu" else {**own, "CUDA_VISIBLE_DEVICES": devices[number]}):
            self._process.start()
        self.pid = self._process.pid or 0
        theirs.close()

    def listen(self, said: set[str]) -> None:
        """Take what it tells; what another one has said already is not said again."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                self._is_ready = True
                if message is None:
                    continue
                if isinstance(message, ExtractProgress):
                    self.progress = message
                elif isinstance(message, _Ended):
                    self._ended = message
                    self.progress = message.progress or self.progress
                elif message.words not in said:
                    said.add(message.words)
                    logging.getLogger(message.logger).log(message.level, message.words)
        except (EOFError, OSError):
            self._process.join()
            self.runs = False
            lost = SvbError(
                f"the process on {self.name} died with exit code {self._process.exitcode} - run the same command "
                "again; if it dies again, look into the system's log and at nvidia-smi"
            )
            self.failure = lost if self._ended is None else self._ended.failure

    def interrupt(self, number: int) -> None:
        """Pass a signal on; a process that is not ready for one has done nothing yet."""
        if not self._is_ready:
            self._process.kill()
        elif self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it whatever it does; nothing happens if it has ended."""
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(
    share: Share, videos: Sequence[Path | str], out: Path, config: ExtractConfig, connection: Connection
) -> None:
    """Do one process's share, in that process."""
    os.setsid()  # Ctrl-C reaches the command alone, which passes it on
    die_with_parent(signal.SIGTERM)
    signal.signal(signal.SIGTERM, _interrupt)
    teller = _Teller(connection)
    library = logging.getLogger("svb")
    library.handlers, library.propagate = [teller], False
    library.setLevel(logging.INFO)
    failure: SvbError | OSError | None = None
    try:
        teller.tell(None)  # from here on it can save what is whole after a signal
        share(videos, out, config, teller.tell_progress)
    except Interrupted as interrupted:
        failure = SvbError(str(interrupted))
    except KeyboardInterrupt:
        failure = SvbError("interrupted")
    except (SvbError, OSError) as error:
        failure = error
    teller.tell(_Ended(teller.progress, failure))


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


class _Teller(logging.Handler):
    """Tells the command what the library says here and how far it is; any thread may."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self.progress: ExtractProgress | None = None
        self._connection = connection
        self._sending = threading.Lock()
        self._told = 0.0

    def tell(self, message: ExtractProgress | _Said | _Ended | None) -> None:
        with self._sending, contextlib.suppress(OSError):  # the command may be dead
            self._connection.send(message)

    def tell_progress(self, progress: ExtractProgress) -> None:
        self.progress = progress
        if time.monotonic() - self._told >= TELL_SECONDS:
            self._told = time.monotonic()
            self.tell(progress)

    def emit(self, record: logging.LogRecord) -> None:
        self.tell(_Said(record.name, record.levelno, record.getMessage()))
