"""An owner whose registration and queue pairs are pyverbs', over an arena of this package. Lines of JSON in, lines out."""

from __future__ import annotations

import dataclasses
import json
import sys

from independent import PyverbsQueuePair
from pyverbs.device import Context
from pyverbs.pd import PD

import cotra_rdma
from cotra_rdma._native.verbs import QueuePairAttributes


def main(image: str, device: str, gid_index: str) -> None:
    with cotra_rdma.Shard.open(image) as shard, Context(name=device) as context, PD(context) as pd:
        registration = cotra_rdma.register(shard.pinned(), pd=pd)
        queue_pairs = []
        for line in sys.stdin:
            request = json.loads(line)
            if request.pop("do") == "deregister":
                registration.close()
                print("{}", flush=True)
                continue
            queue_pair = PyverbsQueuePair(context, pd, int(gid_index))
            queue_pairs.append(queue_pair)
            queue_pair.connect(QueuePairAttributes(gid=bytes.fromhex(request.pop("gid")), **request))
            local = dataclasses.asdict(queue_pair.local)
            local["gid"] = local["gid"].hex()
            print(
                json.dumps(
                    {
                        "queue_pair": local,
                        "region": {"addr": registration.addr, "rkey": registration.rkey, "len": registration.len},
                    }
                ),
                flush=True,
            )
        for queue_pair in queue_pairs:
            queue_pair.close()
        registration.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
