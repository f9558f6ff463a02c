#!/bin/sh
# Installs the Debian packages that sandloom runs and is built with, those that are missing only. Needs root then.
set -eu
. /etc/os-release
case "${VERSION_ID:-}" in
    12) msgpack=libmsgpack-dev ;;
    *) msgpack=libmsgpack-c-dev ;;
esac
wanted="python3 python3-venv python3-dev gcc libc6-dev make git qemu-system-x86 erofs-utils $msgpack pkg-config
    util-linux cpio clang-format mmdebstrap debian-archive-keyring libasan8 libubsan1 attr busybox-static skopeo umoci
    crun runsc iproute2 nftables etcd-server docker-registry
    nginx-light redis-server redis-tools curl openssl python3-requests"
# Debian starts and enables these at once; the tests and `dev up` start their own.
daemons="etcd docker-registry nginx redis-server"
missing=""
for package in $wanted; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || missing="$missing $package"
done
if [ -n "$missing" ]; then
    if [ "$(id -u)" != 0 ]; then
        echo "sandloom: these Debian packages are missing:$missing: run this as root" >&2
        exit 1
    fi
    echo "installing:$missing"
    apt-get update -qq
    if [ ! -e /usr/sbin/policy-rc.d ]; then # invoke-rc.d(8): 101 is "not allowed"
        trap 'rm -f /usr/sbin/policy-rc.d' EXIT
        printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
        chmod 755 /usr/sbin/policy-rc.d
    fi
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    for service in $daemons; do
        case "$missing" in
            *"$service"*) if [ -d /run/systemd/system ]; then systemctl disable --now --quiet "$service.service"; fi ;;
        esac
    done
elif ! apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; then
    apt-get update -qq # the guest kernel is fetched by package name
fi
