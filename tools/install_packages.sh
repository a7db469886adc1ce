#!/bin/sh
# Installs the system's packages that are missing, where this is Debian or Ubuntu and root (or sudo without a password) is to
# be had. Elsewhere it names what is missing and goes on: what cannot run without it says so itself.
#   install_packages.sh build    a compiler, and Python's headers and venv
#   install_packages.sh test     that, libibverbs' header, and what the Soft-RoCE tier needs
set -eu

python=${PYTHON:-python3}
wanted=""
command -v cc >/dev/null || wanted="$wanted gcc"
command -v c++ >/dev/null || wanted="$wanted g++"
"$python" -c 'import ensurepip' 2>/dev/null || wanted="$wanted python3-venv"
"$python" -c 'import os, sysconfig; open(os.path.join(sysconfig.get_paths()["include"], "Python.h"))' 2>/dev/null ||
    wanted="$wanted python3-dev"
if [ "$1" = test ]; then
    wanted="$wanted gcc libibverbs-dev ibverbs-providers ibverbs-utils rdma-core perftest python3-pyverbs"
    wanted="$wanted qemu-system-x86 busybox-static kmod cpio iproute2"
fi
missing=""
for package in $wanted; do
    status=$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$status" = installed ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

if ! command -v apt-get >/dev/null; then
    echo "these packages are missing (by their Debian names):$missing" >&2
    exit 0
fi
if [ "$(id -u)" = 0 ]; then
    root=""
elif sudo -n true 2>/dev/null; then
    root="sudo"
else
    echo "missing packages; install them with: sudo apt-get install$missing" >&2
    exit 0
fi
echo "installing$missing"
export DEBIAN_FRONTEND=noninteractive
$root apt-get update -qq
# shellcheck disable=SC2086 # a list
$root apt-get install -qq -y --no-install-recommends $missing >/dev/null
