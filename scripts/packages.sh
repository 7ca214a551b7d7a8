#!/bin/sh
# Debian packages that are needed and not there: install them as root, else print the one line that does.
#   packages.sh [demo|test|bench]
. "$(dirname -- "$0")/common.sh"

missing=

# need PACKAGE COMMAND...: any of the commands, or any of the files, will do
need() {
    package=$1
    shift
    for found in "$@"; do
        case $found in
            /*) [ -e "$found" ] && return ;;
            *) PATH=$PATH:/usr/sbin:/sbin command -v "$found" >/dev/null 2>&1 && return ;;
        esac
    done
    missing="$missing $package"
}

runtime() {
    # virtiofsd comes with it; without one volumes go by 9p. nftables and links are spoken to over netlink, without programs.
    [ -n "${TRIVISOR_QEMU:-}" ] || need qemu-system-x86 qemu-system-x86_64
    [ -n "${TRIVISOR_RUNSC:-}" ] || need runsc runsc
    need uidmap newuidmap
    need qemu-utils qemu-img
    need squashfs-tools sqfstar
    need mmdebstrap mmdebstrap
    need passt pasta
    need zstd zstd
    need e2fsprogs mkfs.ext4
}

build() {
    need gcc gcc
    need make make
    need binutils objcopy
    need libc6-dev /usr/lib/x86_64-linux-gnu/libc.a /usr/lib/libc.a /usr/lib64/libc.a
}

tests() {
    need clang clang
    need sqlite3 sqlite3
    # A real registry, and the other clients that read what we push to it.
    need docker-registry docker-registry
    need apache2-utils htpasswd
    need openssl openssl
    need skopeo skopeo
    need umoci umoci
    # The sanitizers' runtime is a package of its own.
    need libclang-rt-dev "$(clang -print-file-name=libclang_rt.fuzzer-x86_64.a 2>/dev/null || echo none)"
}

peers() {
    need bubblewrap bwrap
    need runc runc
    need strace strace
}

python() {
    "$root/scripts/python.sh" >/dev/null 2>&1 || missing="$missing python3 python3-venv"
}

build
python
case ${1:-demo} in
    demo) runtime ;;
    test) runtime && tests ;;
    bench) runtime && peers ;;
esac

[ -n "$missing" ] || exit 0
install="apt-get install -y --no-install-recommends$missing"
command -v apt-get >/dev/null 2>&1 || fail "these Debian packages, or what they are called here, are needed:$missing"
[ "$(id -u)" = 0 ] || fail "Some packages are missing. Run this line, then the same command again:
    sudo $install"
say "installing$missing"
DEBIAN_FRONTEND=noninteractive
export DEBIAN_FRONTEND
apt-get update -qq
# shellcheck disable=SC2086 # one word a package
$install -qq -o Dpkg::Use-Pty=0 >&2
