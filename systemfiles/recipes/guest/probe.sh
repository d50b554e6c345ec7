#!/bin/sh
#
# The probe of `systemfiles boot`: it runs in a guest as its entrypoint and tells what it finds there. What of that is as
# it should be is judged on the host. All that it needs is a static busybox beside it.
#
#   probe NONCE full SERVER WORD...   as root: uses all there is, and then sends init a signal for which it ends with
#                              the status 42
#   probe NONCE user           as whoever was named
#   probe NONCE systemd        as PID 1, in place of an image's own init
#   probe NONCE image LIMIT STOP SERVER WORKDIR WORD...   tells about the guest of any image and becomes WORD..., the
#                              image's own entrypoint. After LIMIT seconds that is asked to end: by init or, where it may
#                              not ask that, by the signal of the number STOP. The file `environment` beside this has
#                              what it gets.
#
# Each fact is a line of the console:         systemfiles-probe NONCE: <name> <what there is to say>
# Where that are bytes of any kind, they are in hexadecimal; the end of each of several lines is a semicolon. The NONCE
# is known to nobody else: what an image writes is not taken for a fact.

unset IFS # the image's environment may hold one
read -r probe_uptime _ </proc/uptime
probe_nonce=$1
shift
probe_here=${0%/*}
probe_busybox=$probe_here/busybox

say() { printf 'systemfiles-probe %s: %s %s\n' "$probe_nonce" "$1" "$2"; }

# ask NAME APPLET ARGUMENT...: what that prints, whatever the image's own programs are.
ask() {
    probe_name=$1
    shift
    say "$probe_name" "$("$probe_busybox" "$@" 2>&1 | "$probe_busybox" tr '\n' ';')"
}

hex() { say "$1" "$("$probe_busybox" od -An -v -tx1 "$2" | "$probe_busybox" tr -d ' \n')"; }

# When this began, in seconds, and when init had just begun, in hundredths. That is the start of init's first child, which
# waits for the end.
clock() {
    for probe_status in /proc/[0-9]*/stat; do
        read -r probe_line 2>/dev/null <"$probe_status" || continue
        # shellcheck disable=SC2086 # to be split
        set -- $probe_line
        [ "$2 $4" = '(init) 1' ] && say clock "$probe_uptime ${22}" && return
    done
}

facts() {
    clock
    hex cmdline /proc/$$/cmdline
    hex environ /proc/$$/environ
    ask directory readlink /proc/$$/cwd
    ask ids grep -E '^(Uid|Gid|Groups)' /proc/$$/status
    for probe_file in passwd group; do
        # Where the user may not read it, nothing is told of it. Where there is none, nobody is in it.
        [ -e "/etc/$probe_file" ] || say "$probe_file" ''
        [ ! -r "/etc/$probe_file" ] || hex "$probe_file" "/etc/$probe_file"
    done
    ask mounts cut -d' ' -f2,3 /proc/mounts
    ask shm stat -c %a /dev/shm
    ask filesystems grep cgroup2 /proc/filesystems
    ask modules cut -d' ' -f1 /proc/modules
    probe_serials=
    for probe_disk in /sys/block/vd*; do
        probe_serial=
        read -r probe_serial 2>/dev/null <"$probe_disk/serial" # which ends without a newline
        probe_serials="$probe_serials$probe_serial;"
    done
    say serials "$probe_serials"
    for probe_link in fd stdin stdout stderr; do
        ask "link-$probe_link" readlink "/dev/$probe_link"
    done
    say stdout opened 2>/dev/null >/dev/stdout
    ask hostname hostname
    ask etc-hostname cat /etc/hostname
    ask hosts cat /etc/hosts
    ask resolv.conf cat /etc/resolv.conf
    ask session cut -d' ' -f6 /proc/$$/stat
    say pid $$
    ask address ip -o -4 addr
    ask routes ip route
}

# The time limit is not wget's own: some of these break with that.
fetch() { ask fetched timeout 5 wget -q -O - "http://$1/"; }

volumes() {
    for probe_volume in reference data template; do
        ask "was-$probe_volume" cat "/volumes/$probe_volume/value"
        echo "changed by $1" 2>/dev/null >"/volumes/$probe_volume/value"
        ask "now-$probe_volume" cat "/volumes/$probe_volume/value"
    done
}

# A process whose parent is gone becomes init's child; a dead one is a zombie until init takes notice.
orphan() {
    ("$probe_busybox" sleep 0.1 &)
    "$probe_busybox" sleep 0.4
    ask zombies grep -ls '^State:.Z' /proc/[0-9]*/status
}

signals() {
    trap 'say signal-INT received' INT
    trap 'say signal-TERM received; exit 42' TERM
    kill -INT 1
    "$probe_busybox" sleep 0.2
    kill -TERM 1
    probe_left=50
    while [ $((probe_left -= 1)) -gt 0 ]; do
        "$probe_busybox" sleep 0.1
    done
    exit 41
}

# find_program WORD: sets probe_program to what init would have started.
find_program() {
    probe_program=$1
    case $1 in */*) return ;; esac
    IFS=: && set -f
    for probe_directory in $PATH; do
        probe_program=${probe_directory:-.}/$1
        [ -f "$probe_program" ] && [ -x "$probe_program" ] && break
        probe_program=$1
    done
    unset IFS && set +f
}

# Whether it is an ELF program for this machine or a script. Any other would be run by a shell where there is one.
is_program() {
    probe_head=$(head_of "$1")
    case $probe_head in
        '' | 2321*) ;; # it cannot be read, but perhaps executed
        *) [ "$probe_head" = "$(head_of "$probe_busybox")" ] ;;
    esac
}

# The magic number, EI_CLASS, EI_DATA and e_machine of an ELF header.
head_of() {
    "$probe_busybox" od -An -v -tx1 -N20 "$1" 2>/dev/null | "$probe_busybox" tr -d ' \n' |
        "$probe_busybox" cut -c1-12,37-40
}

# A process that is nobody's child asks the entrypoint to end.
end_in_time() {
    (
        (
            trap '' HUP INT
            "$probe_busybox" sleep "$2"
            # the entrypoint may have left a line unfinished, and go on writing
            printf '\n%s\n' "$(say time over)"
            kill -TERM 1 2>/dev/null || kill "-$3" "$1"
        ) &
    )
}

# The shell would pass on no variable whose name it could not have given itself, and adds its own.
become() {
    find_program "$1"
    shift
    # What it would say of these, init says better, in a guest without the probe.
    [ -f "$probe_program" ] && [ -x "$probe_program" ] || exit 127
    is_program "$probe_program" || exit 126
    # nsenter, which enters nothing here, stands before a program in whose path `env` would see an assignment
    set -- "$probe_busybox" nsenter -- "$probe_program" "$@"
    # shellcheck source=/dev/null
    . "$probe_here/environment"
    exec "$probe_busybox" env -i -- "HOME=$HOME" "PATH=$PATH" "$@"
}

say started "$1"
case $1 in
    full)
        facts
        fetch "$2"
        volumes "$probe_nonce"
        echo "$probe_nonce" >/kept
        orphan
        say full told
        signals
        ;;
    user)
        facts
        ask kept cat /kept
        ;;
    systemd)
        say pid $$
        hex environ /proc/$$/environ
        ask mounts cut -d' ' -f2,3 /proc/mounts
        "$probe_busybox" mount -o remount,ro / # so that no journal is left to be replayed
        "$probe_busybox" poweroff -f
        ;;
    image)
        facts
        fetch "$4"
        # shellcheck disable=SC3013 # busybox has -ef
        [ "$5" -ef . ] && say workdir "$5"
        end_in_time $$ "$2" "$3"
        shift 5
        become "$@"
        ;;
esac
