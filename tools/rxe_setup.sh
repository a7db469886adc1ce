#!/bin/sh
# Makes a Soft-RoCE device rxe0 on a veth pair, with the address 10.99.0.1; does nothing where it is there already.
# One device serves both ends: two rxe devices in one namespace cannot reach each other, for packets to a local address leave
# through lo, where no rxe is.
set -eu
[ ! -e /sys/class/infiniband/rxe0 ] || exit 0
modprobe rdma_rxe
modprobe ib_uverbs
ip link set lo up
[ -e /sys/class/net/veth0 ] || ip link add veth0 mtu 4200 type veth peer name veth1 mtu 4200
ip addr replace 10.99.0.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
rdma link add rxe0 type rxe netdev veth0
