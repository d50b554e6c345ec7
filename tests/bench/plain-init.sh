#!/bin/sh
#
# /init as one would write it first, for the same initrd, disks and config.sh as the init that is shipped: each step is
# the command that comes to mind for it. It is what that one is measured against, and good for nothing else: it takes
# every disk for what its letter says, waits by sleeping, and checks next to nothing.
# shellcheck disable=SC2153 # config.sh sets these

set -x
export PATH=/bin:/sbin

stop() {
    echo "systemfiles: $1"
    poweroff -f
    sleep 60
}

# 1: the kernel's file systems and modules
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t cgroup2 cgroup2 /sys/fs/cgroup
while read -r module; do
    modprobe "$module"
done </etc/modules

# 2: the disks
sleep 0.5
for disk in /dev/vda /dev/vdb /dev/vdc; do
    [ -b "$disk" ] || stop "error: missing disk: $disk"
done

# 3: the overlay
mkdir -p /mnt/rootfs /mnt/overlay /mnt/config /mnt/root
for type in ext4 squashfs erofs; do
    mount -t "$type" -o ro /dev/vda /mnt/rootfs && break
done
mount -t ext4 /dev/vdb /mnt/overlay
mkdir -p /mnt/overlay/upper /mnt/overlay/work
mount -t overlay -o lowerdir=/mnt/rootfs,upperdir=/mnt/overlay/upper,workdir=/mnt/overlay/work overlay /mnt/root ||
    stop 'error: no root'

# 4: the config
mount -t ext4 -o ro /dev/vdc /mnt/config
# shellcheck source=/dev/null
. /mnt/config/config.sh || stop 'error: no config.sh'

# 5: the network
ip link set lo up
if [ -n "$GUEST_HOSTNAME" ]; then
    hostname "$GUEST_HOSTNAME"
    mkdir -p /mnt/root/etc
    echo "$GUEST_HOSTNAME" >/mnt/root/etc/hostname
    echo "127.0.0.1 localhost $GUEST_HOSTNAME" >/mnt/root/etc/hosts
fi
if [ -n "$GUEST_IP" ]; then
    ip addr add "$GUEST_IP/$GUEST_CIDR" dev eth0
    ip link set eth0 up
    ip route add default via "$GUEST_GW"
    for server in $GUEST_DNS; do
        echo "nameserver $server"
    done >/mnt/root/etc/resolv.conf
fi

# 6: volumes
for volume in $VOLUME_MOUNTS; do
    device=$(echo "$volume" | cut -d: -f1)
    path=$(echo "$volume" | cut -d: -f2)
    mode=$(echo "$volume" | cut -d: -f3)
    mkdir -p "/mnt/root$path"
    mount -t ext4 -o "$mode" "/dev/$device" "/mnt/root$path"
done

# 7: the kernel's file systems again, inside the image's root, and what is missing in its /dev
ln -s /proc/self/fd /dev/fd
ln -s /proc/self/fd/0 /dev/stdin
ln -s /proc/self/fd/1 /dev/stdout
ln -s /proc/self/fd/2 /dev/stderr
mkdir -p /mnt/root/proc /mnt/root/sys /mnt/root/dev
mount --move /dev /mnt/root/dev
mount --move /sys /mnt/root/sys
mount --move /proc /mnt/root/proc

# 8: the entrypoint
mkdir -p "/mnt/root${WORKDIR:-/}"
user=$(grep "^$RUN_AS:" /mnt/root/etc/passwd)
uid=$(echo "$user" | cut -d: -f3)
gid=$(echo "$user" | cut -d: -f4)
HOME=$(echo "$user" | cut -d: -f6)
export HOME
eval "export $ENVIRONMENT"
eval "set -- $ENTRYPOINT $CMD"
setsid nsenter -r/mnt/root -w"/mnt/root${WORKDIR:-/}" -S "$uid" -G "$gid" -- "$@" &
entrypoint=$!
trap 'kill -TERM $entrypoint' TERM INT
wait "$entrypoint"
stop "exit $?"
