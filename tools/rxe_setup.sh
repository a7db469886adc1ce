#!/bin/sh
# Makes a Soft-RoCE device rxe0 on a veth pair, with the address 10.99.0.1: in a virtual machine, or in a network namespace.
# One device serves both ends: two rxe devices in one namespace cannot reach each other, for packets to a local address leave
# through lo, where no rxe is.
set -eu
modprobe rdma_rxe
modprobe ib_uverbs
ip link set lo up
ip link add veth0 mtu 4200 type veth peer name veth1 mtu 4200
ip addr add 10.99.0.1/24 dev veth0
ip link set veth0 up
ip link set veth1 up
rdma link add rxe0 type rxe netdev veth0
