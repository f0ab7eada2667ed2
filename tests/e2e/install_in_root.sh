#!/usr/bin/env bash
# Installs a bundle in a fresh Debian, in a chroot, and shows that install.sh keeps its word: a dry run
# and a second run change nothing, what cannot be had is refused before anything is changed, a run
# killed at any stage is made good by the next, the unit verifies, edged passes its own test, a model
# is copied or fetched and fused, a mosquitto takes the users that were made for it, and what is
# uninstalled is gone.
#
#   install_in_root.sh BUNDLE.tar [SUITE [ARCH]]      SUITE: bookworm (default), trixie; ARCH: amd64, arm64
#
# As root, with debootstrap and a network, and for arm64 on another machine qemu-user-static. MIRROR
# names a Debian mirror; the first root is kept in WORK (/var/tmp/edged-roots) for the next time.
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
here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)
trap 'umount "$root/proc" 2>/dev/null || true; rm -rf --one-file-system "$run"' EXIT
mkdir "$root"
tar -xf "$work/$suite-$arch.tar" -C "$root"
mount -t proc proc "$root/proc"
install -d "$root/media/bundle"
cp "$bundle" "$root/media/bundle/"
tar -xf "$bundle" -C "$root/media/bundle"
tar=/media/bundle/${bundle##*/}
install=/media/bundle/$name/deploy/install.sh
options=(--device door --broker broker.invalid --user door --password-file /media/password --no-start
    --model /media/phi3v)
echo "not to be seen" >"$root/media/password"
cp -r "$here/tests/models/phi3v" "$root/media/phi3v" # as it is published: not fused
cp /etc/resolv.conf "$root/etc/resolv.conf"
echo "127.0.0.1 localhost" >"$root/etc/hosts"
# Kills install.sh where $KILL_AT says: a pattern of a function, the command in it, and its arguments.
cat >"$root/media/kill" <<'KILL'
if [ -n "${KILL_AT:-}" ] && [ "${0##*/}" = install.sh ]; then
    set -T
    # shellcheck disable=SC2053
    trap '[[ "${FUNCNAME[0]:-} $BASH_COMMAND  $*" != $KILL_AT ]] || kill -KILL $$' DEBUG
fi
KILL

inside() { chroot "$root" env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 "$@"; }
step() { echo "== $*"; }
fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# ends STATUS COMMAND…: it must end so; what it says is in $run/said
ends() {
    local wanted=$1 status=0
    shift
    "$@" >"$run/said" 2>&1 || status=$?
    cat "$run/said"
    [ $status = "$wanted" ] || fail "it ended with $status, not $wanted"
}
says() { grep -q -- "$1" "$run/said" || fail "it does not say: $1"; }
killed_at() {
    local at=$1 status=0
    shift
    echo "-- killed at: $at"
    inside env BASH_ENV=/media/kill KILL_AT="$at" "$@" >"$run/said" 2>&1 || status=$?
    [ $status = 137 ] || { cat "$run/said"; fail "it ended with $status, and was not killed"; }
}

# listing FORMAT: all that is there; no content changes without its ctime
listing() {
    (cd "$root" && find . -xdev \( -path ./proc -o -path ./run -o -path ./dev -o -path ./media -o -path ./var/tmp \
        -o -path ./tmp -o -path ./var/lib/apt -o -path ./var/cache/apt \
        -o -path ./var/lib/mosquitto -o -path ./var/log/mosquitto \) -prune -o -printf "$1\n" | sort)
}
STRICT='%p %y %m %U:%G %s %T@ %C@ %l'
LOOSE='%p %y %m %U:%G %l'
leftovers() { find "$root/var/tmp" "$root/tmp" -mindepth 1; }

# unchanged WHAT COMMAND…: it must leave everything as it is; what it says is in $run/said
unchanged() {
    local what=$1
    shift
    listing "$STRICT" >"$run/before"
    "$@" >"$run/said" 2>&1 || true
    cat "$run/said"
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

step "what cannot be had is refused, and nothing is changed"
cp -r "$root/media/bundle/$name" "$root/media/bundle/damaged"
wheel=$(echo "$root"/media/bundle/damaged/wheels/numpy-*.whl)
printf X | dd of="$wheel" bs=1 seek=1000 conv=notrunc status=none
unchanged "the damaged bundle" inside "/media/bundle/damaged/deploy/install.sh"
says "is damaged"
rm -rf "$root/media/bundle/damaged"

# as on a box with a network: from an index, which is the bundle's wheels here, and from a hub
PYTHONPATH=$here python3 - "$run" "$here" <<'PY' &
import pathlib, sys, time
from tests.kit.hub import Hub, serve

run, here = map(pathlib.Path, sys.argv[1:])
model = {path.name: path.read_bytes() for path in (here / "tests/models/phi3v").iterdir()}
hub = Hub()
for name in ("someone/phi-onnx", "someone/gated"):
    hub.repositories[name] = {"a" * 40: model}
    hub.refs[name] = {"main": "a" * 40}
hub.gated.add("someone/gated")
with serve(hub):
    (run / "hub").write_text(hub.url)
    while not (run / "end").exists():
        hub.cut_after = 300_000 if (run / "cut").exists() else None
        time.sleep(0.1)
PY
hub=$!
while [ ! -s "$run/hub" ]; do kill -0 $hub && sleep 0.1; done
wheel=$(cd "$root" && echo media/bundle/"$name"/wheels/edged-*.whl)
fetched=(inside env HF_ENDPOINT="$(cat "$run/hub")" PIP_NO_INDEX=1 PIP_FIND_LINKS="/media/bundle/$name/wheels"
    "/media/checkout/deploy/install.sh" --wheel "/$wheel" --device door --no-start)
mkdir "$root/media/checkout"
cp -r "$root/media/bundle/$name"/{deploy,systemd} "$root/media/checkout/"
unchanged "a model that the hub has not" "${fetched[@]}" --model someone/typo
says "has no someone/typo"
unchanged "a model whose terms nobody accepted" "${fetched[@]}" --model someone/gated
says "accept them at"
unchanged "a revision that is not there" "${fetched[@]}" --model someone/phi-onnx --revision v9
says "no revision v9"
unchanged "a hub that is away" "${fetched[@]/#HF_ENDPOINT=*/HF_ENDPOINT=http://127.0.0.1:9}" \
    --model someone/phi-onnx
says "127.0.0.1:9 cannot be reached"
unchanged "an index that is away" "${fetched[@]/#PIP_FIND_LINKS=*/PIP_FIND_LINKS=/nowhere}"
says "cannot be fetched; nothing was changed"

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

for at in "install_version as_edged *" "install_model mv *" "install_settings *" "put mv * */edged.service" \
    "link mv * /opt/edged" "start_service *"; do
    killed_at "$at" "$install" --offline "$tar" "${options[@]}"
done

step "run again"
ends 3 inside "$install" --offline "$tar" "${options[@]}" # there is no broker
says "broker.invalid"
[ -e "$root/var/lib/edged/models/phi3v/edged-fused.json" ] || fail "the model does not see"
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
unchanged "the second run" inside "$install"
says "nothing changed"
unchanged "a run with the same options" inside "$install" --offline "$tar" "${options[@]}"
unchanged "a run with other settings" inside "$install" --device window --no-start

step "what systemd does with its files at boot changes nothing"
for each in sysusers "tmpfiles --create"; do
    # shellcheck disable=SC2086 # two words
    unchanged "systemd-$each" inside systemd-$each "/usr/lib/${each%% *}.d/edged.conf"
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
ends 1 inside /media/bundle/broken/deploy/install.sh
[ "$(readlink "$root/opt/edged")" = "$old" ] || fail "the link is another"
inside edged --version

step "a good one does, and nothing is left of the others"
another newer
echo "# newer" >>"$root/media/bundle/newer/deploy/locks/cpu.lock"
resum newer
ends 3 inside /media/bundle/newer/deploy/install.sh
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

step "without systemd, and with a model of the hub, whose network is cut"
touch "$run/cut" && sleep 0.3
ends 1 "${fetched[@]}" --no-systemd --broker broker.invalid --model someone/phi-onnx
says "it goes on where it was"
[ ! -e "$root/opt/edged" ] || fail "it is in use already"
rm "$run/cut" && sleep 0.3
ends 3 "${fetched[@]}" --no-systemd --broker broker.invalid --model someone/phi-onnx
touch "$run/end" && wait $hub # from here on there is no hub
[ -e "$root/var/lib/edged/models/phi-onnx/edged-fused.json" ] || fail "the model does not see"
[ ! -e "$root/etc/systemd/system/edged.service" ] || fail "there is a unit"
unchanged "a second run, told less" "${fetched[@]:0:8}"
says "nothing changed"
unchanged "a second run, without a hub" "${fetched[@]}" --model someone/phi-onnx
says "nothing changed"
inside "$install" --uninstall --purge
more_than "nothing" '^$'

step "with a mosquitto of its own, killed at every stage"
own=("${fetched[@]:1}" --with-mosquitto --model /media/phi3v)
echo 'Acquire::http::Proxy "http://127.0.0.1:9";' >"$root/media/no-apt"
unchanged "a network without packages" inside env APT_CONFIG=/media/no-apt "${own[@]}"
says "apt-get cannot fetch mosquitto"
for at in "install_mosquitto DEBIAN*" "install_mosquitto sh *" "give put * */certs/server.pem*" \
    "put mv * */credentials/mqtt-password*" "install_mosquitto mosquitto_passwd *" \
    "put mv * */mosquitto/passwords*" "put mv * */conf.d/edged.conf*" "install_mosquitto rm *"; do
    killed_at "$at" "${own[@]}"
done
broker() { # COMMAND…, while mosquitto runs as its unit has it
    inside install -d -o mosquitto /run/mosquitto
    chroot "$root" /usr/sbin/mosquitto -c /etc/mosquitto/mosquitto.conf & # no shell between, to be killed
    local broker=$!
    sleep 1
    kill -0 $broker || fail "mosquitto does not run"
    "$@"
    kill $broker
    wait $broker || true
}
broker ends 0 inside "${own[@]}" # so the box, its cameras and the operator can log in
says "finds nothing wrong"
broker unchanged "a second run, told less" inside "${own[@]:0:7}"
says "all is as it should be"

step "purged, and again: the broker takes the new passwords"
inside "$install" --uninstall --purge
[ -z "$(find "$root/etc/mosquitto" -name '*.pem' -o -name '*.key' -o -name '*.conf' ! -name mosquitto.conf)" ] ||
    fail "files are left in /etc/mosquitto"
ends 3 inside "${own[@]}"
broker ends 0 inside "${own[@]}"

step "what others changed since is left as it is"
echo "use_username_as_clientid true" >>"$root/etc/mosquitto/conf.d/listener-tls.conf"
unchanged "what was edited" inside "${own[@]}"
says "listener-tls.conf was changed by others: left as it is"
inside "$install" --uninstall --purge
[ -e "$root/etc/mosquitto/passwords" ] || fail "a broker of others is broken"
unchanged "another's broker" inside "${own[@]}"
says "already set up here"
rm "$root"/etc/mosquitto/{acl,passwords,certs/*.pem,certs/*.key,conf.d/*.conf}

step "a mosquitto that others set up is left alone"
main=$root/etc/mosquitto/mosquitto.conf
cp "$main" "$run/main"
for line in "listener 8883" "password_file /etc/mosquitto/mine" "acl_file /etc/mosquitto/mine"; do
    echo "$line" >>"$main"
    unchanged "a configuration of others" inside "${own[@]}"
    says "already set up here: /etc/mosquitto/mosquitto.conf: $line"
    cp "$run/main" "$main"
done
cp "$here/deploy/brokers/mosquitto/edged.conf" "$root/etc/mosquitto/conf.d/"
unchanged "a broker set up by hand" inside "${own[@]}"
says "already set up here: /etc/mosquitto/conf.d/edged.conf"
echo "== $suite ($arch): all as it should be"
