#!/bin/sh
#
# /init of a systemfiles initrd, version v1.0.0: an OCI image's root file system, made writable by an overlay, runs its
# entrypoint; the end of the entrypoint is the end of the machine. Nothing of the image is needed for that, not even a
# shell: every command here is the initrd's own busybox.
#
#   init (PID 1)         starts boot, forwards TERM and INT to the entrypoint, reaps orphans, switches the machine off
#     `-- boot           mounts and checks everything, moves the image's root over /, and becomes run
#           `-- run      this script once more, inside that root: finds and starts the entrypoint, notes how it ended
#                 `-- the entrypoint
#
# Disks are virtio block devices. Each is known by its serial or, when no disk has one of these serials, by its letter:
#   rootfs   vda   the image's root, never written: ext4, squashfs or erofs
#   overlay  vdb   writable, ext4: holds what the guest changes, in upper/ (and work/, which overlayfs needs)
#   config   vdc   never written, any of the three: holds config.sh
#
# config.sh is read by this shell, both in boot and in run, and assigns
#   ENTRYPOINT CMD   lists of words, each quoted for a shell; the command line is the one list and then the other.
#                      ENTRYPOINT="'/bin/sh' '-c'"
#                      CMD=\''echo "$HOME"'\'
#   ENVIRONMENT      such a list of NAME=VALUE words, where any name will do. They win over what config.sh exports, and
#                    that over the defaults of PATH and HOME; nothing else is in the entrypoint's environment.
#   WORKDIR          where the entrypoint starts, made if it is missing; / by default
# Names that begin with init_ belong to this script.
#
# The last that init writes on the console is           systemfiles: exit <status of the entrypoint>
# or 127 if that was not found, 126 if it cannot be executed, 125 for all else that fails; a line before it then is
#                                                       systemfiles: error: <what> (<why>)

# fail WHAT WHY [STATUS]: end boot or run, and with it the machine.
fail() {
    trap - EXIT
    echo "systemfiles: error: $1 ($2)"
    echo "${3:-125}" >"$init_run/status"
    if kernel_argument systemfiles.debug; then
        "$init_busybox" setsid "$init_busybox" cttyhack "$init_busybox" sh
    fi
    exit 1
}

# kernel_argument PATTERN: whether a word of the kernel's command line matches.
kernel_argument() {
    read -r init_cmdline 2>/dev/null </proc/cmdline || return
    # shellcheck disable=SC2254 # the pattern is meant as one
    case " $init_cmdline " in *\ $1\ *) return 0 ;; *) return 1 ;; esac
}

### init: the process that must not end ###

# The kernel panics when PID 1 ends, so what may go wrong is done by a child, config.sh included.
#
# The entrypoint cannot be a job of this shell: while a shell waits for a foreground job it holds back its traps, and
# a background job has INT and QUIT ignored for good. So the entrypoint is a grandchild, and the job waited for is a
# reader of /run/ended: it gets end-of-file when neither boot nor run is left to hold that open.
init() {
    mkfifo /run/ended
    : >/run/status
    (trap '' HUP TERM && read -r _ </run/ended) & # deaf to `kill -1`
    reader=$!
    trap 'forward TERM' TERM
    trap 'forward INT' INT
    (boot 3>/run/ended)
    while kill -0 "$reader" 2>/dev/null; do
        wait "$reader" # reaps whatever ends; a signal that is trapped interrupts it
    done
    read -r status </run/status || {
        status=125
        echo 'systemfiles: error: the end of the entrypoint was not seen (its keeper was killed)'
    }
    printf '\nsystemfiles: exit %s\n' "$status" # the entrypoint may have left a line unfinished
    switch_off
}

# forward SIGNAL: to the entrypoint, which may be about to start.
forward() {
    while ! [ -s /run/entrypoint ] && kill -0 "$reader" 2>/dev/null; do
        sleep 0.02
    done
    read -r pid 2>/dev/null </run/entrypoint && kill -s "$1" "$pid"
}

# Where nothing switches the power off, `poweroff` would halt for ever; a VMM without power management ends at a reset.
switch_off() {
    if kernel_argument 'reboot=[kt]*' || { ! [ -d /sys/firmware/acpi ] && ! [ -d /sys/firmware/devicetree ]; }; then
        reboot -f
    fi
    poweroff -f
    while :; do sleep 60; done
}

### boot: from the initrd to the image's root ###

boot() {
    mount_kernel_file_systems
    load_modules
    wait_for_disks 5
    merge_root
    read_config
    trap - EXIT
    PATH=/bin:/sbin
    refuse_what_is_to_come
    mount_kernel_file_systems_in_root
    enter_root
}

mount_kernel_file_systems() {
    echo 'proc /proc proc nosuid,nodev,noexec
sysfs /sys sysfs nosuid,nodev,noexec
devtmpfs /dev devtmpfs nosuid' >/run/fstab
    why=$(mount -a -T /run/fstab 2>&1) || fail 'cannot mount /proc, /sys and /dev' "$why"
    mkdir -p /dev/pts /dev/shm /run/rootfs /run/overlay /run/config /run/root
}

# /etc/modules holds the names to load, in order. With a kernel that has no modules there is no such file.
load_modules() {
    [ -s /etc/modules ] || return 0
    modules=
    while read -r module; do
        modules="$modules $module"
    done </etc/modules
    # One process loads them all. One by one is for a busybox whose modprobe lacks -a, and to name the one that fails.
    # shellcheck disable=SC2086 # a list of words
    modprobe -a $modules 2>/dev/null && return
    for module in $modules; do
        why=$(modprobe "$module" 2>&1) || fail "cannot load module $module" "$why"
    done
}

# wait_for_disks SECONDS: by the guest's clock, so that a slow emulator shortens nothing.
wait_for_disks() {
    read -r now _ </proc/uptime
    deadline=$((${now%.*} + $1))
    until find_disks; do
        read -r now _ </proc/uptime
        [ "${now%.*}" -lt "$deadline" ] || fail "missing disk:$missing" "waited $1 s, and there is:${found:- none}"
        sleep 0.02
    done
}

# Sets rootfs, overlay and config to names of devices. Fails while one of them is missing.
find_disks() {
    rootfs='' overlay='' config='' missing='' found=''
    for disk in /sys/block/vd*; do
        [ -d "$disk" ] || continue
        disk=${disk##*/}
        found="$found $disk"
        serial=''
        read -r serial 2>/dev/null <"/sys/block/$disk/serial" # `read` returns 1: there is no newline in it
        case $serial in
            rootfs) rootfs=$disk ;;
            overlay) overlay=$disk ;;
            config) config=$disk ;;
        esac
    done
    [ -n "$rootfs$overlay$config" ] || rootfs=vda overlay=vdb config=vdc
    [ -b "/dev/$rootfs" ] || missing="$missing rootfs"
    [ -b "/dev/$overlay" ] || missing="$missing overlay"
    [ -b "/dev/$config" ] || missing="$missing config"
    [ -z "$missing" ]
}

merge_root() {
    # Asked in this order, ext4 and squashfs decline in silence. The kernel itself loads what is named here.
    mount_disk rootfs "$rootfs" ext4,squashfs,erofs ro
    mount_disk config "$config" ext4,squashfs,erofs ro
    mount_disk overlay "$overlay" ext4 rw
    why=$(mkdir -p /run/overlay/upper /run/overlay/work 2>&1) || fail 'cannot write the overlay disk' "${why##*: }"
    layers=lowerdir=/run/rootfs,upperdir=/run/overlay/upper,workdir=/run/overlay/work
    why=$(mount -t overlay -o "$layers" overlay /run/root 2>&1) ||
        fail 'cannot lay the overlay over the root file system' "${why##*: }"
}

# mount_disk ROLE DEVICE TYPES OPTIONS: on /run/ROLE.
mount_disk() {
    why=$(mount -t "$3" -o "$4" "/dev/$2" "/run/$1" 2>&1) || fail "cannot mount the $1 disk $2" "as $3: ${why##*: }"
}

# A machine that lacks what its config asks for must not look as if it had it.
refuse_what_is_to_come() {
    [ -z "$GUEST_IP" ] || fail 'cannot set up the network' 'GUEST_IP is not supported yet'
    [ -z "$VOLUME_MOUNTS" ] || fail 'cannot mount the volumes' 'VOLUME_MOUNTS is not supported yet'
    [ -z "$INIT_MODE" ] || fail "cannot start the image's init" 'INIT_MODE is not supported yet'
    case $RUN_AS in '' | 0 | 0:0 | root) ;; *) fail "cannot run as $RUN_AS" 'RUN_AS is not supported yet' ;; esac
}

# New instances, not moved ones: init goes on to need those of the initrd.
mount_kernel_file_systems_in_root() {
    for directory in /run/root/proc /run/root/sys /run/root/dev; do
        [ -d "$directory" ] && continue
        why=$(mkdir "$directory" 2>&1) || fail "cannot make ${directory#/run/root} in the root" "${why##*: }"
    done
    echo 'proc /run/root/proc proc nosuid,nodev,noexec
sysfs /run/root/sys sysfs nosuid,nodev,noexec
devtmpfs /run/root/dev devtmpfs nosuid
devpts /run/root/dev/pts devpts nosuid,noexec,gid=5,mode=620,ptmxmode=666
tmpfs /run/root/dev/shm tmpfs nosuid,nodev,mode=1777' >/run/fstab
    while read -r _ type; do
        [ "$type" != cgroup2 ] || echo 'cgroup2 /run/root/sys/fs/cgroup cgroup2 nosuid,nodev,noexec' >>/run/fstab
    done </proc/filesystems
    why=$(mount -a -T /run/fstab 2>&1) || fail "cannot mount the image's /proc, /sys and /dev" "$why"
}

# With the new root moved over /, as switch_root does it, the image does not live in a mere chroot, where the kernel
# forbids user namespaces. init and the kernel's modprobe still have the initrd for their root, beneath it.
#
# setsid twice: the first makes this process lead a session, which the second cannot leave but by a fork. So run starts
# with the signals as the kernel made them, and boot ends.
enter_root() {
    cd /run/root || fail 'cannot enter the root' 'it is not a directory'
    why=$(mount -o move /run/root / 2>&1) || fail 'cannot move the root' "${why##*: }"
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        setsid setsid chroot . /proc/1/root/bin/busybox sh /proc/1/root/init run
}

### run: from the image's root to the entrypoint ###

run() {
    trap : HUP INT TERM # nor is a `kill -1` meant for the entrypoint's keeper
    read_config
    eval "set -- $ENVIRONMENT"
    for init_word; do
        case $init_word in PATH=*) PATH=${init_word#PATH=} ;; esac
    done
    eval "set -- $ENTRYPOINT $CMD"
    trap - EXIT
    [ $# -gt 0 ] || fail 'nothing to run' 'config.sh sets neither ENTRYPOINT nor CMD'
    enter_workdir "${WORKDIR:-/}"
    find_program "$1"
    shift
    (start "$@" 3>&-)
    echo $? >"$init_run/status"
}

# Leaves a trap that tells what is wrong with config.sh when that ends this shell; the caller removes it.
read_config() {
    unset ENTRYPOINT CMD ENVIRONMENT WORKDIR RUN_AS INIT_MODE GUEST_IP VOLUME_MOUNTS
    [ -f "$init_run/config/config.sh" ] || fail 'no config.sh' 'the config disk does not hold it'
    trap broken_config EXIT
    # shellcheck source=/dev/null
    . "$init_run/config/config.sh" 2>/dev/null
    unset IFS
}

broken_config() {
    init_why=$("$init_busybox" sh -n "$init_run/config/config.sh" 2>&1)
    fail 'config.sh is broken' "${init_why:-it ends the shell that reads it}"
}

enter_workdir() {
    cd "$1" 2>/dev/null && return
    init_why=$("$init_busybox" mkdir -p "$1" 2>&1) || fail "cannot make the working directory $1" "${init_why##*: }"
    cd "$1" || fail "cannot enter the working directory $1" 'it was made, and is not one'
}

# Sets init_program to a path with a slash, as a bare name may mean busybox's own applet to busybox.
find_program() {
    init_program=$1
    case $1 in
        */*) ;;
        *)
            IFS=: && set -f
            for init_directory in $PATH; do
                init_program=${init_directory:-.}/$1
                [ -f "$init_program" ] && [ -x "$init_program" ] && break
            done
            unset IFS
            ;;
    esac
    [ -e "$init_program" ] || fail "entrypoint $1 not found" "PATH is $PATH" 127
    [ -f "$init_program" ] || fail "cannot run entrypoint $1" 'it is not a file' 126
    [ -x "$init_program" ] || fail "cannot run entrypoint $1" 'it is not executable' 126
}

# start ARGUMENT...: become the entrypoint, in a session of its own. Without setsid between them, `env` would take a
# program with a = in its path for an assignment.
start() {
    read -r init_pid _ </proc/self/stat # $$ is the process this one was forked from
    echo "$init_pid" >"$init_run/entrypoint"
    eval "set -- $ENVIRONMENT "'"$init_busybox" setsid "$init_program" "$@"'
    exec "$init_busybox" env -u SHLVL -u PWD -u OLDPWD -- "$@"
}

# Not by its arguments: PID 1 has those that the kernel's command line gives it.
if [ $$ -eq 1 ]; then
    init_run=/run init_busybox=/bin/busybox PATH=/bin:/sbin
    init
else
    init_run=/proc/1/root/run init_busybox=/proc/1/root/bin/busybox
    run "$@"
fi
