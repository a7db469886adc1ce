"""How builders on different machines exchange messages, and how a builder notices that another one is gone.

Messages travel in envelopes of types 54 and 55 (docs/reference/wire.md).
Builders meet first: each asks every other one, at its address, for the random name of its run.
It takes a message of that run only, so nobody else can send one in a builder's name.
A message is sent again until the receiver acknowledges it; the receiver ignores a message that it already has.
A builder that waits for a message regularly asks the sender whether it is alive.
It gives up if the sender is silent for too long.
A builder that fails sends the reason to all others.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from cotra_rdma._build.mail import AnyMessage, EvidenceMessage, M, Message, RowsMessage, step_of
from cotra_rdma.errors import (
    BusyError,
    CotraError,
    DeadlineError,
    FormatError,
    InvalidInputError,
    PeerError,
    TransportError,
)
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, decode_array, encode_array
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.tables import BuildExchangeRequest, BuildExchangeResponse, CentroidTable
from cotra_rdma.protocol.tls import Tls

PART_BYTES = 4 << 20
"""The length of a part of a message, in bytes. Longer messages are sent in parts."""
_MAX_PARTS = 32768
_CALL_S = 2.0
_ASK_S = 1.0  # between two questions to a builder whose message is awaited
_RETRY_S = 0.05  # between two attempts to reach a builder that refuses connections
_LAST_WORD_MS = 500
_ALIVE, _FAILED = "alive", "failed"
_TAKEN, _REFUSED, _NOT_MET = 0, 1, 2  # codes of answers
_LAST = ("link", "calibrate")
_RECEIVED_ONCE = (RowsMessage, EvidenceMessage)  # large messages, which are dropped when they are received


class _Part(msgspec.Struct, frozen=True):
    """The map behind every table message.

    Attributes:
        run: a random name for the sender's run.
        step: the kind of the message.
        part: the number of this part, of `parts`.
        data: the bytes of this part.
    """

    run: str
    step: str
    part: int
    parts: int
    data: bytes


class _Failure(msgspec.Struct, frozen=True):
    """The last message of a builder that fails: the shard that the failure concerns, if any, and the reason."""

    shard: int | None
    message: str


@dataclass(slots=True)
class _Incoming:
    """The parts of a message that have arrived."""

    parts: dict[int, bytes] = field(default_factory=dict)
    table: CentroidTable | None = None


class NetworkMail:
    """The `Mail` of builders on different machines.

    `take` and `answer` may be called from any thread, and all other methods from one thread.

    Args:
        number: the number of this builder's shard.
        addresses: HOST:PORT of each builder, in the order of the shards.
        timeout_s: the longest silence of another builder, in seconds.
        tls: this builder's certificate, or None if the others need none.
        part_bytes: the length of a part of a message.
    """

    def __init__(
        self,
        number: int,
        addresses: Sequence[str],
        *,
        timeout_s: float,
        tls: Tls | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._number, self._addresses, self._timeout_s = number, list(addresses), timeout_s
        self._tls = tls
        self._part_bytes = part_bytes
        self._run = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        self._whole: dict[tuple[str, int], tuple[Message, CentroidTable]] = {}
        self._runs: dict[int, str] = {}  # of builders that were met
        self._last_contact = [time.monotonic()] * len(self._addresses)
        self._failure: PeerError | None = None
        self._clients: dict[int, RpcClient] = {}

    def _name(self, number: int) -> str:
        return f"shard {number} ({self._addresses[number]})"

    # ---- receiving ----

    def take(self, request: BuildExchangeRequest) -> None:
        """Takes in a part of another builder's message.

        Raises:
            InvalidInputError: the sender is not another builder of this build, or it was restarted.
            BusyError: the sender was not met yet; it may send the part again.
            FormatError: the part is malformed.
        """
        sender = request.shard
        try:
            part = msgspec.convert(request.told, _Part, builtin_types=(bytes,))
        except msgspec.ValidationError as error:
            raise FormatError(f"a message of shard {sender} is malformed: {error}") from error
        if not 0 <= sender < len(self._addresses) or sender == self._number:
            raise InvalidInputError(
                f"shard {sender} is not another builder's shard (expected 0 to {len(self._addresses) - 1}, "
                f"other than {self._number})"
            )
        if not 0 <= part.part < part.parts <= _MAX_PARTS:
            raise FormatError(f"a message of shard {sender} cannot have a part {part.part} of {part.parts}")
        with self._changed:
            run = self._runs.get(sender)
            if run is None:
                if part.step == _ALIVE:
                    return
                raise BusyError(f"{self._name(sender)} was not met yet")
            if part.run != run:
                raise InvalidInputError(self._started_anew(sender))
            self._last_contact[sender] = time.monotonic()
            if part.step == _FAILED:
                why = decode_array(part.data, _Failure, f"the failure of {self._name(sender)}")
                culprit = sender if why.shard is None else why.shard
                self._failure = PeerError(f"{self._name(sender)} gave up: {why.message}", shard=culprit)
            elif part.step != _ALIVE and (part.step, sender) not in self._whole:
                self._add_part(part, sender, request.table)
            self._changed.notify_all()

    def _started_anew(self, number: int) -> str:
        return f"{self._name(number)} was started anew in the middle of a build: start all builders anew"

    def _add_part(self, part: _Part, sender: int, table: CentroidTable) -> None:
        """Adds a part to its message, and decodes the message if all parts are there."""
        key = part.step, sender
        incoming = self._incoming.setdefault(key, _Incoming())
        incoming.parts[part.part] = part.data
        if part.part == 0:
            incoming.table = table
        if len(incoming.parts) < part.parts or incoming.table is None:
            return
        del self._incoming[key]
        data = b"".join(data for _, data in sorted(incoming.parts.items()))
        message: Message = decode_array(data, AnyMessage, f"message {part.step} of {self._name(sender)}")
        if step_of(type(message)) != part.step:
            raise FormatError(f"message {part.step} of {self._name(sender)} holds a {step_of(type(message))}")
        self._whole[key] = message, incoming.table

    def answer(self, request: VShardEnvelope) -> VShardEnvelope:
        """Answers an envelope, as an `rpc.Handler`.

        Raises:
            FormatError: the envelope holds no message of a builder.
        """
        if request.msg_type != VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST:
            raise FormatError(f"a builder that serves no shard yet takes no message of type {request.msg_type}")
        response = BuildExchangeResponse(_TAKEN, self._run)
        try:
            self.take(BuildExchangeRequest.decode(request.payload))
        except BusyError:
            response = BuildExchangeResponse(_NOT_MET, self._run)
        except CotraError as error:
            response = BuildExchangeResponse(_REFUSED, str(error))
        return VShardEnvelope(
            WIRE_VERSION,
            request.msg_type.response,
            request.target_node,
            request.source_node,
            request.vshard_id,
            response.encode(),
        )

    def receive(self, kind: type[M], sender: int) -> tuple[M, CentroidTable]:
        """Waits for a message. See `Mail`.

        Raises:
            DeadlineError: the sender was silent for too long. The error names the shard.
            PeerError: the sender ended, or a builder gave up. The error names the shard.
        """
        key = (step_of(kind), sender)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: key in self._whole or self._failure, _ASK_S)
                if self._failure:
                    raise self._failure
                if key in self._whole:
                    message, table = self._whole.pop(key) if kind in _RECEIVED_ONCE else self._whole[key]
                    assert isinstance(message, kind)
                    return message, table
            with contextlib.suppress(DeadlineError):
                self._call(sender, self._payload(_ALIVE, b""), _CALL_S)
            self._check_silence(sender)

    def _check_silence(self, number: int) -> None:
        if number in self._runs and self._refuses(number):
            self._check_failure()  # it may have sent the reason
            raise PeerError(
                f"{self._name(number)}: its builder ended, and nothing listens at its address any more", shard=number
            )
        silent_s = time.monotonic() - self._last_contact[number]
        if silent_s > self._timeout_s:
            raise DeadlineError(
                f"{self._name(number)} has been silent for {silent_s:.0f} s: its builder ended, or cannot be reached",
                shard=number,
            )

    def _refuses(self, number: int) -> bool:
        """Returns whether a builder's host refuses connections to its port."""
        try:
            socket.create_connection(parse_address(self._addresses[number]), _CALL_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    # ---- sending ----

    def _payload(
        self, step: str, data: bytes, part: int = 0, parts: int = 1, table: BuildExchangeRequest | None = None
    ) -> bytes:
        content = msgspec.to_builtins(_Part(self._run, step, part, parts, data), builtin_types=(bytes,))
        if table is not None and part == 0:
            return replace(table, told=content).encode()
        return BuildExchangeRequest.empty(self._number, content).encode()

    def meet(self) -> None:
        """Waits for all other builders to listen, and learns their runs.

        Raises:
            DeadlineError: a builder could not be reached for too long.
        """
        payload = self._payload(_ALIVE, b"")
        for receiver in range(len(self._addresses)):
            while receiver != self._number and receiver not in self._runs:
                self._delivered(receiver, payload)
                self._check_silence(receiver)

    def send(self, message: Message, to: int | None = None, table: BuildExchangeRequest | None = None) -> None:
        """Delivers a message to one builder, or to all. See `Mail`.

        Raises:
            DeadlineError: a receiver could not be reached for too long.
            PeerError: a receiver refused the message, or a builder gave up.
        """
        step, data = step_of(type(message)), encode_array(message)
        parts = max(1, -(-len(data) // self._part_bytes))
        for receiver in range(len(self._addresses)) if to is None else (to,):
            if receiver == self._number:
                with self._changed:
                    self._whole[step, receiver] = message, CentroidTable.empty() if table is None else table.table
                continue
            for part in range(parts):
                piece = data[part * self._part_bytes : (part + 1) * self._part_bytes]
                payload = self._payload(step, piece, part, parts, table)
                while not self._delivered(receiver, payload) and not self._is_done(receiver, step):
                    self._check_silence(receiver)

    def _is_done(self, receiver: int, step: str) -> bool:
        """Returns whether a receiver that does not answer has ended well.

        It ends when it has all messages that it waited for. Then only its acknowledgement was lost.
        """
        return step in _LAST and ("link", receiver) in self._whole and self._refuses(receiver)

    def _check_failure(self) -> None:
        with self._changed:
            if self._failure:
                raise self._failure

    def _delivered(self, receiver: int, payload: bytes) -> bool:
        """Calls a builder once, and waits a little if it did not take the payload."""
        self._check_failure()
        try:
            self._call(receiver, payload, _CALL_S)
        except DeadlineError:
            with self._changed:  # a builder that does not listen yet refuses at once
                self._changed.wait_for(lambda: self._failure, _RETRY_S)
            return False
        return True

    def _call(self, receiver: int, payload: bytes, timeout_s: float) -> None:
        """Sends a payload and waits for the acknowledgement.

        Raises:
            DeadlineError: there was no answer in time, or the receiver has not met this builder yet.
            PeerError: the receiver refused the payload.
        """
        client = self._clients.pop(receiver, None) or RpcClient(self._addresses[receiver], tls=self._tls)
        envelope = VShardEnvelope(
            WIRE_VERSION, VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST, self._number, receiver, receiver, payload
        )
        try:
            reply = client.call(envelope, round(timeout_s * 1000))
        except (TransportError, FormatError) as error:
            client.close()  # which also drops what was not sent
            raise DeadlineError(f"{self._name(receiver)}: {error}", shard=receiver) from error
        self._clients[receiver] = client
        response = BuildExchangeResponse.decode(reply.payload)
        if response.code == _REFUSED:
            raise PeerError(f"{self._name(receiver)}: {response.message}", shard=receiver)
        with self._changed:
            self._last_contact[receiver] = time.monotonic()
            run = response.message  # "" once it serves its shard: it met all others before
            if run and self._runs.setdefault(receiver, run) != run:
                raise PeerError(self._started_anew(receiver), shard=receiver)
        if response.code == _NOT_MET:
            raise DeadlineError(f"{self._name(receiver)} has not met this builder yet", shard=receiver)

    def fail(self, why: BaseException) -> None:
        """Sends all others the reason why this builder gives up.

        A builder that does not answer at once is skipped. It notices by itself that this builder is gone.
        """
        last = _Failure(getattr(why, "shard", None), f"{type(why).__name__}: {why}"[:1000])
        payload = self._payload(_FAILED, encode_array(last))
        for receiver in range(len(self._addresses)):
            if receiver != self._number:
                with contextlib.suppress(CotraError):
                    self._call(receiver, payload, _LAST_WORD_MS / 1000)

    def close(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
