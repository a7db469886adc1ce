"""Builds one shard of one graph on this machine, together with builders of the other shards on other machines.

The steps are those of `steps`.
This builder serves its own image while the others link their shards to it.
It READs theirs over verbs, or on one host over shared memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace

import numpy as np

from cotra_rdma._build.collection import check_build, of_graph
from cotra_rdma._build.cross_links import channel_of_fd
from cotra_rdma._build.mail import HelloMessage
from cotra_rdma._build.network_mail import NetworkMail
from cotra_rdma._build.publication import Publication
from cotra_rdma._build.spec import BuildSpec
from cotra_rdma._build.steps import ShardBuilder, result_of
from cotra_rdma._collection.manifest import Collection
from cotra_rdma._native.channel import Channel
from cotra_rdma._native.image import ImageInfo
from cotra_rdma._native.verbs import Device, QueuePairOptions
from cotra_rdma._owner.leases import LEASE_S
from cotra_rdma._owner.server import serve
from cotra_rdma._reader.connection import Connection
from cotra_rdma._shard.params import BuildParams
from cotra_rdma.datasets import VectorFile
from cotra_rdma.errors import CotraError, InvalidInputError, PeerError, VerbsUnavailableError
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.rpc_server import RpcServer
from cotra_rdma.protocol.tls import Tls

DEFAULT_TIMEOUT_S = 120.0
_TRANSPORTS = ("verbs", "shm")
_CALL_MS = 5000
_DIGEST_ROWS = 64  # of the input, by which builders see that all have the same


def build_on_machine(
    vectors: VectorFile,
    directory: str | os.PathLike[str],
    shard: int,
    peers: Sequence[str],
    *,
    listen: str | None = None,
    metric: str = "l2",
    M: int = 16,
    ef_construction: int = 200,
    seed: int = 100,
    n_threads: int = 0,
    n_lists: int = 0,
    ivf_bits: int = 2,
    vector_type: str = "auto",
    force: bool = False,
    device: str | None = None,
    gid_index: int | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    tls: Tls | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> Collection:
    """Builds one shard of one graph, at the same time as builders of the other shards on other machines.

    Args:
        vectors: the data set, the same on every machine.
        directory: the directory for this shard's file, its coarse table, and the manifest of the whole collection. The
            machines may share it.
        shard: the number of this builder's shard, from 0 to len(peers) - 1.
        peers: HOST:PORT of each shard's builder, in the order of the shards. This builder's own is among them.
        listen: HOST:PORT to listen on. None stands for this builder's entry in `peers`.
        metric: as for `build_collection`, the same everywhere. So are the other parameters of the graph and its lists.
        M: as for `build_collection`.
        ef_construction: as for `build_collection`.
        seed: as for `build_collection`.
        n_threads: the threads of this builder. 0 stands for all cores.
        n_lists: as for `build_collection`.
        ivf_bits: as for `build_collection`.
        vector_type: as for `build_collection`.
        force: whether to replace a collection that is already in the directory.
        device: the verbs device, as for `serve`.
        gid_index: the GID of the device, as for `serve`.
        timeout_s: the longest silence of another builder, in seconds, also before it starts.
        tls: this builder's certificate, and whom it believes. None lets everybody in.
        progress: called with (phase, rows done) of this builder.

    Returns:
        The collection. This directory may hold only one of its shards.

    Raises:
        InvalidInputError: a value is out of its range, or there is a collection already.
        DeadlineError: another builder was silent for too long. `shard` is its number. Nothing is left behind.
        PeerError: another builder ended, gave up, or builds something else. `shard` is its number. Nothing is left
            behind.
        TransportError: an image can be READ over neither verbs nor shared memory, or the address cannot be listened on.
    """
    check_build(vectors, len(peers), None, "global", n_lists)
    params = BuildParams(metric, M, ef_construction, seed, n_threads, n_lists, ivf_bits, vector_type)
    _check_builders(shard, peers, timeout_s)
    with Publication(directory, force=force) as publication, ExitStack() as stack:
        mail = NetworkMail(shard, peers, timeout_s=timeout_s, tls=tls)
        stack.callback(mail.close)
        address = listen or peers[shard]
        rpc = stack.enter_context(RpcServer(address, mail.answer, tls=tls))
        try:
            spec = BuildSpec(vectors.count, vectors.dim, len(peers), params, publication.generation)
            mail.meet()
            spec = _agree(spec, vectors, mail, shard)
            builder = ShardBuilder(spec, shard, vectors, mail, publication.aside, progress)
            if shard == 0:
                builder.train()
            builder.count()
            builder.divide()
            own = stack.enter_context(builder.build_image())
            stack.enter_context(serve(own, address, _TRANSPORTS, device, gid_index, exchange=mail.take, rpc=rpc))
            builder.announce_image(own)
            with _Images(peers, tls, device, gid_index) as images:
                builder.link(own.arena, images.open)
            if shard == 0:
                builder.calibrate()
            collection = of_graph(spec, result_of(builder))
        except BaseException as error:
            mail.fail(error)
            raise
        return publication.publish(collection, [shard])


def _check_builders(shard: int, peers: Sequence[str], timeout_s: float) -> None:
    if len(peers) < 2 or len(set(peers)) != len(peers) or not 0 <= shard < len(peers):
        raise InvalidInputError(
            f"shard {shard} of {len(peers)} builders cannot be built: "
            "there must be two or more builders, at different addresses, and one for each shard"
        )
    for address in peers:
        if not parse_address(address)[1]:
            raise InvalidInputError(f"{address}: the other builders must know its port, so 0 cannot be among the ports")
    if not timeout_s > 0:
        raise InvalidInputError(f"timeout_s must be above 0, not {timeout_s}")


def _agree(spec: BuildSpec, vectors: VectorFile, mail: NetworkMail, number: int) -> BuildSpec:
    """Waits for all builders, and compares what they build.

    Returns:
        The specification, with the generation that all agree on.

    Raises:
        PeerError: a builder builds something else.
    """
    some = np.linspace(0, vectors.count - 1, min(vectors.count, _DIGEST_ROWS)).astype(np.int64)
    digest = hashlib.sha256(vectors.take(some).tobytes()).hexdigest()
    shared, generation = spec.shared() | {"type of the rows": str(vectors.dtype)}, spec.generation
    mail.send(HelloMessage(shared, generation, digest))
    for sender in range(spec.n_shards):
        hello, _ = mail.receive(HelloMessage, sender)
        for name, value in shared.items():
            if hello.spec.get(name) != value:
                other = str(hello.spec.get(name))[:80]
                raise PeerError(
                    f"shard {sender} is built with {name} {other}, and shard {number} with {value}", shard=sender
                )
        if hello.rows != digest:
            raise PeerError(f"shard {sender} is built from other vectors than shard {number}", shard=sender)
        if not 0 < hello.generation < 2**63:
            raise PeerError(f"shard {sender} is built with generation {hello.generation}: out of range", shard=sender)
        generation = max(generation, hello.generation)
    return replace(spec, generation=generation)


class _Images:
    """The other shards' own images. A shard is connected to when it is first needed. A context manager."""

    def __init__(
        self,
        addresses: Sequence[str],
        tls: Tls | None,
        device: str | None,
        gid_index: int | None,
    ) -> None:
        self._addresses = addresses
        self._tls = tls
        self._options = QueuePairOptions() if gid_index is None else QueuePairOptions(gid_index=gid_index)
        self._connections: dict[int, Connection] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._device: Device | None = None
        self._no_device = ""
        try:
            self._device = Device(device)
        except VerbsUnavailableError as error:
            if device is not None:
                raise
            self._no_device = str(error)
        self._renewing = threading.Thread(target=self._renew, name="cotra-build-leases", daemon=True)
        self._renewing.start()

    @contextlib.contextmanager
    def open(self, number: int, like: ImageInfo) -> Iterator[Channel]:
        """Opens a channel to a shard's own image.

        Args:
            number: the number of the shard.
            like: the header of this builder's own image, which has records of the same size.

        Raises:
            TransportError: the image can be READ in no way.
        """
        with self._lock:
            connection = self._connections.get(number) or self._connect(number)
            arena = connection.memory
            channel, stack = connection.open_channel() if arena is None else (None, ExitStack())
        with stack:
            if arena is not None:  # it is on this host; a mapping would count as this builder's memory, so it is read
                assert arena.info.fd is not None
                channel = stack.enter_context(channel_of_fd(arena.info.fd, like.record_bytes))
            assert channel is not None
            yield channel

    def _connect(self, number: int) -> Connection:
        connection = Connection(
            number,
            self._addresses[number],
            tls=self._tls,
            timeout_ms=_CALL_MS,
            options=self._options,
            fabric=None,
        )
        self._connections[number] = connection
        connection.choose("auto", self._device, self._no_device)
        if connection.view is not None:  # the upper layers of all shards would take too much memory
            connection.view.close()
            connection.view = None
        return connection

    def _renew(self) -> None:
        """Renews the leases until the end."""
        while not self._stop.wait(LEASE_S / 4):
            with self._lock:
                connections = list(self._connections.values())
            for connection in connections:
                with contextlib.suppress(CotraError):  # a READ will fail too, and report it
                    connection.renew()

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._renewing.join()
        for connection in self._connections.values():
            connection.close()
        if self._device is not None:
            self._device.close()
