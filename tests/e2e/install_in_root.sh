#!/usr/bin/env bash
# Installs a bundle in a fresh Debian, in a chroot, and shows that install.sh keeps its word: a dry run
# and a second run change nothing, a killed run is made good by the next, a damaged bundle is refused,
# the unit verifies, edged passes its own test, and what is uninstalled is gone.
#
#   install_in_root.sh BUNDLE.tar [SUITE [ARCH]]      SUITE: bookworm (default), trixie; ARCH: amd64, arm64
#
# As root, with debootstrap, and for arm64 on another machine qemu-user-static. MIRROR names a Debian
# mirror; the first root is kept in WORK (/var/tmp/edged-roots) for the next time.
set -Eeuo pipefail
export LC_ALL=C

bundle=$(readlink -f "${1:?the bundle}") suite=${2:-bookworm} arch=${3:-amd64}
mirror=${MIRROR:-http://deb.debian.org/debian} work=${WORK:-/var/tmp/edged-roots}
name=$(basename "$bundle" .tar)

# /sys stays away: under qemu onnxruntime would take the host's processor for its own.
if [ "${IN_NAMESPACE:-}" != 1 ]; then
    mkdir -p "$work"
    if [ ! -e "$work/$suite-$arch.tar" ]; then
        echo "== a fresh $suite ($arch)"
        rm -rf "$work/$suite-$arch"
        debootstrap --variant=minbase --arch="$arch" --include=python3,python3-venv,systemd \
            "$suite" "$work/$suite-$arch" "$mirror" >"$work/$suite-$arch.log"
        tar -cf "$work/$suite-$arch.part" -C "$work/$suite-$arch" .
        mv "$work/$suite-$arch.part" "$work/$suite-$arch.tar"
        rm -rf "$work/$suite-$arch"
    fi
    IN_NAMESPACE=1 exec unshare --mount-proc --pid --fork --kill-child -- "$0" "$@"
fi

run=$(mktemp -d "$work/run.XXXXXX")
root=$run/root
trap 'umount "$root/proc" 2>/dev/null || true; rm -rf --one-file-system "$run"' EXIT
mkdir "$root"
tar -xf "$work/$suite-$arch.tar" -C "$root"
mount -t proc proc "$root/proc"
install -d "$root/media/bundle"
cp "$bundle" "$root/media/bundle/"
tar -xf "$bundle" -C "$root/media/bundle"
tar=/media/bundle/${bundle##*/}
install=/media/bundle/$name/deploy/install.sh
options=(--device door --broker broker.lan --user door --password-file /media/password --no-start)
echo "not to be seen" >"$root/media/password"

inside() { chroot "$root" env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"; }
step() { echo "== $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# listing FORMAT: all that is there; no content changes without its ctime
listing() {
    (cd "$root" && find . -xdev \( -path ./proc -o -path ./run -o -path ./dev -o -path ./media -o -path ./var/tmp \
        -o -path ./tmp \) -prune -o -printf "$1\n" | sort)
}
STRICT='%p %y %m %U:%G %s %T@ %C@ %l'
LOOSE='%p %y %m %U:%G %l'
leftovers() { find "$root/var/tmp" "$root/tmp" -mindepth 1; }

# unchanged WHAT COMMAND…: it must leave everything as it is; prints what the command says
unchanged() {
    local what=$1
    shift
    listing "$STRICT" >"$run/before"
    "$@" || true
    listing "$STRICT" >"$run/after"
    diff "$run/before" "$run/after" || fail "$what changed something"
    [ -z "$(leftovers)" ] || fail "$what left $(leftovers)"
}

# more_than WHAT PATTERN: fail if anything else is there, or gone, than when all was fresh
more_than() {
    local found
    found=$(listing "$LOOSE" | diff "$run/fresh" - | grep '^[<>]' | grep -Ev "$2" |
        grep -Ev ' \./etc/(passwd|group|shadow|gshadow|subuid|subgid)- ') || true # the old ones' copies
    [ -z "$found" ] || fail "there is more than $1: $found"
}

step "a dry run changes nothing"
unchanged "the dry run" inside "$install" --offline "$tar" --dry-run "${options[@]}"

step "a damaged bundle is refused"
cp -r "$root/media/bundle/$name" "$root/media/bundle/damaged"
wheel=$(echo "$root"/media/bundle/damaged/wheels/numpy-*.whl)
printf X | dd of="$wheel" bs=1 seek=1000 conv=notrunc status=none
unchanged "the damaged bundle" inside "/media/bundle/damaged/deploy/install.sh" 2>&1 | tee "$run/said"
grep -q "is damaged" "$run/said" || fail "it was not refused"

listing "$LOOSE" >"$run/fresh"
step "killed in the middle"
inside setsid "$install" --offline "$tar" "${options[@]}" &
for ((i = 0; i < 36000; i++)); do
    if compgen -G "$root/opt/edged.d/*/lib/python3*/site-packages/numpy" >/dev/null; then break; fi
    kill -0 $! 2>/dev/null || fail "it ended before it could be killed"
    sleep 0.1
done
session=$(pgrep -o -f "$install --offline") # of the namespace: nobody else's
kill -KILL -- "-$session"
wait $! || true
[ ! -e "$root/opt/edged" ] || fail "it was killed too late"

step "run again"
inside "$install" --offline "$tar" "${options[@]}"
[ -z "$(leftovers)" ] || fail "left: $(leftovers)"
inside stat -c '%a %U:%G %n' /etc/edged/edged.toml /etc/edged/credentials \
    /etc/edged/credentials/mqtt-password /var/lib/edged /var/lib/edged/models
[ "$(inside stat -c '%a %U' /etc/edged/credentials{,/mqtt-password} | tr '\n' ' ')" = '700 root 600 root ' ] ||
    fail "others may read the password"
inside cat /etc/edged/edged.toml
inside edged --version

step "the unit verifies"
said=$(inside systemd-analyze verify /etc/systemd/system/edged.service 2>&1 || true)
[ -z "$said" ] || fail "systemd-analyze verify: $said"

step "a second run changes nothing"
unchanged "the second run" inside "$install" --no-start | tee "$run/said"
grep -q "nothing changed" "$run/said" || fail "it does not say so"
unchanged "a run with the same options" inside "$install" --offline "$tar" "${options[@]}"
unchanged "a run with other settings" inside "$install" --device window --no-start

step "what systemd does with its files at boot changes nothing"
for each in sysusers "tmpfiles --create"; do
    # shellcheck disable=SC2086 # two words
    unchanged "systemd-$each" inside systemd-$each "/usr/lib/${each%% *}.d/edged.conf" 2>&1 |
        tee "$run/said"
    [ ! -s "$run/said" ] || fail "systemd-$each has something to say"
done

# another NAME: a copy of the bundle, to be changed; resum NAME: with hashes of what it holds now
another() { cp -a "$root/media/bundle/$name" "$root/media/bundle/$1"; }
resum() {
    (cd "$root/media/bundle/$1" && rm SHA256SUMS &&
        find . -type f -printf '%P\0' | xargs -0 sha256sum >../sums && mv ../sums SHA256SUMS)
}
old=$(readlink "$root/opt/edged")

step "a new version that fails its own test does not take the old one's place"
another broken
python3 - "$root"/media/bundle/broken/wheels/edged-*.whl <<'PY'
import sys, zipfile

with zipfile.ZipFile(sys.argv[1]) as wheel:
    files = {name: wheel.read(name) for name in wheel.namelist()}
files["edged/cli.py"] = b"def main():\n    raise SystemExit('broken')\n"
with zipfile.ZipFile(sys.argv[1], "w") as wheel:
    for name, data in files.items():
        wheel.writestr(name, data)
PY
resum broken
if inside /media/bundle/broken/deploy/install.sh --no-start; then fail "it was taken"; fi
[ "$(readlink "$root/opt/edged")" = "$old" ] || fail "the link is another"
inside edged --version

step "a good one does, and nothing is left of the others"
another newer
echo "# newer" >>"$root/media/bundle/newer/deploy/locks/cpu.lock"
resum newer
inside /media/bundle/newer/deploy/install.sh --no-start
new=$(readlink "$root/opt/edged")
[ "$new" != "$old" ] || fail "the link is the same"
[ "$(ls "$root/opt/edged.d")" = "${new##*/}" ] || fail "left: $(ls "$root/opt/edged.d")"

step "uninstalled, but for state and settings"
inside "$install" --uninstall
more_than "a state that is kept" ' \./(etc/edged|var/lib/edged)(/| )'
step "purged"
inside "$install" --uninstall --purge
more_than "nothing" '^$'
if inside getent passwd edged; then fail "the user is left"; fi
unchanged "to uninstall nothing" inside "$install" --uninstall
echo "== $suite ($arch): all as it should be"
