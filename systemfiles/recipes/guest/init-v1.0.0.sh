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
# Disks are virtio block devices. Each is known by its serial or, when no disk has one of these serials, by its letter.
# A disk with a serial of another name is a volume, whatever its letter.
#   rootfs   vda   the image's root, never written: ext4, squashfs or erofs
#   overlay  vdb   writable, ext4: holds what the guest changes, in upper/; overlayfs needs work/, and space is an empty
#                  file
#   config   vdc   never written, any of the three: holds config.sh
#
# config.sh is read by this shell, both in boot and in run, and assigns
#   ENTRYPOINT CMD   lists of words, each quoted for a shell; the command line is the one list and then the other.
#                      ENTRYPOINT="'/bin/sh' '-c'"
#                      CMD=\''echo "$HOME"'\'
#   ENVIRONMENT      such a list of NAME=VALUE words, where any name will do. They win over what config.sh exports, and
#                    that over the defaults of PATH and HOME; nothing else is in the entrypoint's environment.
#   WORKDIR          where the entrypoint starts, made if it is missing; / by default
#   RUN_AS           user[:group], each a name that the image's /etc/passwd or /etc/group has, or a number; root by
#                    default. Without a group, the user's own and those that list the user.
#   STOP_SIGNAL      the number of the signal that the entrypoint gets for TERM
#   GUEST_IP         the address of eth0, with the length of its prefix in GUEST_CIDR or its mask in GUEST_MASK
#   GUEST_GW         where the default route leads
#   GUEST_DNS        name servers for /etc/resolv.conf, between spaces
#   GUEST_HOSTNAME
#   VOLUME_MOUNTS    device:path:mode[:overlay_device] between spaces, where a device is a name, a path or a serial.
#                    The mode is ro, rw, or overlay: only read, while what changes goes to the overlay device.
#   INIT_MODE        systemd: PID 1 becomes the image's /sbin/init, with ENVIRONMENT; init's part ends there
# Names that begin with init_ belong to this script.
#
# The last that init writes on the console is           systemfiles: exit <status of the entrypoint>
# or 127 if that was not found, 126 if it cannot be executed, 125 for all else that fails; a line before it then is
#                                                       systemfiles: error: <what> (<why>)

init_patience=5
init_newline='
'

# fail WHAT WHY [STATUS]: end boot or run, and with it the machine.
fail() {
    trap - EXIT
    # In one line that can do a terminal no harm, though a name may hold anything.
    init_line=$(printf '%s' "$1 ($2)" | "$init_busybox" tr '\001-\037\177' ' ')
    printf 'systemfiles: error: %s\n' "$init_line"
    echo "${3:-125}" >"$init_run/status"
    if kernel_argument systemfiles.debug; then
        "$init_busybox" setsid "$init_busybox" cttyhack "$init_busybox" sh
    fi
    exit 1
}

# try WHAT APPLET ARGUMENT...: or fail, for the reason that the applet gives last.
try() {
    init_what=$1
    shift
    # shellcheck disable=SC2086 # it may be no word at all
    init_why=$($init_applet "$@" 2>&1) && return
    init_why=${init_why%%"$init_newline"*}
    fail "$init_what" "${init_why##*: }"
}

# kernel_argument PATTERN: whether a word of the kernel's command line matches.
kernel_argument() {
    read -r init_cmdline 2>/dev/null </proc/cmdline || return
    # shellcheck disable=SC2254 # the pattern is meant as one
    case " $init_cmdline " in *\ $1\ *) return 0 ;; *) return 1 ;; esac
}

# Leaves a trap that tells what is wrong with config.sh when that ends this shell; the caller removes it.
read_config() {
    # None of it may come from the environment, into which the kernel puts words of its command line.
    unset ENTRYPOINT CMD ENVIRONMENT WORKDIR RUN_AS STOP_SIGNAL INIT_MODE VOLUME_MOUNTS \
        GUEST_IP GUEST_CIDR GUEST_MASK GUEST_GW GUEST_DNS GUEST_HOSTNAME
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

# each_volume FUNCTION: call it with DEVICE PATH MODE [OVERLAY_DEVICE] for each of VOLUME_MOUNTS. init_number counts.
each_volume() {
    init_number=0
    set -f
    for init_volume in $VOLUME_MOUNTS; do
        init_number=$((init_number + 1))
        IFS=: && set -f
        # shellcheck disable=SC2086 # to be split
        set -- "$1" $init_volume
        unset IFS && set +f
        "$@"
    done
    set +f
}

### run: from the image's root to the entrypoint ###

# shellcheck disable=SC2120 # it makes arguments of its own
run() {
    trap : HUP INT TERM # nor is a `kill -1` meant for the entrypoint's keeper
    read_config
    eval "set -- $ENVIRONMENT"
    for init_word; do
        case $init_word in
            PATH=*) PATH=${init_word#PATH=} ;;
            [!=]*=*) ;;
            *) fail 'bad ENVIRONMENT' "$init_word is not NAME=VALUE" ;;
        esac
    done
    eval "set -- $ENTRYPOINT $CMD"
    trap - EXIT
    each_volume bind_volume
    write_names # one of them may be on /etc
    if [ "$INIT_MODE" = systemd ]; then
        find_program /sbin/init
        printf 'set -- %s\n' "$ENVIRONMENT" >"$init_run/handover"
        echo handover >"$init_run/status"
        return
    fi
    [ $# -gt 0 ] || fail 'nothing to run' 'config.sh sets neither ENTRYPOINT nor CMD'
    case $STOP_SIGNAL in
        '' | [1-9] | [1-5][0-9] | 6[0-4]) ;;
        *) fail "bad STOP_SIGNAL $STOP_SIGNAL" 'it is not a number from 1 to 64' ;;
    esac
    find_user "${RUN_AS:-0}"
    enter_workdir "${WORKDIR:-/}"
    find_program "$1"
    (start "$@" 3>&-)
    init_status=$?
    case $init_status in [12] | 12[67]) check_refusal "$1" ;; esac
    echo "$init_status" >"$init_run/status"
}

# What programs expect in /etc to find hosts. Here, as its links are the image's.
write_names() {
    [ -z "$GUEST_HOSTNAME" ] || write_file /etc/hostname "$GUEST_HOSTNAME"
    [ -s /etc/hosts ] || write_file /etc/hosts "127.0.0.1 localhost $GUEST_HOSTNAME${init_newline}::1 localhost"
    init_servers=
    for init_server in $GUEST_DNS; do
        case $init_server in *[!0-9a-fA-F.:]*) fail "bad GUEST_DNS $init_server" 'it is no address' ;; esac
        init_servers=${init_servers:+$init_servers$init_newline}"nameserver $init_server"
    done
    [ -z "$init_servers" ] || write_file /etc/resolv.conf "$init_servers"
}

# write_file PATH TEXT: a link there is replaced, for it may lead nowhere, or to where a file system will be mounted.
write_file() {
    [ -d "${1%/*}" ] || try "cannot make ${1%/*}" mkdir -p "${1%/*}"
    ! [ -L "$1" ] || try "cannot replace $1" rm "$1"
    printf '%s\n' "$2" 2>/dev/null >"$1" || fail "cannot write $1" 'it is no file, or no space is left'
}

bind_volume() {
    [ -d "$2" ] || try "cannot make $2 for a volume" mkdir -p "$2"
    try "cannot mount a volume on $2" mount -o bind "$init_run/volumes/$init_number" "$2"
}

# find_user USER[:GROUP]: sets init_uid and init_gid, and HOME unless config.sh has exported that. init_name is empty
# unless the groups are to be those of a user that the image knows.
find_user() {
    init_uid='' init_gid=0 init_home=/ init_name=''
    while IFS=: read -r init_word _ init_number init_group _ init_directory _ || [ -n "$init_word" ]; do
        [ "$init_word" = "${1%%:*}" ] || [ "$init_number" = "${1%%:*}" ] || continue
        init_name=$init_word init_uid=$init_number init_gid=$init_group init_home=${init_directory:-/}
        break
    done 2>/dev/null </etc/passwd
    case $init_uid:${1%%:*} in
        :*[!0-9]* | :) fail "cannot run as ${1%%:*}" 'the image knows no such user' ;;
        :0) init_uid=0 init_home=/root ;;
        :*) init_uid=${1%%:*} ;;
    esac
    is_owner "$init_uid" || fail "cannot run as ${1%%:*}" "$init_uid is the number of no user"
    is_owner "$init_gid" || fail "cannot run as ${1%%:*}" "$init_gid is the number of no group"
    export HOME="${HOME:-$init_home}"
    case $1 in *:*) find_group "${1#*:}" ;; esac
}

# find_group GROUP: sets init_gid.
find_group() {
    init_name='' init_gid=''
    while IFS=: read -r init_word _ init_number _ || [ -n "$init_word" ]; do
        [ "$init_word" = "$1" ] || [ "$init_number" = "$1" ] || continue
        init_gid=$init_number
        break
    done 2>/dev/null </etc/group
    case $init_gid:$1 in
        :*[!0-9]* | :) fail "cannot run with the group $1" 'the image knows no such group' ;;
        :*) init_gid=$1 ;;
    esac
    is_owner "$init_gid" || fail "cannot run with the group $1" "$init_gid is the number of no group"
}

# is_owner NUMBER: whether it can be a user's or a group's; the largest of 32 bits means nobody in particular.
is_owner() {
    [ "$1" -ge 0 ] 2>/dev/null && [ "$1" -le 4294967294 ]
}

enter_workdir() {
    cd "$1" 2>/dev/null && return
    try "cannot make the working directory $1" mkdir -p "$1"
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
    init_binary=$init_program
    check_binary "$1" it
}

# check_binary ENTRYPOINT WHAT: fail if the kernel would not execute $init_binary, which for messages is WHAT. If it is a
# script, its interpreter takes its place.
check_binary() {
    [ -f "$init_binary" ] || fail "cannot run entrypoint $1" "$2 is not a file" 126
    [ -x "$init_binary" ] || fail "cannot run entrypoint $1" "$2 is not executable" 126
    read_head "$init_binary" 24
    case $init_head in
        ?ELF*)
            find_machine
            init_wanted=$init_class$init_machine
            read_head "$init_busybox" 24
            find_machine
            # What is of another class, so for 32 bits, some kernels can run.
            case $init_wanted in
                "$init_class$init_machine") ;;
                "$init_class"*) fail "cannot run entrypoint $1" "$2 was built for another architecture" 126 ;;
            esac
            ;;
        '#!'*)
            [ "$2" = it ] || return 0 # an interpreter may have its own
            read_head "$init_binary" 256
            # shellcheck disable=SC2086 # to be split, at blanks
            set -- "$1" ${init_head#??}
            [ -e "$2" ] || fail "cannot run entrypoint $1" "its interpreter $2 is missing" 126
            init_binary=$2
            check_binary "$1" "its interpreter $2"
            ;;
        *) fail "cannot run entrypoint $1" "$2 is neither an ELF program nor a script that begins with #!" 126 ;;
    esac
}

# read_head FILE LENGTH: sets init_head to the first of its bytes that are no NUL, up to a newline.
read_head() {
    # shellcheck disable=SC3045 # busybox has -n
    IFS='' read -r -n "$2" init_head 2>/dev/null <"$1"
}

# Sets init_class to EI_CLASS and EI_DATA, and init_machine to e_machine, of the ELF header in init_head. Without the
# NULs it is found by what is next to it: EI_VERSION and e_version are the same byte.
#    7f E L F class data version [ABI] type machine version ...
find_machine() {
    init_head=${init_head#????}
    init_class=${init_head%"${init_head#??}"}
    init_head=${init_head#??}
    init_version=${init_head%"${init_head#?}"}
    init_head=${init_head#?}
    init_head=${init_head%%"$init_version"*}
    init_machine=${init_head#"${init_head%?}"}
}

# start WORD...: become the entrypoint, in a session of its own. Without setsid between them, `env` would take a program
# with a = in its path for an assignment.
start() {
    # Not $$, which is the process that this one was forked from. No more is read than a PID can have.
    # shellcheck disable=SC3045 # busybox has -n
    read -r -n 10 init_pid _ </proc/self/stat
    echo "$init_pid $STOP_SIGNAL" >"$init_run/entrypoint"
    # Of busybox's applets start-stop-daemon is the one that sets a user's groups, and that gives a program another word
    # for its name. Without a file of PIDs it would look for a program that runs already, and not start it again.
    init_word=$1
    shift
    case $init_name:$init_word in
        [!:]*) set -- start-stop-daemon -S -p /dev/none -c "$init_name" -x "$init_program" -a "$init_word" -- "$@" ;;
        */*) set -- nsenter -S "$init_uid" -G "$init_gid" -- "$init_program" "$@" ;;
        *)
            # This user cannot reach the initrd's busybox, but a process that is busybox can become it once more.
            "$init_busybox" ln -sf /proc/self/exe /dev/busybox-again
            set -- start-stop-daemon -S -p /dev/none -x "$init_program" -a "$init_word" -- "$@"
            set -- nsenter -S "$init_uid" -G "$init_gid" -- /dev/busybox-again "$@"
            ;;
    esac
    eval "set -- $ENVIRONMENT "'"$init_busybox" setsid "$init_busybox" "$@"'
    exec "$init_busybox" env -u SHLVL -u PWD -u OLDPWD -- "$@"
}

# check_refusal ENTRYPOINT: fail if it was not the entrypoint that ended so, but what should have become it, as the kernel
# would not execute that. The kernel is asked by starting it again, for the same user, in the same way, but without the
# memory to run in: what the kernel accepts, it kills before its first instruction.
check_refusal() {
    [ -f "$init_program" ] && [ -x "$init_program" ] || return # it did run: it is gone
    # The user may not reach the initrd's busybox. And as long as a shell can find itself in /proc, it takes what the
    # kernel knows no format of for a script, and runs that.
    "$init_busybox" cp "$init_busybox" /dev/busybox 2>/dev/null || return
    "$init_busybox" mount -t tmpfs tmpfs /proc 2>/dev/null || return
    { init_why=$(ask_kernel 2>&1); } 2>/dev/null # this shell would tell that it was killed
    init_asked=$?
    /dev/busybox umount -l /proc
    case $init_asked:$init_why in 12[67]:*asked*) ;; *) return ;; esac
    init_why=${init_why##*: }
    if [ "$init_why" = 'not found' ]; then
        init_loader=$("$init_busybox" strings "$init_binary" | "$init_busybox" grep -m 1 '^/.*/ld[^/]*$')
        init_why='the kernel does not know its format'
        [ -z "$init_loader" ] || [ -e "$init_loader" ] || init_why="$init_binary needs $init_loader, which is missing"
    fi
    fail "cannot run entrypoint $1" "$init_why" 126
}

ask_kernel() {
    ENVIRONMENT='' init_run=/dev init_busybox=/dev/busybox
    # shellcheck disable=SC2016 # that shell expands it
    set -- sh -c 'ulimit -v 64; echo asked; exec "$0"' "$init_program"
    init_program=$init_busybox
    start "$init_busybox" "$@" 3>&-
}

# Not by its arguments: PID 1 has those that the kernel's command line gives it. A shell reads no further than it gets,
# so this one spares itself what follows.
if [ $$ -ne 1 ]; then
    init_run=/proc/1/root/run init_busybox=/proc/1/root/bin/busybox init_applet=$init_busybox
    # shellcheck disable=SC2119
    run
    exit
fi

### init: the process that must not end ###

# The kernel panics when PID 1 ends, so what may go wrong is done by a child, config.sh included.
#
# The entrypoint cannot be a job of this shell: while a shell waits for a foreground job it holds back its traps, and
# a background job has INT and QUIT ignored for good. So the entrypoint is a grandchild, and the job waited for is a
# reader of the FIFO /run/ended: it gets end-of-file when neither boot nor run is left to hold that open.
init() {
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
    if [ "$status" = handover ]; then
        # shellcheck disable=SC2119 # it makes arguments of its own
        hand_over
    fi
    settle_disks
    printf '\nsystemfiles: exit %s\n' "$status" # the entrypoint may have left a line unfinished
    switch_off
}

# forward SIGNAL: to the entrypoint, which may be about to start.
forward() {
    while ! [ -s /run/entrypoint ] && kill -0 "$reader" 2>/dev/null; do
        sleep 0.02
    done
    # no status decides anything here: ash may run another trap in between, which changes it
    read -r pid stop 2>/dev/null </run/entrypoint
    case $1 in TERM) set -- "${stop:-TERM}" ;; esac
    kill -s "$1" "$pid" 2>/dev/null
}

# PID 1 becomes the image's own init. What is mounted here stays alive as long as the image's root needs it.
#
# The disks that are written by way of overlayfs must be in that init's sight: what systemd sees at its end it makes
# read-only, so that no journal is left to replay, and what is below /run/initramfs it does not unmount before.
# shellcheck disable=SC2120 # /run/handover sets its arguments
hand_over() {
    umount /run/volumes/* /run/bases/* /run/config /run/rootfs 2>/dev/null
    mkdir -p /run/root/run
    mount -t tmpfs -o nosuid,nodev,mode=755,size=20% tmpfs /run/root/run
    for upper in /run/overlay /run/uppers/*; do
        [ -d "$upper" ] || continue
        mkdir -p "/run/root/run/initramfs/${upper#/run/}"
        mount -o move "$upper" "/run/root/run/initramfs/${upper#/run/}"
    done
    trap - TERM INT
    # shellcheck source=/dev/null
    . /run/handover
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TERM=linux "$@" \
        switch_root /run/root /sbin/init
}

# Whoever mounts these disks next, perhaps for reading only, should find them whole, with no journal to replay.
settle_disks() {
    kill -KILL -1 2>/dev/null # what the entrypoint left behind could go on writing
    while read -r device directory type options _; do
        case $directory:$type:$options in
            /run/overlay:ext4:rw,* | /run/volumes/*:ext4:rw,* | /run/uppers/*:ext4:rw,*) ;;
            *) continue ;;
        esac
        tries=50 # the dying hold their files for a moment
        until mount -o remount,ro "$device" "$directory" 2>/dev/null || [ $((tries -= 1)) -eq 0 ]; do
            sleep 0.02
        done
    done </proc/mounts
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
    mount_disks
    read_config
    trap - EXIT
    PATH=/bin:/sbin
    set_up_network
    each_volume attach_volume
    prepare_root
    enter_root
}

mount_kernel_file_systems() {
    echo 'proc /proc proc nosuid,nodev,noexec
sysfs /sys sysfs nosuid,nodev,noexec
devtmpfs /dev devtmpfs nosuid' >/run/fstab
    try 'cannot mount /proc, /sys and /dev' mount -a -T /run/fstab
    # The links fd, stdin, stdout and stderr, and where to mount pts and shm: every devtmpfs is the same one.
    try 'cannot fill /dev' cp -a /etc/dev/* /dev
    # A VMM that presses Ctrl-Alt-Del asks for an end: the kernel then sends INT to PID 1, and resets nothing.
    echo 0 2>/dev/null >/proc/sys/kernel/ctrl-alt-del
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
        try "cannot load module $module" modprobe "$module"
    done
}

# wait_until COMMAND...: by the guest's clock, so that a slow emulator shortens nothing.
wait_until() {
    read -r now _ </proc/uptime
    deadline=$((${now%.*} + init_patience))
    until "$@"; do
        read -r now _ </proc/uptime
        [ "${now%.*}" -lt "$deadline" ] || return
        sleep 0.02
    done
}

mount_disks() {
    wait_until find_disks ||
        fail "missing disk:$missing" "waited $init_patience s, and there is:${found:- none}"
    check_writable "the overlay disk $overlay" "/dev/$overlay"
    layers /run/rootfs /run/overlay
    find_format "/dev/$rootfs"
    echo "/dev/$rootfs /run/rootfs $format
/dev/$config /run/config ext4 ro,noload
/dev/$overlay /run/overlay ext4 defaults
overlay /run/root overlay $layers" >/run/fstab
    mount -a -T /run/fstab 2>/dev/null || mount_one_by_one
    check_space "the overlay disk $overlay" /run/overlay
}

# For a config disk that is not ext4, for an overlay disk that lacks its directories, and to name the one that fails.
mount_one_by_one() {
    umount /run/root 2>/dev/null # laid over nothing, where the root was not mounted
    mounted=' '
    while read -r _ directory _; do
        mounted="$mounted$directory "
    done </proc/mounts
    is_mounted /run/rootfs || mount_read_only "the rootfs disk $rootfs" "/dev/$rootfs" /run/rootfs
    is_mounted /run/config || mount_read_only "the config disk $config" "/dev/$config" /run/config
    is_mounted /run/overlay || mount_writable "the overlay disk $overlay" "/dev/$overlay" /run/overlay
    merge "the overlay disk $overlay" /run/rootfs /run/overlay /run/root
}

is_mounted() {
    case $mounted in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

# Sets rootfs, overlay and config to names of devices. Fails while one of them is missing.
find_disks() {
    rootfs='' overlay='' config='' missing='' found='' volumes=' '
    for disk in /sys/block/vd*; do
        [ -d "$disk" ] || continue
        found="$found ${disk##*/}"
        read_serial "$disk"
        case $serial in
            rootfs) rootfs=${disk##*/} ;;
            overlay) overlay=${disk##*/} ;;
            config) config=${disk##*/} ;;
            *[!0-9]*) volumes="$volumes${disk##*/} " ;; # VMMs that are given none make serials of digits
        esac
    done
    [ -n "$rootfs$overlay$config" ] || go_by_letters
    [ -b "/dev/$rootfs" ] || missing="$missing rootfs"
    [ -b "/dev/$overlay" ] || missing="$missing overlay"
    [ -b "/dev/$config" ] || missing="$missing config"
    [ -z "$missing" ]
}

# Not while a device has no disk yet, as the disk may turn out to have one of the serials; and not where one of the
# letters is a volume's, because then the VMM does give serials.
go_by_letters() {
    case $volumes in *' vd'[abc]' '*) return ;; esac
    for device in /sys/bus/virtio/devices/*; do
        read -r kind 2>/dev/null <"$device/device" || continue
        [ "$kind" != 0x0002 ] || [ -d "$device/block" ] || return
    done
    rootfs=vda overlay=vdb config=vdc
}

read_serial() {
    serial=''
    read -r serial 2>/dev/null <"$1/serial" # `read` returns 1: there is no newline in it
}

# mount_read_only WHAT DEVICE DIRECTORY
mount_read_only() {
    find_format "$2"
    try "cannot mount $1 as ext4, squashfs or erofs" mount -t "${format% *}" -o "${format#* }" "$2" "$3"
}

# find_format DEVICE: sets format to the type it has, and the options with which it is only read. Before what tells an
# erofs are 1024 NULs, which a shell leaves out. The kernel would load a module for each type that is just tried.
find_format() {
    # shellcheck disable=SC3003 # busybox has it
    case $(head -c 1028 "$1") in
        hsqs*) format='squashfs ro' ;;
        $'\342\341\365\340') format='erofs ro' ;;
        *) format='ext4 ro,noload' ;; # without noload it would write what its journal still holds
    esac
}

# mount_writable WHAT DEVICE DIRECTORY
mount_writable() {
    check_writable "$1" "$2"
    try "cannot mount $1 as ext4" mount -t ext4 "$2" "$3"
}

# check_writable WHAT DEVICE: mount would do with a device that is not.
check_writable() {
    locked=''
    read -r locked 2>/dev/null <"/sys/class/block/${2##*/}/ro"
    [ "$locked" != 1 ] || fail "cannot write $1" 'it is read-only'
}

# merge WHAT LOWER UPPER DIRECTORY: mount LOWER there; what changes is kept on the disk mounted on UPPER.
merge() {
    if ! [ -d "$3/upper" ] || ! [ -d "$3/work" ]; then
        try "cannot write $1" mkdir -p "$3/upper" "$3/work"
    fi
    layers "$2" "$3"
    try "cannot lay $1 over what is below it" mount -t overlay -o "$layers" overlay "$4"
}

# layers LOWER UPPER: sets layers to the options of such a mount.
layers() {
    layers=lowerdir=$1,upperdir=$2/upper,workdir=$2/work
}

# check_space WHAT UPPER. A full disk would let the guest start, only to fail in some odd way. So a block is asked for,
# and given back.
check_space() {
    echo 2>/dev/null >"$2/space" || fail "cannot write $1" 'no space is left on it'
    : >"$2/space"
}

# Names and addresses of servers are for run to write. lo is up whatever the config says: many an image counts on it.
set_up_network() {
    try 'cannot set lo up' ip link set lo up
    [ -z "$GUEST_HOSTNAME" ] || set_hostname
    [ -n "$GUEST_IP" ] || return 0
    wait_until [ -d /sys/class/net/eth0 ] || fail 'missing network device: eth0' "waited $init_patience s"
    prefix=${GUEST_CIDR:-$GUEST_MASK}
    [ -n "$prefix" ] || fail "cannot give eth0 the address $GUEST_IP" 'neither GUEST_CIDR nor GUEST_MASK is set'
    try "cannot give eth0 the address $GUEST_IP/$prefix" ip addr add "$GUEST_IP/$prefix" dev eth0
    try 'cannot set eth0 up' ip link set eth0 up
    [ -z "$GUEST_GW" ] || try "cannot route by $GUEST_GW" ip route add default via "$GUEST_GW"
}

set_hostname() {
    case ${#GUEST_HOSTNAME}:$GUEST_HOSTNAME in
        *:*[!A-Za-z0-9.-]* | *:[.-]* | *[.-]) why='it is no name of a host' ;;
        ?:* | [1-5]?:* | 6[0-4]:*)
            echo "$GUEST_HOSTNAME" >/proc/sys/kernel/hostname && return
            why='the kernel refuses that'
            ;;
        *) why='it is longer than 64 characters' ;;
    esac
    fail "cannot be called $GUEST_HOSTNAME" "$why"
}

# Mounts it on /run/volumes/<number>, as init should reach it to the end; run binds that where it belongs in the image.
attach_volume() {
    volume=/run/volumes/$init_number base=/run/bases/$init_number upper=/run/uppers/$init_number
    case $#:$3:$2 in
        3:r[ow]:/*) mkdir -p "$volume" ;;
        4:overlay:/*) mkdir -p "$volume" "$base" "$upper" ;;
        *) fail "bad volume $init_volume" 'it is none of device:path:ro, device:path:rw, device:path:overlay:device' ;;
    esac
    find_device "$1"
    case $3 in
        ro) mount_read_only "the volume $1" "$device" "$volume" ;;
        rw) mount_writable "the volume $1" "$device" "$volume" ;;
        overlay)
            mount_read_only "the volume $1" "$device" "$base"
            find_device "$4"
            mount_writable "the volume's overlay disk $4" "$device" "$upper"
            merge "the volume's overlay disk $4" "$base" "$upper" "$volume"
            check_space "the volume's overlay disk $4" "$upper"
            ;;
    esac
}

# find_device NAME|PATH|SERIAL: sets device to its path.
find_device() {
    wait_until device_is_there "$1" || fail "missing disk: $1" "waited $init_patience s"
}

device_is_there() {
    device=/dev/${1#/dev/}
    [ -b "$device" ] && return
    for disk in /sys/block/*; do
        read_serial "$disk"
        device=/dev/${disk##*/}
        [ "$serial" = "$1" ] && [ -b "$device" ] && return
    done
    return 1
}

# The kernel's file systems are new instances there, not moved ones: init goes on to need those of the initrd.
#
# With the new root moved over /, as switch_root does it, the image does not live in a mere chroot, where the kernel
# forbids user namespaces. init and the kernel's modprobe still have the initrd for their root, beneath it. A PID 1 that
# is to enter it does the moving itself.
prepare_root() {
    cd /run/root || fail 'cannot enter the root' 'it is not a directory'
    if ! [ -d /run/root/proc ] || ! [ -d /run/root/sys ] || ! [ -d /run/root/dev ]; then
        try "cannot make the image's /proc, /sys and /dev" mkdir -p /run/root/proc /run/root/sys /run/root/dev
    fi
    echo 'proc /run/root/proc proc nosuid,nodev,noexec
sysfs /run/root/sys sysfs nosuid,nodev,noexec
devtmpfs /run/root/dev devtmpfs nosuid
devpts /run/root/dev/pts devpts nosuid,noexec,gid=5,mode=620,ptmxmode=666
tmpfs /run/root/dev/shm tmpfs nosuid,nodev,mode=1777' >/run/fstab
    [ ! -d /sys/fs/cgroup ] || echo 'cgroup2 /run/root/sys/fs/cgroup cgroup2 nosuid,nodev,noexec' >>/run/fstab
    case $INIT_MODE in
        '') echo '/run/root / none move' >>/run/fstab ;;
        systemd) ;;
        *) fail "bad INIT_MODE $INIT_MODE" 'it is either not set or systemd' ;;
    esac
    try "cannot mount the image's /proc, /sys and /dev" mount -a -T /run/fstab
}

# setsid twice: the first makes this process lead a session, which the second cannot leave but by a fork. So run starts
# with the signals as the kernel made them, and boot ends.
enter_root() {
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        setsid setsid chroot . /proc/1/root/bin/busybox sh /proc/1/root/init run
}

init_run=/run init_busybox=/bin/busybox init_applet='' PATH=/bin:/sbin
init
