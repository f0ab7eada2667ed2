#!/usr/bin/env bash
# Makes a tar with all that deploy/install.sh needs on a box without a network.
#
#   bundle.sh [OPTION]…
#
#   --arch ARCH       the box's processor: aarch64 (default), x86_64
#   --python VERSION  its Python: 3.11 (Debian 12, default), 3.12 (Ubuntu 24.04), 3.13 (Debian 13)
#   --cuda            for an NVIDIA GPU
#   --model DIR       a model's folder to take along
#   --output DIR      where the tar is written (here)
#
# Wheels are taken by the hashes of deploy/locks. On the box: tar -xf BUNDLE, then
# BUNDLE/deploy/install.sh; or install.sh --offline BUNDLE.tar. SHA256SUMS, which is checked there,
# finds damage; against forgery compare the tar's own sha256, which is printed here.
set -Eeuo pipefail
umask 022
export LC_ALL=C
unset CDPATH PYTHONPATH PYTHONHOME

source=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
arch=aarch64 version=3.11 extra=cpu model='' output=.

die() {
    echo "bundle.sh: $1" >&2
    [ -z "${2:-}" ] || echo "bundle.sh: $2" >&2
    exit 1
}

while [ $# -gt 0 ]; do
    case $1 in
        --arch | --python | --model | --output) [ -n "${2:-}" ] || die "$1 needs a value" ;;
    esac
    case $1 in
        --arch) arch=$2 && shift ;;
        --python) version=$2 && shift ;;
        --model) model=${2%/} && shift ;;
        --output) output=$2 && shift ;;
        --cuda) extra=cuda ;;
        -h | --help) sed -n 's/^#   \(.*\)/\1/p' "${BASH_SOURCE[0]}" && exit ;;
        *) die "there is no option $1" "--help lists the options" ;;
    esac
    shift
done
case $arch in aarch64 | x86_64) ;; *) die "--arch is aarch64 or x86_64" ;; esac
case $version in 3.11 | 3.12 | 3.13 | 3.14) ;; *) die "--python is 3.11 to 3.14" ;; esac
if [ -n "$model" ] && [ ! -r "$model/genai_config.json" ]; then
    die "--model $model: there is no genai_config.json in it"
fi
[ -w "$output/." ] || die "--output $output: no folder that can be written"
for each in systemd/edged.service "deploy/locks/$extra.lock" pyproject.toml; do
    [ -r "$source/$each" ] || die "there is no $source/$each" "run it from a complete checkout"
done
python=${PYTHON:-python3}
"$python" -Ic 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
    die "$python is no Python 3.11 or newer with venv" "name one: PYTHON=/path/to/python3.12 $0 …"

work=$(mktemp -d "$output/.bundle.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# edged's own wheel, built by tools from the lock
"$python" -m venv "$work/tools"
pip() { "$work/tools/bin/python" -m pip --disable-pip-version-check --no-input --quiet "$@"; }
pip install --require-hashes --only-binary :all: --requirement "$source/deploy/locks/build.lock"
pip wheel --no-index --no-deps --no-build-isolation --wheel-dir "$work/own" "$source"
own=$(echo "$work"/own/edged-*.whl)
release=${own##*/edged-}
release=${release%%-*}

name=edged-$release-$extra-$arch-py$version
top=$work/$name
mkdir -p "$top/wheels"
mv "$own" "$top/wheels/"
cp -r "$source/deploy" "$source/systemd" "$top/"
find "$top" -name __pycache__ -prune -exec rm -rf {} +

# What the lock says for that box: pip evaluates markers for the Python it runs on.
"$work/tools/bin/python" -I - "$source/deploy/locks/$extra.lock" "$arch" "$version" \
    >"$work/requirements" <<'PY'
import sys
from packaging.markers import Marker

lock, arch, version = sys.argv[1:]
box = {"implementation_name": "cpython", "implementation_version": f"{version}.0", "os_name": "posix",
       "platform_machine": arch, "platform_python_implementation": "CPython", "platform_system": "Linux",
       "python_full_version": f"{version}.0", "python_version": version, "sys_platform": "linux"}
wanted = False
for line in open(lock, encoding="utf-8"):
    if not line.startswith((" ", "#")):
        requirement, _, marker = line.rstrip().removesuffix("\\").partition(";")
        wanted = not marker.strip() or Marker(marker.strip()).evaluate(box)
        line = f"{requirement.strip()} \\\n"
    if wanted and not line.strip().startswith("#"):
        sys.stdout.write(line)
PY
platforms=(--platform "manylinux2014_$arch")
for each in 2_17 2_24 2_26 2_27 2_28 2_31 2_34; do platforms+=(--platform "manylinux_${each}_$arch"); done
pip download --require-hashes --no-deps --only-binary :all: "${platforms[@]}" \
    --implementation cp --python-version "$version" \
    --dest "$top/wheels" --requirement "$work/requirements" ||
    die "not every package has a wheel for $arch, Python $version"

if [ -n "$model" ]; then
    mkdir "$top/models"
    cp -rL --preserve=timestamps "$model" "$top/models/"
fi
printf 'edged=%s\nextra=%s\narch=%s\npython=%s\n' "$release" "$extra" "$arch" "$version" >"$top/BUNDLE"
(cd "$top" && find . -type f ! -name SHA256SUMS -printf '%P\0' | sort -z | xargs -0 sha256sum) \
    >"$work/SHA256SUMS"
mv "$work/SHA256SUMS" "$top/"
tar -cf "$work/$name.tar" -C "$work" --owner=0 --group=0 --numeric-owner --sort=name "$name"
sync "$work/$name.tar"
mv -f "$work/$name.tar" "$output/$name.tar"
(cd "$output" && sha256sum "$name.tar")
du -h --apparent-size "$output/$name.tar"
