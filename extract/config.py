"""All options of an extraction, and what they make of a store: its settings, which every row depends on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svb.config import option, require_same
from svb.device import PRECISIONS, describe_device
from svb.errors import UsageError
from svb.extract.backbones import DEFAULT_BACKBONE, absolute_name, package_versions
from svb.extract.decode.options import DECODERS, READER, DecodeOptions, Limits, decoder_settings
from svb.extract.decode.sampling import Sampling
from svb.extract.inputs import FolderRules

if TYPE_CHECKING:
    import torch

    from svb.extract.backbones.backbone import Backbone
    from svb.extract.decode.sampling import TimesTable

RESIZES = ("device", "decoder")
ENGINES = ("auto", "torch", "onnx")
SAMPLINGS = ("fps", "frames", "every_nth", "keyframes", "scenes", "times")
ON_PARTIAL = ("keep", "fail")
MAX_BATCH_SIZE = 4096
# What a new store takes for options that were never given.
DEFAULTS: dict[str, Any] = {"backbones": (DEFAULT_BACKBONE,), "fps": 1.0, "decoder": "pyav", "resize": "device"}
# A GPU waits for Python to start its work: at 32 it would stand still most of the time.
BATCH_SIZES = {"cpu": 32, "cuda": 256}
# Packages whose versions are recorded beside those that the backbones name.
PACKAGES = ("svb-video", "torch", "av", "imageio-ffmpeg", "h5py", "numpy", "onnxruntime")


@dataclass(frozen=True)
class ExtractConfig:
    """Options of an extraction: which frames, how they are decoded and computed, and who does it.

    What shapes the rows and is not given stays as it is in a store that is there; see `settled`.

    Attributes:
        backbones: Network to run, as family:model[/weights]. Repeatable: several share one decode.
            [default: as before, or open_clip:PE-Core-B-16/meta]
        fps: Frames a second, on the file's own clock. [default: as before, or 1]
        frames: Take this many frames, spread evenly, instead of --fps.
        every_nth: Take frames 0, N, 2N and so on instead.
        keyframes: Take the key frames instead, and decode nothing else.
        scenes: Take the first frame of each scene instead, where ffmpeg's score of change exceeds this, from 0 to
            1. [without a number: 0.3]
        times: Take the frames at the times in this table (.csv, .jsonl, .parquet) with the columns video_id and
            time_seconds instead.
        decoder: Decoder to use; `pyav` hands what it cannot read over to ffmpeg. [default: as before, or pyav]
        fast_decode: Skip frames that no other frame refers to; the frames taken may move.
        hwaccel: Hardware decoder of ffmpeg, such as `cuda`; needs --decoder ffmpeg.
        resize: Where to scale frames; `decoder` moves less to the backbones, and changes the last bits.
            [default: as before, or device]
        device: Where to run the backbones: auto, cpu, cuda:0, ... A store made on the CPU stays there with `auto`.
        devices: GPUs to run a process on each: all, or numbers such as 0,1,2.
        precision: Precision of the backbones; `auto` keeps the store's, or takes what is fast on the device.
        engine: What computes backbones on a CPU, PyTorch or ONNX Runtime; `auto` keeps the store's, or takes the
            faster one.
        compile: Compile the backbones with torch.compile.
        workers: Decode processes to run, on all devices together. [default: one a core]
        batch_size: Frames, or clips of frames, in a batch. [default: as before, or 32 on a CPU, 256 on a GPU]
        stall_seconds: Skip a video whose decoder makes no progress for this many seconds.
        time_limit_seconds: Skip a video that decodes for more seconds than this; waiting for the backbones does not
            count.
        max_width: Refuse videos that are wider, in pixels.
        max_height: Refuse videos that are higher, in pixels.
        max_hours: Refuse videos that are longer, in hours.
        max_streams: Refuse files with more streams.
        on_partial: Whether to keep a video that decodes only in part, or to record it as failed.
        hidden: Take hidden files and folders too, and those in the trash.
        exclude: Files and folders below VIDEOS to leave out, as a pattern of .gitignore. Repeatable.
        suffixes: Suffix of files that are videos too, such as .xyz. Repeatable.
        retry_failed: Try failed videos again: all, or those with these codes; partial is one too.
        prune: Remove videos from the store whose files are gone.
        rank: Number of this process, from 0, among several that fill one store. [default: the launcher's]
        world_size: How many processes fill the store. [default: the launcher's]
        ray: Decode and compute on a Ray cluster: HOST:PORT of its head, auto, or local to start one here.

    Raises:
        UsageError: A value is out of its range, or two options contradict each other.
    """

    backbones: tuple[str, ...] = option((), flag="--backbone")
    fps: float | None = None
    frames: int | None = None
    every_nth: int | None = None
    keyframes: bool = False
    scenes: float | None = option(None, alone=0.3)
    times: Path | None = None
    decoder: str | None = option(None, choices=DECODERS)
    fast_decode: bool = False
    hwaccel: str | None = None
    resize: str | None = option(None, choices=RESIZES)
    device: str = "auto"
    devices: str | None = option(None, metavar="LIST")
    precision: str = option("auto", choices=PRECISIONS)
    engine: str = option("auto", choices=ENGINES)
    compile: bool = False
    workers: int | None = None
    batch_size: int | None = None
    stall_seconds: float = 120.0
    time_limit_seconds: float = option(4 * 3600.0, flag="--time-limit")
    max_width: int = 16384
    max_height: int = 16384
    max_hours: float = 48.0
    max_streams: int = 64
    on_partial: str = option("keep", choices=ON_PARTIAL)
    hidden: bool = False
    exclude: tuple[str, ...] = option((), metavar="PATTERN")
    suffixes: tuple[str, ...] = option((), flag="--suffix", metavar="SUFFIX")
    retry_failed: str | None = option(None, alone="all", metavar="[=CODE,...]")
    prune: bool = False
    rank: int | None = None
    world_size: int | None = None
    ray: str | None = option(None, metavar="ADDRESS")

    def __post_init__(self) -> None:
        for field in fields(self):
            value, choices = getattr(self, field.name), field.metadata.get("choices")
            if choices and value is not None and value not in choices:
                raise UsageError(f"{field.name} is {value!r} - expected one of {', '.join(choices)}")
        # Local weights are found from every folder and node, and no backbone runs twice.
        names = tuple(absolute_name(name) for name in dict.fromkeys(self.backbones))
        object.__setattr__(self, "backbones", names)
        if self.workers is not None and self.workers < 1:
            raise UsageError(f"workers is {self.workers} - expected at least 1")
        if self.batch_size is not None and not 1 <= self.batch_size <= MAX_BATCH_SIZE:
            raise UsageError(f"batch_size is {self.batch_size} - expected 1 to {MAX_BATCH_SIZE}")
        for name in ("stall_seconds", "time_limit_seconds"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} is {getattr(self, name)} - expected more than 0")
        _ = self.decode_options, self.retry, self.folder_rules  # which check what they are made from
        self._check_engine()
        self._check_place()
        self._check_ray()
        if self.devices is not None and (self.device != "auto" or self.ray is not None):
            other = f"--device {self.device}" if self.ray is None else "--ray"
            raise UsageError(f"got --devices {self.devices} and {other} - give one of the two")

    def _check_engine(self) -> None:
        if self.engine != "onnx":
            return
        if self.compile:
            raise UsageError("got --engine onnx and --compile, which compiles for PyTorch - give one of the two")
        if self.precision not in ("auto", "float32"):
            raise UsageError(
                f"precision {self.precision!r} and --engine onnx, which computes in float32 only - leave out one "
                "of them"
            )

    def _check_place(self) -> None:
        if self.rank is None and self.world_size is None:
            return
        if self.rank is None or self.world_size is None or not 0 <= self.rank < self.world_size:
            raise UsageError(
                f"got --rank {self.rank} and --world-size {self.world_size} - give both, the rank from 0 and below "
                "the world size"
            )

    def _check_ray(self) -> None:
        if self.ray is None:
            return
        if self.rank is not None:
            raise UsageError("got a rank and a Ray cluster, which shares the work out itself - give one of the two")
        if self.workers is not None:
            raise UsageError(
                f"got --workers {self.workers} and --ray, which decodes on all CPUs - leave out --workers"
            )
        if self.device not in ("auto", "cpu", "cuda"):
            raise UsageError(
                f"device {self.device!r} on a Ray cluster - expected auto, cpu or cuda: Ray chooses the GPUs"
            )
        if self.hwaccel is not None:
            raise UsageError(
                f"hardware decoder {self.hwaccel!r} on a Ray cluster, which decodes on CPUs - leave it out"
            )

    @property
    def frames_a_batch(self) -> int:
        """How many frames, or clips of frames, are in a batch; on a GPU, `on` must have been called."""
        return BATCH_SIZES["cpu"] if self.batch_size is None else self.batch_size

    def on(self, device: str) -> ExtractConfig:
        """Return these options with the batch size that suits a device, unless one was given or a store has one."""
        size = BATCH_SIZES.get(device.partition(":")[0], BATCH_SIZES["cpu"])
        return self if self.batch_size is not None else replace(self, batch_size=size)

    def settled(self, store: Mapping[str, Any] | None) -> ExtractConfig:
        """Return these options, and for what was not given a store's own, or the defaults of a new store.

        Args:
            store: The description of the store that is there, if there is one.
        """
        if store is None or store["settings"]["decoder"]["name"] not in DECODERS:
            return self._with_defaults(DEFAULTS)
        settings, decoder = store["settings"], store["settings"]["decoder"]
        precisions = {backbone.get("precision", "auto") for backbone in settings["backbones"].values()}
        engines = {backbone.get("engine", "torch") for backbone in settings["backbones"].values()}
        held = {
            **settings["sampling"],
            "backbones": tuple(settings["backbones"]),
            "decoder": decoder["name"],
            "resize": "decoder" if "resize_px" in decoder else "device",
            "batch_size": settings.get("batch_size"),
            "precision": precisions.pop() if len(precisions) == 1 else "auto",
            # svb once had PyTorch alone; what is compiled is PyTorch's.
            "engine": engines.pop() if len(engines) == 1 and not self.compile else "auto",
        }
        if self.decoder in (None, decoder["name"]):
            held |= {"fast_decode": decoder.get("fast", False), "hwaccel": decoder.get("hwaccel")}
        if "times" in settings["sampling"]:
            table = store["provenance"].get("options", {}).get("times")
            held["times"] = Path(table) if table and Path(table).is_file() else None
        return self._with_defaults(held)

    def _with_defaults(self, defaults: Mapping[str, Any]) -> ExtractConfig:
        """Return these options, and others for those that were not given; a sampling is given as a whole."""
        samples = self.times is not None or bool(self._given_sampling)
        names = {field.name: field.default for field in fields(self)}
        taken = {
            name: value
            for name, value in defaults.items()
            if name in names and getattr(self, name) == names[name] and not (samples and name in SAMPLINGS)
        }
        return replace(self, **taken)

    @property
    def place(self) -> tuple[int, int] | None:
        """This process's rank and how many processes fill the store; None for one process alone."""
        return None if self.rank is None or self.world_size is None else (self.rank, self.world_size)

    @property
    def retry(self) -> frozenset[str]:
        """Statuses of videos that are tried again."""
        codes = frozenset(code for code in (self.retry_failed or "").split(",") if code)
        if not codes:
            return codes
        from svb.data.rows import FAILURES

        if codes == {"all"}:
            return frozenset(FAILURES)
        if not codes <= {*FAILURES, "partial"}:
            raise UsageError(
                f"--retry-failed got {self.retry_failed!r} - expected codes after a =, such as "
                f"--retry-failed=timeout, of {', '.join((*FAILURES, 'partial'))}; or nothing: then put it last, "
                "behind VIDEOS"
            )
        return codes

    @property
    def folder_rules(self) -> FolderRules:
        """Which files of folders are taken."""
        suffixes = tuple(f".{suffix.removeprefix('.').lower()}" for suffix in self.suffixes)
        return FolderRules(self.hidden, self.exclude, suffixes)

    @property
    def decode_options(self) -> DecodeOptions:
        """How every video is decoded, but for the size that the backbones want."""
        return DecodeOptions(
            self._sampling,
            self.decoder or DEFAULTS["decoder"],
            fast=self.fast_decode,
            hwaccel=self.hwaccel,
            limits=Limits(self.max_width, self.max_height, self.max_hours * 3600, self.max_streams),
        )

    @property
    def _sampling(self) -> Sampling:
        given = self._given_sampling
        if self.times is None:
            return Sampling(**given or {"fps": DEFAULTS["fps"]})
        if given:
            raise UsageError(f"got both a sampling ({given}) and times from {self.times} - give one of the two")
        return Sampling(times_seconds=(0.0,))  # every video has its own in place of these

    @property
    def _given_sampling(self) -> dict[str, Any]:
        asked = {name: getattr(self, name) for name in SAMPLINGS if name != "times"}
        return {name: value for name, value in asked.items() if value is not None and value is not False}

    @cached_property
    def times_table(self) -> TimesTable | None:
        """The table of times, where every video has its own.

        Raises:
            InputError: It cannot be used.
        """
        if self.times is None:
            return None
        from svb.extract.decode.sampling import read_times

        return read_times(Path(self.times))

    def load_backbones(self, device: torch.device) -> list[Backbone]:
        """Load the backbones onto a device, with the engine asked for; raises as `engine.load_backbones` does."""
        from svb.extract.backbones.engine import load_backbones  # and with it torch

        return load_backbones(
            self.backbones,
            device,
            precision=self.precision,
            engine=self.engine,
            compile=self.compile,
            batch_size=self.frames_a_batch,
        )

    def decode_options_for(self, networks: Sequence[Backbone]) -> DecodeOptions:
        """Return how videos are decoded for these backbones.

        Raises:
            UsageError: The decoder is to scale frames, and cannot do it as these backbones want it.
        """
        options = self.decode_options
        device = networks[0].device
        if self.hwaccel == "cuda" and device.type == "cuda" and device.index is not None:
            options = replace(options, hwaccel_device=str(device.index))  # else all ranks decode on the first GPU
        if self.resize != "decoder":
            return options
        transforms = {network.name: network.transform for network in networks}
        first = next(iter(transforms.values()))
        for name, transform in transforms.items():
            same_kind = (transform.mode, transform.interpolation) == (first.mode, first.interpolation)
            same_size = transform.mode == "shortest" or transform.box_px == first.box_px
            if transform.mode == "longest" or not transform.antialias or not same_kind or not same_size:
                others = f"; {networks[0].name} wants: {first}" if transform != first else ""
                raise UsageError(
                    f"the decoder cannot scale frames as {name} wants them: {transform}{others} - leave out "
                    "--resize decoder"
                )
        short_side = max(transform.box_px[0] for transform in transforms.values())
        return replace(
            options,
            resize_px=short_side if first.mode == "shortest" else first.box_px,
            interpolation=first.interpolation,
        )

    def settings(self, networks: Sequence[Backbone]) -> dict[str, Any]:
        """Return the settings of the store that is asked for: all that shapes its rows."""
        return {
            **self._settings(decoder_settings(self.decode_options_for(networks))),
            "backbones": {network.name: network.settings() for network in networks},
        }

    def provenance(self, device: torch.device) -> dict[str, Any]:
        """Return what shapes no row but is worth recording: device, versions, and options that were changed."""
        versions = {name: version(name) for name in PACKAGES}
        given = {
            field.name: str(value) if isinstance(value, Path) else value
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (field.default, DEFAULTS.get(field.name))
        }
        return {
            "reader": READER,
            **describe_device(device),
            "versions": {**versions, **package_versions(self.backbones)},
            "options": given,
        }

    def require_fits(self, settings: Mapping[str, Any], out: Path) -> None:
        """Compare what no network is needed for with the settings of a store.

        So a run with nothing to do takes a second, and a wrong option is refused almost as fast.

        Raises:
            MismatchError: The store was made with other settings.
        """
        decoder = decoder_settings(self.decode_options)
        if self.resize == "decoder":
            # The backbones tell the size, and are not loaded here.
            held = settings["decoder"]
            decoder["resize_px"] = held.get("resize_px", "the largest backbone's")
            decoder |= {"interpolation": held["interpolation"]} if "interpolation" in held else {}
        require_same(
            {**settings, "backbones": sorted(settings["backbones"])},
            {**self._settings(decoder), "backbones": sorted(self.backbones)},
            what=f"the feature store {out}",
            do_next="Give the options (and package versions) it was made with, or write to another folder with -o.",
        )
        for name in ("precision", "engine"):
            value = getattr(self, name)
            if value == "auto":
                continue
            stored = {backbone: {name: held.get(name, "torch")} for backbone, held in settings["backbones"].items()}
            wanted = {backbone: {name: value} for backbone in stored}
            require_same(stored, wanted, what=f"the feature store {out}", do_next=f"Leave out --{name}.")

    def _settings(self, decoder: dict[str, Any]) -> dict[str, Any]:
        table = self.times_table
        return {
            "sampling": {"times": table.content_hash} if table else self._sampling.settings(),
            "decoder": decoder,
            # The last bits of a row depend on it in bfloat16.
            "batch_size": self.frames_a_batch,
        }
