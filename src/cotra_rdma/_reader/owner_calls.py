"""`OwnerCalls`: the messages that a reader sends to one owner, and the checks of the answers."""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import numpy.typing as npt

from cotra_rdma._core.constants import METRICS
from cotra_rdma._core.image_identity import ImageIdentity
from cotra_rdma._core.remote_expansion import Expansions
from cotra_rdma._core.stats import STATS_DTYPE, unpack_stats
from cotra_rdma._core.stop import Stop
from cotra_rdma._core.tracing import Tracing
from cotra_rdma._reader.batch import Answer, Batch, CollectionAnswer, OutOfTimeError
from cotra_rdma._reader.counters import OK, OwnerCounts
from cotra_rdma.errors import DeadlineError, FormatError, InvalidInputError, PeerError, StaleShardError, TransportError
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.collection_search import CollectionResponse
from cotra_rdma.protocol.envelope import STALE, WIRE_VERSION, Payload, VShardEnvelope, VShardMessageType
from cotra_rdma.protocol.regions import (
    WANT_CAPABILITIES,
    WANT_QUEUE_PAIR,
    WANT_SHARED_MEMORY,
    WANT_VIEW,
    QueuePairFields,
    RegionRequest,
    RegionResponse,
    ShardFields,
    decode_region_response,
    encode_region,
)
from cotra_rdma.protocol.remote_expansion import ExpandRequest, ExpandResponse, split_pushes
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.search import WHOLE_COLLECTION, SearchRequest, SearchResponse, queries_per_message
from cotra_rdma.protocol.service import method_of
from cotra_rdma.protocol.tables import CoarseRouteRequest
from cotra_rdma.protocol.tls import Tls

_MAX_DIM = 4096
_MAX_RECORD_BYTES = 1 << 20


class OwnerCalls:
    """Calls one owner of a shard.

    Every error names the shard and the owner's address.
    Each answer is checked: it is about the image that the owner announced, and it fits the request.

    Attributes:
        shard: the shard's sizes, as `introduce` learned them.
        image: names the image that the owner announced.
    """

    shard: ShardFields
    image: ImageIdentity

    def __init__(
        self,
        index: int,
        address: str,
        *,
        tls: Tls | None,
        timeout_ms: int,
        counts: OwnerCounts,
        tracing: Tracing | None = None,
    ) -> None:
        """Prepares the calls. The first call connects.

        Args:
            index: the position of the shard in the cluster.
            address: HOST:PORT of the owner.
            tls: this reader's certificate, or None for a plain connection.
            timeout_ms: the time-out of each call that is not a search.
            counts: counts the calls.
            tracing: makes a span of each call in a search, or None.

        Raises:
            InvalidInputError: the address is malformed, or a file holds no certificate.
        """
        self._index, self._address = index, address
        self._timeout_ms = timeout_ms
        self._until = math.inf  # on time.monotonic's clock
        self._name = secrets.token_hex(8)  # the lease is in this name
        self._is_introduced = False
        self._counts, self._tracing = counts, tracing
        self._client = RpcClient(address, tls=tls, note=counts.note)

    def __str__(self) -> str:
        return f"shard {self._index} ({self._address})"

    def introduce(self) -> RegionResponse:
        """Asks what the owner serves. It is the first call, because the checks of all others need the answer.

        Returns:
            The owner's capabilities. Their `shard` is not None.

        Raises:
            TransportError: the owner cannot be reached.
            PeerError: the owner refused, or is of a version that does not name its image.
            FormatError: the answer is malformed, or announces sizes that no image has.
        """
        capabilities = self.ask(WANT_CAPABILITIES)
        shard = capabilities.shard
        if shard is None:
            raise FormatError(f"{self}: the answer does not describe the shard")
        if shard.identity is None:
            raise PeerError(
                f"{self}: its owner is of an earlier version, which does not tell its image from others: update it",
                shard=self._index,
            )
        _check_announced(self, self._index, shard)
        self.shard, self.image = shard, shard.identity
        self._is_introduced = True
        self._counts.note_reached(self.image)
        return capabilities

    # ---- calls ----

    @contextmanager
    def in_time(self) -> Iterator[None]:
        """Bounds all calls in the block together by the time-out of one call."""
        before, self._until = self._until, min(self._until, time.monotonic() + self._timeout_ms / 1000)
        try:
            yield
        finally:
            self._until = before

    @contextmanager
    def _counted(self, kind: VShardMessageType) -> Iterator[None]:
        """Counts a call, which the block makes and whose answer it checks. In a search it makes a span of the call, too."""
        begin, outcome = time.perf_counter(), OK
        try:
            with self._span(kind):
                yield
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            self._counts.calls.note(kind.name, outcome, time.perf_counter() - begin)

    def _span(self, kind: VShardMessageType) -> AbstractContextManager[object]:
        if self._tracing is None:
            return nullcontext()
        attributes = {"cotra.message_type": kind.name, "cotra.shard": self._index}
        return self._tracing.call(method_of(kind), *parse_address(self._address), attributes)

    def call(
        self, kind: VShardMessageType, payload: Payload, timeout_ms: int, stop: Stop | None = None
    ) -> VShardEnvelope:
        """Sends a request, and waits for its answer.

        Args:
            kind: the type of the request.
            payload: its payload.
            timeout_ms: the most milliseconds to wait.
            stop: ends the wait when it is set.

        Raises:
            TransportError: the owner cannot be reached, or is late.
            PeerError, FormatError, SearchCancelledError: as for `RpcClient.call`.
        """
        envelope = VShardEnvelope(WIRE_VERSION, kind, 0, 0, self._index, payload)
        try:
            headers = () if self._tracing is None else self._tracing.headers()
            return self._client.call(envelope, timeout_ms, stop, headers)
        except TransportError as error:
            hint = "" if self._is_introduced else " (is it an owner of cotra-rdma, and does it want a certificate?)"
            hint = "" if "nobody listens" in str(error) else hint
            what = str(error).removeprefix(self._address).lstrip()
            raise type(error)(f"{self}{'' if what.startswith(':') else ' '}{what}{hint}", shard=self._index) from None

    def ask(
        self,
        want: int,
        queue_pair: QueuePairFields | None = None,
        number: int = 0,
        timeout_ms: int | None = None,
        offset: int = 0,
    ) -> RegionResponse:
        """Sends a request of type 56.

        Args:
            want: what is asked for: one of the `WANT_` numbers.
            queue_pair, number, offset: fields of `RegionRequest`.
            timeout_ms: the most milliseconds to wait. None takes the time-out of a call.

        Raises:
            StaleShardError: the owner serves another image.
            PeerError: the owner refused.
            TransportError: the owner cannot be reached, or is late.
            FormatError: the answer is malformed.
        """
        image = self.image if want in (WANT_QUEUE_PAIR, WANT_SHARED_MEMORY, WANT_VIEW) else None
        request = RegionRequest(want, self._name, queue_pair, number, offset, image)
        kind = VShardMessageType.VECTOR_MEM_REGION_REQUEST
        with self._counted(kind):
            reply = self.call(kind, encode_region(request), timeout_ms or self._left_ms())
            answer = decode_region_response(reply.payload)
            self._check_code(answer.code, answer.message)
            if self._is_introduced and answer.shard != self.shard:
                raise self._stale(answer.shard.identity if answer.shard else None)
        return answer

    def _left_ms(self) -> int:
        left_s = self._until - time.monotonic()
        return self._timeout_ms if left_s == math.inf else max(1, min(self._timeout_ms, round(left_s * 1000)))

    def _check_code(self, code: int, message: str) -> None:
        """Checks the code of an answer.

        Raises:
            StaleShardError: the code says that the owner serves another image.
            PeerError: the code is any other error.
        """
        if code:
            raise (StaleShardError if code == STALE else PeerError)(f"{self}: {message}", shard=self._index)

    def _check_image(self, image: ImageIdentity | None) -> None:
        """Checks that an answer is about the image that this reader asked about.

        Raises:
            StaleShardError: it is not.
        """
        if image != self.image:
            raise self._stale(image)

    def _stale(self, image: ImageIdentity | None) -> StaleShardError:
        return stale_error(self, self._index, image, self.image)

    def coarse_table(self) -> Payload:
        """Asks for the coarse table. Returns a payload of type 53, which may be an error, because not every owner has one."""
        kind = VShardMessageType.VECTOR_COARSE_ROUTE_REQUEST
        with self._counted(kind):
            return self.call(kind, CoarseRouteRequest().encode(), self._left_ms()).payload

    # ---- searches ----

    def search(self, batch: Batch) -> Answer:
        """Has the owner search its shard. The batch is one message, or several if one would be too large.

        Args:
            batch: its filters and its mask are of this shard alone.

        Returns:
            ids int64[n_queries, k] (-1 in empty places), distances float32[n_queries, k] (inf there), and
            `STATS_DTYPE`[n_queries].

        Raises:
            StaleShardError: the owner serves another image.
            PeerError: the owner refused.
            OutOfTimeError: the batch's time was over before the owner was late.
            TransportError: the owner is gone or late.
            FormatError: an answer is malformed, or does not fit the request.
        """
        asked = np.arange(len(batch.queries)) if batch.mask is None else np.flatnonzero(batch.mask[:, 0])
        labels = np.full((len(batch.queries), batch.k), -1, np.int64)
        distances = np.full(labels.shape, np.inf, np.float32)
        stats = np.zeros(len(batch.queries), STATS_DTYPE)
        filtered = batch.filters is not None and batch.filters[0] is not None
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filtered)
        for begin in range(0, len(asked), rows):
            part = asked[begin : begin + rows]
            with self._counted(VShardMessageType.VECTOR_SCATTER_REQUEST):
                labels[part], distances[part], stats[part] = self._search_part(batch, batch.queries[part])
            batch.stop.note(len(part))
        batch.stop.note(len(batch.queries) - len(asked))
        return labels, distances, stats

    def _call_to_search(self, batch: Batch, request: bytes) -> VShardEnvelope:
        wait_s = batch.wait_s()
        try:
            return self.call(
                VShardMessageType.VECTOR_SCATTER_REQUEST, request, max(1, round(wait_s * 1000)), batch.stop
            )
        except DeadlineError:
            if batch.is_cut_short(wait_s):
                raise OutOfTimeError from None
            raise

    def _search_part(self, batch: Batch, queries: npt.NDArray[np.float32]) -> Answer:
        bitmap = None if batch.filters is None else batch.filters[0]
        request = SearchRequest(
            "", queries, batch.k, batch.ef, bitmap, batch.beam, most=batch.most or 0, image=self.image
        ).encode()
        begin = time.perf_counter_ns()
        reply = self._call_to_search(batch, request)
        answer = SearchResponse.decode(reply.payload)
        self._check_code(answer.code, answer.message)
        self._check_image(answer.image)
        try:
            answer.check(len(queries), batch.k)
            stats = unpack_stats(answer.stats, len(queries))
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self._index) from None
        if answer.incomplete is not None:
            stats["incomplete"] = answer.incomplete
        # What the owner read in its own memory crossed no network. The reader sent one message, which is one round.
        stats["reads"], stats["rounds"] = 0, 1
        stats["read_bytes"] = (len(request) + reply.payload_len) // len(queries)
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole message's: no query is answered before its end
        return answer.labels, answer.distances, stats

    def search_all(self, batch: Batch, images: Sequence[int] = ()) -> CollectionAnswer:
        """Has the owner search the whole collection. The messages are as in `search`.

        Args:
            batch: has no mask.
            images: if the batch has filters, the checksum of the image that each of them is for.

        Raises:
            InvalidInputError: the batch has a mask.
            PeerError: the owner has no connection to the other shards, or is of an earlier version.
            OutOfTimeError, TransportError, FormatError: as for `search`.
        """
        if batch.mask is not None:
            raise InvalidInputError("a search that a peer makes of the whole collection takes no mask")
        filters = None if batch.filters is None else tuple(zip(images, batch.filters, strict=True))
        rows = queries_per_message(batch.queries.shape[1], batch.k, batch.ef, filtered=filters is not None)
        starts = range(0, max(len(batch.queries), 1), rows)
        parts = []
        for begin in starts:
            part = batch.queries[begin : begin + rows]
            with self._counted(VShardMessageType.VECTOR_SCATTER_REQUEST):
                parts.append(self._search_all_part(batch, part, filters))
            batch.stop.note(len(part))
        if any(part.images != parts[0].images for part in parts):
            raise FormatError(f"{self}: its shards changed during the search", shard=self._index)
        failures = {shard: why for part in parts for shard, why in part.failures.items()}
        columns = zip(*((part.labels, part.distances, part.shards, part.stats) for part in parts), strict=True)
        labels, distances, shards, stats = (np.concatenate(column) for column in columns)
        return CollectionAnswer(labels, distances, shards, parts[0].images, stats, failures)

    def _search_all_part(
        self,
        batch: Batch,
        queries: npt.NDArray[np.float32],
        filters: tuple[tuple[int, bytes | None], ...] | None,
    ) -> CollectionAnswer:
        scope = WHOLE_COLLECTION
        wanted = SearchRequest("", queries, batch.k, batch.ef, None, batch.beam, scope, batch.most or 0, filters)
        request = wanted.encode()
        begin = time.perf_counter_ns()
        reply = self._call_to_search(batch, request)
        response = CollectionResponse.decode(reply.payload)
        answer = response.answer
        self._check_code(answer.code, answer.message)
        try:
            answer.check(len(queries), batch.k)
            stats = unpack_stats(answer.stats, len(queries), response.more_stats)
        except FormatError as error:
            raise FormatError(f"{self}: {error}", shard=self._index) from None
        stats["latency_ns"] = time.perf_counter_ns() - begin  # the whole message's, as in `search`
        images = tuple(response.images.tolist())
        return CollectionAnswer(answer.labels, answer.distances, response.shards, images, stats, response.failures)

    # ---- remote expansions ----

    def load_view(self) -> bytearray:
        """Loads the header and the navigation section, in pieces.

        Returns:
            The bytes of both, which are not validated.

        Raises:
            FormatError: the pieces do not fit each other.
            PeerError, StaleShardError, TransportError: as for `ask`.
        """
        data, length = bytearray(), 0
        while not data or len(data) < length:
            piece = self.ask(WANT_VIEW, offset=len(data)).view
            length = length or (piece.length if piece is not None else 0)
            left = length - len(data)
            if piece is None or piece.length != length or not 0 < len(piece.data) <= left <= self.shard.image_bytes:
                raise FormatError(f"{self}: a piece that does not fit its upper layers", shard=self._index)
            data += piece.data
        return data

    def expand(
        self,
        queries: npt.NDArray[np.float32],
        pushes: npt.NDArray[np.void],
        degree: int,
        timeout_s: float,
        stop: Stop | None = None,
    ) -> Expansions:
        """Has the owner expand nodes. The round is one message, or several if one would be too large.

        Args:
            queries: float32[n_queries, dim]. Only the queries that `pushes` names are sent.
            pushes: `PUSH_DTYPE`[n]. The pushes of one query follow each other.
            degree: the most neighbours of a node of the shard.
            timeout_s: the time-out of each message.
            stop: ends the wait for an answer.

        Returns:
            The expansions, in the order of `pushes`.

        Raises:
            TransportError: the owner is gone or late.
            PeerError: the owner refused.
            StaleShardError: the owner serves another image.
            FormatError: an answer is malformed, or does not fit the pushes.
            SearchCancelledError: `stop` was set.
        """
        parts = [
            self._expand_part(ExpandRequest.of(queries, pushes[part], self.image), degree, timeout_s, stop)
            for part in split_pushes(pushes, queries.shape[1], degree)
        ]
        return Expansions.joined(parts)

    def _expand_part(self, request: ExpandRequest, degree: int, timeout_s: float, stop: Stop | None) -> Expansions:
        kind = VShardMessageType.VECTOR_EXPAND_REQUEST
        with self._counted(kind):
            reply = self.call(kind, request.encode(), max(1, round(timeout_s * 1000)), stop)
            answer = ExpandResponse.decode(reply.payload)
            self._check_code(answer.code, answer.message)
            self._check_image(answer.image)
            found = answer.told.found
            if len(found) != len(request.pushes) or (found["count"] > degree).any():
                raise FormatError(
                    f"{self}: {len(found)} expansions of up to {found['count'].max(initial=0)} neighbours to "
                    f"{len(request.pushes)} nodes of {degree}",
                    shard=self._index,
                )
        return answer.told

    def close(self) -> None:
        """Closes the connection, and ends calls in progress. Idempotent."""
        self._client.close()


def stale_error(who: object, shard: int, serves: ImageIdentity | None, had: ImageIdentity) -> StaleShardError:
    """Makes the error of an owner that serves another image than at connect.

    Args:
        who: names the shard and its owner.
        shard: the position of the shard.
        serves: the image that the owner serves, or None if it does not say.
        had: the image at connect.
    """
    served = "an image that it does not name" if serves is None else serves
    return StaleShardError(f"{who} serves {served}, and had {had} when this reader connected", shard=shard)


def _check_announced(owner: OwnerCalls, index: int, shard: ShardFields) -> None:
    """Checks the sizes that an owner announced, before anything is allocated by them.

    Raises:
        FormatError: no image has such sizes.
    """
    for name, least, most in (
        ("dim", 1, _MAX_DIM),
        ("count", 0, 2**32),
        ("record_bytes", 1, _MAX_RECORD_BYTES),
        ("image_bytes", 1, 2**56),
        ("generation", 0, 2**64 - 1),
    ):
        if not least <= getattr(shard, name) <= most:
            raise FormatError(f"{owner}: it announces {name} {getattr(shard, name)}", shard=index)
    if shard.metric not in METRICS:
        raise FormatError(f"{owner}: it announces the metric {shard.metric[:20]!r}", shard=index)
