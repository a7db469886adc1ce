"""A peer that is not ours: queue pairs made, connected and used through pyverbs alone."""

from __future__ import annotations

import sys
import time

sys.path.append("/usr/lib/python3/dist-packages")  # Debian's pyverbs; last, so that nothing else comes from there

from pyverbs.addr import GID, AHAttr, GlobalRoute
from pyverbs.cq import CQ
from pyverbs.device import Context
from pyverbs.enums import (
    IBV_ACCESS_LOCAL_WRITE,
    IBV_ACCESS_REMOTE_READ,
    IBV_QPT_RC,
    IBV_SEND_SIGNALED,
    IBV_WR_RDMA_READ,
)
from pyverbs.mr import MR
from pyverbs.pd import PD
from pyverbs.qp import QP, QPAttr, QPCap, QPInitAttr
from pyverbs.wr import SGE, SendWR

from cotra_rdma._native.verbs import QueuePairAttributes

PORT = 1
MTUS = {256: 1, 512: 2, 1024: 3, 2048: 4, 4096: 5}


class PyverbsQueuePair:
    """A reliable-connected queue pair in INIT, with its completion queue."""

    def __init__(self, context: Context, pd: PD, gid_index: int) -> None:
        self.pd = pd
        self.gid_index = gid_index
        self.context = context
        self.cq = CQ(context, 16)
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ
        capacity = QPCap(max_send_wr=16, max_recv_wr=1)
        self.qp = QP(pd, QPInitAttr(qp_type=IBV_QPT_RC, scq=self.cq, rcq=self.cq, cap=capacity), attributes)

    @property
    def local(self) -> QueuePairAttributes:
        """What the other side must know."""
        gid = bytes.fromhex(str(self.context.query_gid(PORT, self.gid_index).gid).replace(":", ""))
        return QueuePairAttributes(
            gid, self.qp.qp_num, packet_sequence=0, lid=0, mtu_bytes=4096, max_rd_atomic=16, max_init_rd_atomic=16
        )

    def connect(self, remote: QueuePairAttributes) -> None:
        """INIT -> RTR -> RTS."""
        gid = ":".join(remote.gid.hex()[i : i + 4] for i in range(0, 32, 4))
        route = GlobalRoute(dgid=GID(gid), sgid_index=self.gid_index, hop_limit=64)
        attributes = QPAttr(port_num=PORT)
        attributes.qp_access_flags = IBV_ACCESS_REMOTE_READ
        attributes.path_mtu = MTUS[min(remote.mtu_bytes, 4096)]
        attributes.dest_qp_num, attributes.rq_psn, attributes.sq_psn = remote.qp_number, remote.packet_sequence, 0
        attributes.max_dest_rd_atomic = attributes.max_rd_atomic = min(16, remote.max_rd_atomic)
        attributes.min_rnr_timer, attributes.rnr_retry = 12, 6
        attributes.timeout, attributes.retry_cnt = 14, 6
        attributes.ah_attr = AHAttr(port_num=PORT, is_global=1, gr=route)
        self.qp.to_rts(attributes)

    def read(self, addr: int, rkey: int, length: int, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """One RDMA READ: its completion status, and the bytes."""
        with MR(self.pd, length, IBV_ACCESS_LOCAL_WRITE) as landing:
            part = SGE(landing.buf, length, landing.lkey)
            request = SendWR(opcode=IBV_WR_RDMA_READ, num_sge=1, sg=[part], send_flags=IBV_SEND_SIGNALED)
            request.set_wr_rdma(rkey, addr)
            self.qp.post_send(request)
            deadline = time.monotonic() + timeout_s
            while time.monotonic() < deadline:
                n, completions = self.cq.poll()
                if n:
                    return completions[0].status, bytes(landing.read(length, 0))
        raise TimeoutError("no completion")

    def close(self) -> None:
        self.qp.close()
        self.cq.close()
