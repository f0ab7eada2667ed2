#!/usr/bin/env bash
# Build edged's container image for 64-bit Arm: on such a box, or emulated on an x86-64 machine.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'TEXT'
usage: deploy/build-image.sh [--base IMAGE] [--tag NAME] [--with docker|buildah]

  --base IMAGE   a Debian, from 12 on (default: docker.io/library/debian:bookworm-slim). A tag
                 moves; NAME@sha256:… does not. The digest of the one used is printed. One named
                 localhost/… is taken from this machine.
  --tag NAME     the image's name (default: localhost/edged:VERSION)
  --with NAME    what builds (default: docker if its daemon answers, else buildah)
TEXT
}

fail() {
    echo "build-image: $1" >&2
    exit "${2:-1}"
}

version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' edged/__init__.py)
base=docker.io/library/debian:bookworm-slim
tag=localhost/edged:$version
with=
while [ $# -gt 0 ]; do
    case $1 in
        --base | --tag | --with)
            [ -n "${2:-}" ] || fail "$1 needs a value" 2
            declare "${1#--}=$2"
            shift 2
            ;;
        -h | --help) usage && exit ;;
        *) usage >&2 && exit 2 ;;
    esac
done

# What is missing, and what brings it -------------------------------------------------------------

docker_answers() { command -v docker >/dev/null && docker info >/dev/null 2>&1; }

case $with in
    '')
        if docker_answers; then
            with=docker
        elif command -v buildah >/dev/null; then
            with=buildah
        elif command -v docker >/dev/null; then
            fail "docker's daemon does not answer: systemctl start docker, and be of the group docker"
        else
            fail "there is neither docker nor buildah: apt install buildah"
        fi
        ;;
    docker) docker_answers || fail "docker is not there or its daemon does not answer: apt install docker.io" ;;
    buildah) command -v buildah >/dev/null || fail "buildah is not there: apt install buildah" ;;
    *) usage >&2 && exit 2 ;;
esac

case $(uname -m) in
    aarch64 | arm64) ;;
    arm*) fail "this system is 32-bit and there are no libraries for it: install the 64-bit one" ;;
    *)
        # F: the interpreter is held open, so that it is found inside a container too
        grep -qs '^flags:.*F' /proc/sys/fs/binfmt_misc/qemu-aarch64 ||
            fail "this machine cannot run Arm programs: apt install qemu-user-static binfmt-support"
        ;;
esac

if [ "$with" = docker ] && ! docker buildx version >/dev/null 2>&1 &&
    ! docker version --format '{{.Client.Version}}' | grep -qE '^(19|20|22)\.'; then
    fail "docker lacks BuildKit: apt install docker-buildx (or docker-buildx-plugin)"
fi

# A mirror of PyPI, or a proxy's certificate, that pip uses here serves the build as well; as a
# secret, which stays out of the image.
secrets=$(mktemp -d)
trap 'rm -rf "$secrets"' EXIT
options=()
setting() {  # setting NAME…: pip's setting of the first of these names, environment before files
    local name
    for name; do
        sed -n "s/^:env:\.$name='\(.*\)'\$/\1/p; s/^[a-z]*\.$name='\(.*\)'\$/\1/p" <"$secrets/all"
    done | sed -n 1p
}
python3 -m pip config list >"$secrets/all" 2>/dev/null || true
{
    echo "[global]"
    for name in index-url trusted-host proxy; do
        value=$(setting "$name")
        [ -z "$value" ] || echo "$name = $value"
    done
    value=$(setting timeout default-timeout)
    [ -z "$value" ] || echo "timeout = $value"
    cert=$(setting cert)
    [ -z "$cert" ] || echo "cert = /run/ca.crt"
} >"$secrets/pip.conf"
[ -z "$cert" ] || options+=(--secret "id=ca.crt,src=$cert")
[ "$(wc -l <"$secrets/pip.conf")" = 1 ] || options+=(--secret "id=pip.conf,src=$secrets/pip.conf")

# Build -------------------------------------------------------------------------------------------

case $base in localhost/*) local=yes ;; *) local= ;; esac
case $with in
    docker)
        export DOCKER_BUILDKIT=1
        [ -n "$local" ] || docker pull --quiet --platform linux/arm64 "$base" >/dev/null
        digest=$(docker image inspect --format '{{join .RepoDigests " "}}' "$base" | sed 's/ .*//; s/.*@//')
        options+=(--platform linux/arm64)
        ;;
    buildah)
        [ -n "$local" ] || buildah pull --quiet --arch arm64 "$base" >/dev/null
        digest=$(buildah inspect --type image --format '{{.FromImageDigest}}' "$base")
        # OCI's own format has no health check; layers: a build that was broken off goes on where it was
        options+=(--format docker --layers --arch arm64 --pull-never)
        ;;
esac
options+=(
    --file Dockerfile.arm64
    --build-arg "BASE=$base"
    --label "org.opencontainers.image.version=$version"
    --label "org.opencontainers.image.base.name=$base"
    --label "org.opencontainers.image.base.digest=$digest"
    --tag "$tag"
)
"$with" build "${options[@]}" .

echo "built $tag with $with"
case $base in
    *@sha256:*) echo "base: $base" ;;
    *) echo "base: $base, a tag that may move; to build on the same again: --base ${base%:*}@${digest:-?}" ;;
esac
