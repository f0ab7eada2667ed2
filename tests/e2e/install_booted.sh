#!/usr/bin/env bash
# Installs a bundle in a fresh Debian that a systemd of its own has booted, in namespaces, and shows
# what install.sh leaves to systemd: what a killed run did not restart, the next one does; a service
# that waits for its broker gets what is new, and is left alone if there is nothing new.
#
#   install_booted.sh BUNDLE.tar [SUITE]      SUITE: bookworm (default), trixie
#
# As root, on the bundle's kind of machine, with cgroup2, and the root that install_in_root.sh made.
set -Eeuo pipefail
export LC_ALL=C

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)

if [ "${STAGE:-}" = boot ]; then # in the namespaces
    root=$1
    mount --make-rprivate /
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys" # it is the machine's
    mount -t tmpfs -o mode=755 tmpfs "$root/run"
    mount -t tmpfs -o mode=755 tmpfs "$root/dev"
    for each in null zero full random urandom tty; do
        touch "$root/dev/$each"
        mount --bind "/dev/$each" "$root/dev/$each"
    done
    ln -s pts/ptmx "$root/dev/ptmx"
    mkdir "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/sys"
    mkdir -p "$root/sys/fs/cgroup"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    ip link set lo up
    mkdir "$root/run/old"
    cd "$root"
    pivot_root . run/old # a chroot would be in the way of what the unit hides
    umount -l /run/old
    mount --make-rshared / # credentials are mounted elsewhere, and must be seen here
    exec env -i container=edged-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system
fi

bundle=$(readlink -f "${1:?the bundle}") suite=${2:-bookworm}
work=${WORK:-/var/tmp/edged-roots}
name=$(basename "$bundle" .tar)
case $(uname -m) in x86_64) arch=amd64 ;; *) arch=arm64 ;; esac
run=$(mktemp -d "$work/run.XXXXXX")
root=$run/root
group=$(findmnt -t cgroup2 -n -o TARGET | head -n 1)/edged-test.$$
boot=''
finish() {
    if [ -n "$boot" ]; then
        kill -KILL "$boot" || true
        wait "$boot" || true
        for ((i = 0; i < 50; i++)); do
            grep -q "populated 0" "$group/cgroup.events" && break
            sleep 0.1
        done
    fi
    find "$group" -depth -type d -exec rmdir {} + || true
    rm -rf --one-file-system "$run"
}
trap finish EXIT

step() { echo "== $*"; }
fail() {
    if [ -n "${init:-}" ]; then inside journalctl --no-pager --lines=30 --unit=edged --unit=mosquitto || true; fi
    echo "FAILED: $*" >&2
    exit 1
}

mkdir -p "$group" "$root"
tar -xf "$work/$suite-$arch.tar" -C "$root"
install -d "$root/media/bundle"
tar -xf "$bundle" -C "$root/media/bundle"
cp -r "$here/tests/models/phi3v" "$root/media/phi3v"
cp -r "$root/media/bundle/$name" "$root/media/newer"
(
    cd "$root/media/newer"
    echo "# newer" >>deploy/locks/cpu.lock
    echo "# newer" >>systemd/edged.service
    rm SHA256SUMS
    find . -type f -printf '%P\0' | xargs -0 sha256sum >../sums
    mv ../sums SHA256SUMS
)
cat >"$root/media/kill" <<'KILL'
if [ -n "${KILL_AT:-}" ] && [ "${0##*/}" = install.sh ]; then
    set -T
    trap '[[ "${FUNCNAME[0]:-} $BASH_COMMAND  $*" != $KILL_AT ]] || kill -KILL $$' DEBUG
fi
KILL
step "packages that a bundle does not bring"
cp /etc/resolv.conf "$root/etc/resolv.conf"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
chroot "$root" apt-get -qq update
chroot "$root" env DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
    mosquitto openssl dbus >/dev/null 2>&1

step "systemd boots"
(
    echo $BASHPID >"$group/cgroup.procs"
    STAGE=boot exec unshare --cgroup --mount --pid --fork --kill-child --uts --ipc --net -- "$0" "$root"
) </dev/null >"$run/boot" 2>&1 &
boot=$!
init=''
for ((i = 0; i < 100; i++)); do
    sleep 0.3
    init=$(pgrep -P "$boot" -x systemd) || continue
    case $(nsenter -t "$init" -a -r -w systemctl is-system-running 2>/dev/null) in
        running | degraded) break ;;
    esac
done
[ -n "$init" ] || { cat "$run/boot"; fail "systemd does not run"; }

inside() {
    nsenter -t "$init" -a -r -w env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"
}
inside systemctl is-system-running || true

# ends STATUS COMMAND…: it must end so; what it says is in $run/said
ends() {
    local wanted=$1 status=0
    shift
    inside "$@" >"$run/said" 2>&1 || status=$?
    cat "$run/said"
    [ $status = "$wanted" ] || fail "it ended with $status, not $wanted"
}
says() { grep -q -- "$1" "$run/said" || fail "it does not say: $1"; }
killed_at() {
    echo "-- killed at: $1"
    ends 137 env BASH_ENV=/media/kill KILL_AT="$1" "${@:2}"
}
invocation() { inside systemctl show --property=InvocationID --value "$1"; }
restarted() { # UNIT OLD-INVOCATION
    [ "$(invocation "$1")" != "$2" ] || fail "$1 was not restarted"
}
left_alone() {
    [ "$(invocation "$1")" = "$2" ] || fail "$1 was restarted"
}
# the program that edged is, and its arguments
program() { inside sh -c 'tr "\0" "\n" </proc/'"$(inside systemctl show --property=MainPID --value edged)"/cmdline; }

install=/media/bundle/$name/deploy/install.sh
mosquitto=$(invocation mosquitto)
[ -n "$mosquitto" ] || fail "mosquitto does not run"

step "a run that was killed before it restarted mosquitto is made good by the next"
killed_at "install_mosquitto systemctl *" "$install" --device door --with-mosquitto --model /media/phi3v
left_alone mosquitto "$mosquitto"
ends 0 "$install" # told no more
says "restart mosquitto"
says "done: edged"
restarted mosquitto "$mosquitto"
[ "$(inside systemctl is-active edged)" = active ] || fail "edged is not ready"
inside systemctl status --no-pager edged | head -n 12

step "a second run changes nothing, and restarts nothing"
edged=$(invocation edged) mosquitto=$(invocation mosquitto)
ends 0 "$install"
says "nothing changed"
left_alone edged "$edged"
left_alone mosquitto "$mosquitto"

step "an upgrade that was killed before it restarted edged is made good by the next run"
old=$(inside readlink /opt/edged)
killed_at "start_service *" /media/newer/deploy/install.sh
new=$(inside readlink /opt/edged)
[ "$new" != "$old" ] || fail "it was killed too early"
left_alone edged "$edged"
ends 0 /media/newer/deploy/install.sh
says "restart edged"
restarted edged "$edged"
[ "$(inside systemctl show --property=NeedDaemonReload --value edged)" = no ] || fail "the unit is the old one"
[[ $(program) = /opt/$new/* ]] || fail "it runs from $(program)"
ends 0 /media/newer/deploy/install.sh # the old version may have been in use
[ "$(inside sh -c 'ls -d /opt/edged.d/*/ | wc -l')" = 1 ] || fail "the old version is left"

step "a service that waits for its broker is left alone, until there is something new"
inside cp /etc/edged/credentials/mqtt-password /media/right
inside sh -c 'echo wrong >/media/wrong && chmod 600 /media/wrong /media/right'
broker=(--broker localhost:8883 --user door)
ends 3 /media/newer/deploy/install.sh "${broker[@]}" --password-file /media/wrong
says "restart edged"
sleep 2
[ "$(inside systemctl is-active edged)" = activating ] || fail "it is $(inside systemctl is-active edged)"
edged=$(invocation edged)
ends 3 /media/newer/deploy/install.sh
says "nothing changed"
left_alone edged "$edged"
ends 0 /media/newer/deploy/install.sh "${broker[@]}" --password-file /media/right
restarted edged "$edged"
[ "$(inside systemctl is-active edged)" = active ] || fail "edged is not ready"

step "a service that was stopped is started, and one that gave up too"
inside systemctl stop edged
ends 0 /media/newer/deploy/install.sh
says "start edged"
inside sh -c 'sed -i "s/^device = .*/device = 7/" /etc/edged/edged.toml && systemctl restart --no-block edged'
sleep 5
[ "$(inside systemctl is-active edged)" = failed ] || fail "it is $(inside systemctl is-active edged)"
inside sed -i 's/^device = .*/device = "door"/' /etc/edged/edged.toml
ends 0 /media/newer/deploy/install.sh
says "start edged"

step "purged: the service is gone, and mosquitto as it was"
ends 0 /media/newer/deploy/install.sh --uninstall --purge
! inside systemctl cat edged >/dev/null 2>&1 || fail "the unit is left"
[ "$(inside systemctl is-active mosquitto)" = active ] || fail "mosquitto is down"

step "--no-start is remembered until the service is started"
ends 0 "$install" --device door --broker localhost --model /media/phi3v --no-start
ends 0 "$install"
says "nothing changed"
if inside systemctl --quiet is-enabled edged; then fail "it is enabled"; fi
inside systemctl --quiet enable edged
inside systemctl start --no-block edged
edged=$(invocation edged)
ends 0 /media/newer/deploy/install.sh
says "restart edged"
restarted edged "$edged"
echo "== $suite: all as it should be"
