#!/usr/bin/env bash
# Prove the Arm image on a Debian x86-64 machine, from nothing: make a Debian 12 for arm64, build
# Dockerfile.arm64 on it, run it under qemu as a container runtime would, and compare what the small
# model says there with what it says here. Emulation is slow, count on an hour; a run that was broken
# off goes on where it was. `make arm64` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'TEXT'
usage: deploy/arm64-check.sh [--cache DIR] [--mirror URL] [--python PYTHON]

  --cache DIR      where the Debian root and the images are kept (default: $ARM64_CACHE, else
                   build/arm64)
  --mirror URL     Debian's mirror (default: http://deb.debian.org/debian)
  --python PYTHON  the interpreter of this machine's edged (default: .venv/bin/python)
TEXT
}

fail() {
    echo "arm64-check: $1" >&2
    exit "${2:-1}"
}

cache=${ARM64_CACHE:-build/arm64}
mirror=http://deb.debian.org/debian
python=.venv/bin/python
while [ $# -gt 0 ]; do
    case $1 in
        --cache | --mirror | --python)
            [ -n "${2:-}" ] || fail "$1 needs a value" 2
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
done

[ "$(uname -m)" = x86_64 ] || fail "this is for x86-64; on the box itself: deploy/build-image.sh"
[ "$(id -u)" = 0 ] || fail "it makes a Debian root and mounts things: run it as root"
command -v apt-get >/dev/null || fail "it takes its tools from Debian: run it on a Debian or Ubuntu"
[ -x "$python" ] || fail "$python is not there: make setup"
mkdir -p "$cache"
cache=$(realpath "$cache")
python=$(realpath --no-symlinks "$python")

say() { printf '\n== %s\n' "$*"; }

say "tools"
missing=()
for each in buildah:buildah debootstrap:debootstrap qemu-aarch64-static:qemu-user-static \
    update-binfmts:binfmt-support mosquitto:mosquitto; do
    PATH=$PATH:/usr/sbin command -v "${each%:*}" >/dev/null || missing+=("${each#*:}")
done
if [ ${#missing[@]} -gt 0 ]; then
    apt-get -qq update
    DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
        "${missing[@]}" >/dev/null
fi
if [ ! -e /proc/sys/fs/binfmt_misc/qemu-aarch64 ]; then
    [ -e /proc/sys/fs/binfmt_misc/register ] ||
        mount -t binfmt_misc binfmt_misc /proc/sys/fs/binfmt_misc
    update-binfmts --enable qemu-aarch64
fi
buildah --version

# Images of its own, and neither overlay nor namespaces: so that it runs inside a container as well.
cat >"$cache/storage.conf" <<TEXT
[storage]
driver = "vfs"
graphroot = "$cache/storage"
runroot = "$cache/run"
TEXT
export CONTAINERS_STORAGE_CONF=$cache/storage.conf BUILDAH_ISOLATION=chroot
tag=localhost/edged:arm64-check
base=localhost/debian-arm64:12

scratch=$(mktemp --directory)
container=
first=
broker=
clean() {
    [ -z "$first" ] || kill -KILL "$first" 2>/dev/null || true  # and with process 1 all inside
    [ -z "$broker" ] || kill "$broker" 2>/dev/null || true
    [ -z "$container" ] || buildah rm "$container" >/dev/null || true
    rm -rf --one-file-system "$scratch"
}
trap clean EXIT

if ! buildah inspect --type image "$base" >/dev/null 2>&1; then
    if [ ! -e "$cache/debian-12-arm64.tar" ]; then
        say "a Debian 12 for arm64, from $mirror"
        root=$scratch/root
        debootstrap --arch arm64 --variant minbase --include ca-certificates \
            bookworm "$root" "$mirror" >"$cache/debootstrap.log" 2>&1 ||
            fail "debootstrap failed, see $cache/debootstrap.log"
        rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
        tar --create --file "$cache/debian-12-arm64.tar.new" --one-file-system \
            --exclude './dev/*' --exclude './proc/*' --exclude './sys/*' --directory "$root" .
        mv "$cache/debian-12-arm64.tar.new" "$cache/debian-12-arm64.tar"
        rm -rf --one-file-system "$root"
    fi
    say "that Debian as a base image"
    container=$(buildah from --arch arm64 scratch)
    buildah add --quiet "$container" "$cache/debian-12-arm64.tar" / >/dev/null
    buildah config --arch arm64 --cmd /bin/bash "$container"
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    container=
fi

say "the image"
begin=$SECONDS
deploy/build-image.sh --with buildah --base "$base" --tag "$tag"
build_s=$((SECONDS - begin))

# What stands in the image says how it is run.
container=$(buildah from --pull-never --arch arm64 "$tag")
root=$(buildah mount "$container")
of() { buildah inspect --type image --format "$1" "$tag"; }
user=$(of '{{.Docker.Config.User}}')
mapfile -t environment < <(of '{{range .Docker.Config.Env}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t entrypoint < <(of '{{range .Docker.Config.Entrypoint}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t command < <(of '{{range .Docker.Config.Cmd}}{{println .}}{{end}}' | sed '/^$/d')
mapfile -t healthcheck < <(of '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' |
    sed '/^$/d; 1{/^CMD$/d}')

state=$scratch/state
install --directory --mode 0700 --owner "${user%:*}" --group "${user#*:}" "$state"

# inside COMMAND…: run it in the image as a runtime would: process 1 of a pid namespace, the image's
# user and environment, a read-only root, /tmp in memory, the state volume. No /sys: onnxruntime
# would read there what this machine's processor is, and take it for the emulated one.
inside() {
    # shellcheck disable=SC2016  # meant for the inner shell
    unshare --mount --pid --fork --kill-child --propagation private bash -euc '
        root=$1 state=$2 user=$3
        shift 3
        mount --bind "$root" "$root"
        mount -t proc proc "$root/proc"
        mount -t tmpfs tmpfs "$root/tmp"
        mount -t tmpfs -o mode=0755 tmpfs "$root/dev"
        mkdir -m 1777 "$root/dev/shm"
        for each in null zero full random urandom; do
            touch "$root/dev/$each"
            mount --bind "/dev/$each" "$root/dev/$each"
        done
        mount --bind "$state" "$root/var/lib/edged"
        mount -o remount,bind,ro "$root"
        cd "$root"
        exec chroot --userspec "$user" "$root" env -i "$@"
    ' - "$root" "$state" "$user" "${environment[@]}" "${settings[@]}" "$@"
}

say "the image's user and root"
settings=()
# shellcheck disable=SC2016  # meant for the inner shell
inside sh -euc '
    uname -m
    id
    touch /tmp/there "$STATE_DIRECTORY/there"
    rm "$STATE_DIRECTORY/there"
    for each in /opt/edged/there /etc/there /root/there; do
        if touch "$each" 2>/dev/null; then echo "$each could be written" >&2; exit 1; fi
    done
    for each in cc gcc g++ make pip pip3; do
        if command -v "$each"; then echo "there is a $each" >&2; exit 1; fi
    done
    edged --version
'

say "the same tokens as here"
cat >"$scratch/tokens.py" <<'PYTHON'
"""Print what each token of greedy answers of the small model says, as JSON."""

import json

from edged.engine.genai import GenaiBackend
from edged.engine.messages import Order
from edged.ports import Task
from edged.selftest import model_dir

# What it was taught: to other questions two tokens may be as likely as each other, and then the last
# bits decide, which are not the same on all processors.
PROMPTS = ("pump 3: 61 C, limit 65. Check this.", "What is the capital of France?", "Tell me a joke.")
READING = {"device": {"type": "string"}, "value": {"type": "integer"}, "limit": {"type": "integer"}}
SCHEMA = {
    "type": "object",
    "properties": READING,
    "required": [*READING],
    "additionalProperties": False,
}
READINGS = ("pump 3: 61 C, limit 65.", "Tank 2: 12 bar, minimum 20.", "fan 7: 415 rpm, limit 900.")


class Desk:
    """Keeps the text of each token."""

    def __init__(self):
        self.said = []
        self.stage = None

    def begin(self, stage, **_):
        self.stage = stage

    def step(self, *, text="", **_):
        if self.stage == "token":
            self.said.append(text)

    def planned(self, plan):
        pass

    def check(self):
        pass


backend = GenaiBackend()
backend.load(Order(model="small", path=str(model_dir()), provider="cpu", threads=1, max_context=512))
answers = []
for schema, prompts in ((None, PROMPTS), (SCHEMA, READINGS)):
    for prompt in prompts:
        desk = Desk()
        turn = {"role": "user", "content": prompt}
        done = backend.run(
            Task(job=1, client=None, messages=(turn,), max_tokens=64, schema=schema), desk
        )
        [answer] = done.answers
        answers.append(
            {"prompt": answer.usage.prompt_tokens, "tokens": desk.said, "end": answer.finish_reason}
        )
print(json.dumps(answers))
PYTHON
here() { ORT_DISABLE_TELEMETRY=1 PYTHONPATH=$PWD "$python" "$@"; }
here - <"$scratch/tokens.py" >"$scratch/here.json"
inside python - <"$scratch/tokens.py" >"$scratch/arm64.json"
cmp "$scratch/here.json" "$scratch/arm64.json" || {
    diff <(here -m json.tool "$scratch/here.json") <(here -m json.tool "$scratch/arm64.json") |
        head -n 20 >&2 || true
    fail "the same prompts give other tokens on arm64"
}
tokens=$(here -c 'import json, sys; print(sum(len(a["tokens"]) for a in json.load(sys.stdin)))' \
    <"$scratch/here.json")
echo "$tokens tokens of 6 greedy answers, 3 of them under a JSON schema: the same"

say "the daemon, with a broker and a question"
port=$(here -c 'from edged.sandbox import free_port; print(free_port())')
PATH=$PATH:/usr/sbin mosquitto -p "$port" >"$scratch/broker.log" 2>&1 &
broker=$!
model=$(inside python -c 'from edged.selftest import model_dir; print(model_dir())')
settings=(
    "EDGED_DEVICE=arm64-check"
    "EDGED_MQTT__HOST=127.0.0.1" # no runtime wrote an /etc/hosts
    "EDGED_MQTT__PORT=$port"
    "EDGED_MODEL__PATH=$model"
    "EDGED_MODEL__THREADS=1"
    "EDGED_MODEL__MAX_CONTEXT=512"
)
log=$scratch/edged.log
await() {  # await SECONDS WHAT COMMAND…: until it succeeds
    local until=$((SECONDS + $1)) what=$2
    shift 2
    until "$@"; do
        [ "$SECONDS" -lt "$until" ] || { tail -n 20 "$log" >&2 && fail "not $what in time"; }
        kill -0 "$daemon" 2>/dev/null || { tail -n 20 "$log" >&2 && fail "it ended before it was $what"; }
        sleep 0.2
    done
}
begin=$(date +%s%N)
inside "${entrypoint[@]}" "${command[@]}" >"$log" 2>&1 &
daemon=$!
until first=$(pgrep --parent "$(pgrep --parent "$daemon")"); do
    kill -0 "$daemon" 2>/dev/null || { cat "$log" >&2 && fail "it did not start"; }
done
await 600 ready grep -q '"state": "ready"' "$log"
start_ms=$((($(date +%s%N) - begin) / 1000000))
echo "ready after $start_ms ms, emulated"
inside "${healthcheck[@]}" | sed -n 1p
inside edged selftest
inside edged selftest --json --set "mqtt.port=$port" >/dev/null || fail "the running edged does not pass its test"
env "${settings[@]}" PYTHONPATH="$PWD" "$python" -m edged ask --max-tokens 16 "What is at the gate?"

say "stopping"
echo "process 1 is $(ps --no-headers -o comm "$first")"
kill -TERM "$first"
status=0
wait "$daemon" || status=$?
first=
tail -n 1 "$log"
[ "$status" = 0 ] || fail "edged ended with $status on SIGTERM"

say "all is well"
size_mb=$(($(du --summarize --bytes --one-file-system "$root" | cut -f1) / 1000000))
base_mb=$(($(stat --format %s "$cache/debian-12-arm64.tar") / 1000000))
echo "size      $size_mb MB unpacked, $base_mb MB of them the base; built in $build_s s"
echo "start     $start_ms ms to ready with the small model, under qemu"
echo "user      $user, read-only root"
echo "tokens    $tokens, as on $(uname -m)"
