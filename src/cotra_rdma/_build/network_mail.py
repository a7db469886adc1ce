"""Builders on machines of their own: messages as envelopes (types 54, 55), and how one notices that another is gone.

A message goes to a peer until the peer has acknowledged it; the same one twice is one. Who waits for a peer's message asks it
now and then whether it lives, and gives up when it has been silent for too long. Who fails tells all.
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

from cotra_rdma._build.mail import told
from cotra_rdma.errors import CotraError, DeadlineError, FormatError, InvalidInputError, PeerError, TransportError
from cotra_rdma.protocol.tables import BuildExchangeRequest, BuildExchangeResponse
from cotra_rdma.protocol.address import parse_address
from cotra_rdma.protocol.rpc_client import RpcClient
from cotra_rdma.protocol.tls import Tls
from cotra_rdma.protocol.envelope import WIRE_VERSION, VShardEnvelope, VShardMessageType, decode_array, encode_array

PART_BYTES = 4 << 20
"""Longer messages go in parts."""
_MAX_PARTS = 32768
_CALL_S = 2.0
_ASK_S = 1.0  # between two questions to a peer that is waited for
_RETRY_S = 0.05  # between two attempts to reach one that refuses
_LAST_WORD_MS = 500
_ALIVE, _FAILED = "alive", "failed"
_LAST = ("link", "calibrate")
_ONCE = ("divide", "evidence")  # that are heard once, and are large


class _Part(msgspec.Struct, frozen=True):
    """The map behind every message: part `part` of `parts` of the sender's map, and a name for the sender's run."""

    run: str
    step: str
    part: int
    parts: int
    data: bytes


class _Failure(msgspec.Struct, frozen=True):
    """The content of `failed`: the shard that it is about, if one, and what went wrong."""

    shard: int | None
    message: str


@dataclass(slots=True)
class _Incoming:
    parts: dict[int, bytes] = field(default_factory=dict)
    table: BuildExchangeRequest | None = None


class NetworkMail:
    """A `Mail` between machines. `take` and `answer` may be called from any thread, the rest from one.

    Args:
        number: of this builder's shard.
        addresses: HOST:PORT of each builder, in the order of the shards.
        timeout_s: the longest silence of another builder.
        tls: this builder's certificate; None where the others want none.
    """

    def __init__(
        self,
        number: int,
        addresses: Sequence[str],
        *,
        timeout_s: float,
        tls: Tls | None = None,
    ) -> None:
        self._number, self._addresses, self._timeout_s = number, list(addresses), timeout_s
        self._tls = tls
        self._run = secrets.token_hex(8)
        self._changed = threading.Condition()
        self._incoming: dict[tuple[str, int], _Incoming] = {}
        self._whole: dict[tuple[str, int], BuildExchangeRequest] = {}
        self._runs: dict[int, str] = {}
        self._heard = [time.monotonic()] * len(self._addresses)
        self._failure: PeerError | None = None
        self._clients: dict[int, RpcClient] = {}

    def _name(self, number: int) -> str:
        return f"shard {number} ({self._addresses[number]})"

    # ---- hearing ----

    def take(self, request: BuildExchangeRequest) -> None:
        """Takes a message of a peer's in. Raises `InvalidInputError`, `FormatError`."""
        sender, part = request.shard, told(request, _Part)
        if not 0 <= sender < len(self._addresses) or sender == self._number:
            raise InvalidInputError(f"shard {sender} is none of the others of {len(self._addresses)}")
        if not 0 <= part.part < part.parts <= _MAX_PARTS:
            raise FormatError(f"part {part.part} of {part.parts}")
        with self._changed:
            if self._runs.setdefault(sender, part.run) != part.run:
                raise InvalidInputError(
                    f"{self._name(sender)} was started anew in the middle of a build: start all anew"
                )
            self._heard[sender] = time.monotonic()
            if part.step == _FAILED:
                why = decode_array(part.data, _Failure, "a builder's last word")
                culprit = sender if why.shard is None else why.shard
                self._failure = PeerError(f"{self._name(sender)} gave up: {why.message}", shard=culprit)
            elif part.step != _ALIVE and (part.step, sender) not in self._whole:
                incoming = self._incoming.setdefault((part.step, sender), _Incoming())
                incoming.parts[part.part] = part.data
                if part.part == 0:
                    incoming.table = request
                if len(incoming.parts) == part.parts and incoming.table is not None:
                    data = b"".join(data for _, data in sorted(incoming.parts.items()))
                    content = decode_array(data, dict[str, object], f"{part.step} of {self._name(sender)}")
                    self._whole[part.step, sender] = replace(incoming.table, told=content)
                    del self._incoming[part.step, sender]
            self._changed.notify_all()

    def answer(self, request: VShardEnvelope) -> VShardEnvelope:
        """Answers an envelope, as `rpc.Handler`. Only messages of builders are answered."""
        if request.msg_type != VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST:
            raise FormatError(f"a builder that serves no shard yet takes no message of type {request.msg_type}")
        response = BuildExchangeResponse()
        try:
            self.take(BuildExchangeRequest.decode(request.payload))
        except CotraError as error:
            response = BuildExchangeResponse(1, str(error))
        return VShardEnvelope(
            WIRE_VERSION,
            request.msg_type.response,
            request.target_node,
            request.source_node,
            request.vshard_id,
            response.encode(),
        )

    def hear(self, step: str, sender: int) -> BuildExchangeRequest:
        """Waits for a message.

        Raises:
            DeadlineError: the sender was silent for too long. PeerError: it ended, or a builder gave up. Both name the shard.
        """
        key = (step, sender)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: key in self._whole or self._failure, _ASK_S)
                if self._failure:
                    raise self._failure
                if key in self._whole:
                    return self._whole.pop(key) if step in _ONCE else self._whole[key]
            with contextlib.suppress(DeadlineError):
                self._call(sender, self._part(_ALIVE, b""), _CALL_S)
            self._check_silence(sender)

    def _check_silence(self, number: int) -> None:
        if number in self._runs and self._refuses(number):
            self._check_failure()  # it may have said why
            raise PeerError(f"{self._name(number)}: its builder ended: nobody listens there any more", shard=number)
        silent_s = time.monotonic() - self._heard[number]
        if silent_s > self._timeout_s:
            raise DeadlineError(
                f"{self._name(number)} has been silent for {silent_s:.0f} s: its builder ended, or cannot be reached",
                shard=number,
            )

    def _refuses(self, number: int) -> bool:
        try:
            socket.create_connection(parse_address(self._addresses[number]), _CALL_S).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    # ---- telling ----

    def _part(
        self, step: str, data: bytes, part: int = 0, parts: int = 1, whole: BuildExchangeRequest | None = None
    ) -> bytes:
        content = msgspec.to_builtins(_Part(self._run, step, part, parts, data), builtin_types=(bytes,))
        if whole is not None and part == 0:
            return replace(whole, told=content).encode()
        return BuildExchangeRequest.empty(self._number, content).encode()

    def tell(self, message: BuildExchangeRequest, to: int | None = None) -> None:
        """Delivers a message to one builder, or to all.

        Raises:
            DeadlineError: one could not be reached for too long. PeerError: it refused the message, or a builder gave up.
        """
        assert message.told is not None
        step, data = str(message.told["step"]), encode_array(message.told)
        parts = max(1, -(-len(data) // PART_BYTES))
        for receiver in range(len(self._addresses)) if to is None else (to,):
            if receiver == self._number:
                with self._changed:
                    self._whole[step, self._number] = message
                continue
            for part in range(parts):
                piece = data[part * PART_BYTES : (part + 1) * PART_BYTES]
                payload = self._part(step, piece, part, parts, message)
                while not self._delivered(receiver, payload) and not self._is_done(receiver, step):
                    self._check_silence(receiver)
                    with self._changed:  # who does not listen yet refuses at once
                        self._changed.wait_for(lambda: self._failure, _RETRY_S)

    def _is_done(self, receiver: int, step: str) -> bool:
        """Whether a builder that does not answer has ended because it heard all that it waited for: its answer was lost."""
        return step in _LAST and ("link", receiver) in self._whole and self._refuses(receiver)

    def _check_failure(self) -> None:
        with self._changed:
            if self._failure:
                raise self._failure

    def _delivered(self, receiver: int, payload: bytes) -> bool:
        self._check_failure()
        try:
            self._call(receiver, payload, _CALL_S)
        except DeadlineError:
            return False
        return True

    def _call(self, receiver: int, payload: bytes, timeout_s: float) -> None:
        """Raises `DeadlineError` where there is no answer in time, `PeerError` for a refusal."""
        client = self._clients.pop(receiver, None) or RpcClient(self._addresses[receiver], tls=self._tls)
        envelope = VShardEnvelope(
            WIRE_VERSION, VShardMessageType.VECTOR_BUILD_EXCHANGE_REQUEST, self._number, receiver, receiver, payload
        )
        try:
            reply = client.call(envelope, round(timeout_s * 1000))
        except (TransportError, FormatError) as error:
            client.close()  # and with it what was not sent
            raise DeadlineError(f"{self._name(receiver)}: {error}", shard=receiver) from error
        self._clients[receiver] = client
        response = BuildExchangeResponse.decode(reply.payload)
        if response.code:
            raise PeerError(f"{self._name(receiver)}: {response.message}", shard=receiver)
        with self._changed:
            self._heard[receiver] = time.monotonic()

    def fail(self, why: BaseException) -> None:
        """Tells the others that this builder gives up; those that do not answer at once find out by themselves."""
        last = _Failure(getattr(why, "shard", None), f"{type(why).__name__}: {why}"[:1000])
        payload = self._part(_FAILED, msgspec.msgpack.encode(last))
        for receiver in range(len(self._addresses)):
            if receiver != self._number:
                with contextlib.suppress(CotraError):
                    self._call(receiver, payload, _LAST_WORD_MS / 1000)

    def close(self) -> None:
        """Closes the connections."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()
