"""Joining a Ray cluster, or starting one, and what it has for an extraction."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from svb.errors import InputError, UsageError

CONNECT_SECONDS = 5.0


@dataclass(frozen=True)
class Cluster:
    """What a cluster has: its CPUs, and the options of an actor for every place where one can be."""

    num_cpus: int
    places: list[dict[str, Any]]
    description: str


def look_at_cluster(device: str) -> Cluster:
    """Look at the cluster: an actor for every GPU, or on every node where there is none.

    Raises:
        InputError: It has no CPU to decode on.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    on_cpus = [node for node in nodes if node["Resources"].get("CPU", 0) >= 1]
    num_cpus = sum(int(node["Resources"]["CPU"]) for node in on_cpus)
    num_gpus = 0 if device == "cpu" else sum(int(node["Resources"].get("GPU", 0)) for node in nodes)
    if not num_cpus:
        raise InputError(
            f"the Ray cluster's {len(nodes)} nodes have no CPU - start one with `ray start --num-cpus`"
        )
    places: list[dict[str, Any]] = [{"num_gpus": 1}] * num_gpus or [
        {"scheduling_strategy": NodeAffinitySchedulingStrategy(node["NodeID"], soft=True)} for node in on_cpus
    ]
    where = "GPU" if num_gpus else "node"
    description = f"Ray: backbone actors: {len(places)} (one a {where}), decoders: {num_cpus} (one a CPU)"
    return Cluster(num_cpus, places, description)


@contextlib.contextmanager
def joined(address: str) -> Iterator[None]:
    """Join a cluster, or start one, and leave it again.

    Raises:
        InputError: There is none, or it is another version's.
        UsageError: It is none that can be joined.
    """
    if address.startswith("ray://"):
        raise UsageError(f"cannot join {address!r} by Ray's client - give HOST:PORT of the cluster's head, or auto")
    if ray.is_initialized():
        raise UsageError("this process is in a Ray cluster already - call ray.shutdown() first")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_terminate = signal.getsignal(signal.SIGTERM)
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself tries an address that nobody answers at for minutes
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (OSError, OverflowError, RuntimeError, ValueError, RayError) as error:
        raise InputError(
            f"cannot join a Ray cluster at {address!r} ({first_line(error)}) - expected HOST:PORT of a running "
            "cluster's head, auto or local; run this on one of its nodes, or start one with `ray start --head`"
        ) from error
    try:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_terminate)  # Ray's would end the process
        yield
    finally:
        ray.shutdown()


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
