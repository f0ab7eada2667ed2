#!/usr/bin/env bash
# Installs edged on Debian 12 and 13, Raspberry Pi OS 12 and 13 (64 bit) and Ubuntu 24.04.
#
#   install.sh [OPTION]…              install, upgrade, or see that all is as it should be
#   install.sh --uninstall [--purge]  remove it; only --purge takes settings, state and models along
#
#   --broker HOST[:PORT]   the MQTT broker; port 8883, or --ca, means TLS
#   --user NAME            the user name for it
#   --password-file FILE   its password, in the first line
#   --ca FILE              the authority (PEM) that the broker's certificate is verified against
#   --device NAME          the device's name in every topic (the host's name)
#   --with-mosquitto       a broker on this box: mosquitto, with TLS, passwords and an ACL
#   --model DIR|ID         a model's folder, which is copied, or owner/name on the Hugging Face hub
#   --model-folder F       the model's folder in that repository, if it holds several
#   --revision R           commit, tag or branch of that repository (main)
#   --cuda                 for an NVIDIA GPU with a driver for CUDA 13, no Jetson
#   --offline BUNDLE       take all from what deploy/bundle.sh made (the tar, or its folder)
#   --wheel FILE           take this wheel of edged, do not build the checkout
#   --no-start             neither enable nor start the service
#   --no-systemd           no service at all
#   --dry-run              say what would be done, change and fetch nothing; needs no root
#   --root DIR             with --dry-run: look at the system below DIR
#
# PYTHON=/path/to/python3.12 names another Python than the system's.
#
# What cannot be finished is said before anything is changed: packages are fetched first, and the hub
# is asked whether it has the model. What can still fail is the fetching of that model, a disk that
# others fill meanwhile, and what a package of the system does when it is installed. Whatever ends it
# in between, run it again: it knows what is still to be done, and what is still to be restarted. A
# new version, and a model, are put beside what runs; the version is tested before it takes its place.
# --cuda, --with-mosquitto, --no-systemd and --no-start are remembered until --uninstall.
#
# It ends with `edged check`. Exit status: 0 done; 1 not done; 2 wrong usage; 3 installed, but edged
# is not ready: what is wrong is said.
set -Eeuo pipefail
umask 022
export LC_ALL=C PATH="$PATH:/usr/sbin:/sbin"
unset CDPATH PYTHONPATH PYTHONHOME

here=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
source=${here%/*} # the checkout, or the unpacked bundle
root='' dry_run=false uninstall=false purge=false start=true systemd=true
broker='' user='' password_file='' ca='' device='' with_mosquitto=false
model='' model_folder='' revision='' cuda=false offline='' wheel='' wheels='' packages=()
changed=false work='' owes=() start_if_enabled=false

# What every step is written with -----------------------------------------------------------------

say() { echo "install.sh: $*"; }

# die WHY WHAT-TO-DO
die() {
    echo "install.sh: $1" >&2
    [ -z "${2:-}" ] || echo "install.sh: $2" >&2
    exit 1
}

# What no `die` foresaw.
failed() {
    [ "$BASH_SUBSHELL" = 0 ] || return 0
    echo "install.sh: this failed: $BASH_COMMAND" >&2
    if $changed; then
        echo "install.sh: see what it said above, then run this again: it goes on from there" >&2
    else
        echo "install.sh: see what it said above; nothing was changed" >&2
    fi
}

usage() { sed -n 's/^#   \(.*\)/\1/p' "${BASH_SOURCE[0]}"; }

# act WHAT: say what is done now; false in a dry run. Which services it makes stale is kept in a
# file of each, so that a run that is ended here leaves the restart to the next.
act() {
    local each
    changed=true
    if $dry_run; then
        echo "would $*"
        return 1
    fi
    for each in "${owes[@]}"; do
        mkdir -p "$base"
        : >>"$base/.restart-$each"
    done
    echo "$*"
}

# put SOURCE TARGET [MODE [OWNER:GROUP]]: a file, there whole or not at all
put() {
    local mode=${3:-644} owner=${4:-root:root}
    if cmp -s "$1" "$2" && [ "$(stat -c '%a %U:%G' "$2")" = "$mode $owner" ]; then return; fi
    if act "write $2"; then
        mkdir -p "${2%/*}" # leaves the rights of one that is there
        install -m "$mode" -o "${owner%:*}" -g "${owner#*:}" "$1" "$2.edged-new"
        sync "$2.edged-new"
        mv -fT "$2.edged-new" "$2"
    fi
}

# link TEXT NAME: a symbolic link, switched at once
link() {
    if [ "$(readlink "$2")" = "$1" ]; then return; fi
    if act "link $2 to $1"; then
        mkdir -p "${2%/*}"
        ln -sfn "$1" "$2.edged-new"
        mv -fT "$2.edged-new" "$2"
    fi
}

# folder PATH MODE OWNER:GROUP
folder() {
    if [ -d "$1" ] && [ "$(stat -c '%a %U:%G' "$1")" = "$2 $3" ]; then return; fi
    if act "make $1"; then install -d -m "$2" -o "${3%:*}" -g "${3#*:}" "$1"; fi
}

# ours FILE: whether it is as `give` wrote it, or not there
ours() { [ ! -e "$1" ] || grep -qsFx -- "$(sha256sum <"$1") ${1#"$root"}" "$root$given"; }

# give SOURCE TARGET [MODE [OWNER:GROUP]]: as put, unless somebody else has written it since
give() {
    if ! ours "$2"; then
        cmp -s "$1" "$2" || say "$2 was changed by others: left as it is"
        return
    fi
    local sum
    sum="$(sha256sum <"$1") $2"
    if ! grep -qsFx -- "$sum" "$given"; then # before the file: it may be ended in between
        (umask 077 && echo "$sum" >>"$given")
        sync "$given"
    fi
    put "$@"
}

# remove PATH…: whatever of it is there
remove() {
    local each
    for each in "$@"; do
        if [ -e "$each" ] || [ -L "$each" ]; then
            if act "remove $each"; then rm -rf -- "$each"; fi
        fi
    done
}

running_systemd() { [ -z "$root" ] && [ -d /run/systemd/system ]; }

in_edged_group() { if getent passwd edged >/dev/null; then echo root:edged; else echo root:root; fi; }

# Arguments ----------------------------------------------------------------------------------------

arguments() {
    local option
    while [ $# -gt 0 ]; do
        option=$1
        case $option in
            --broker | --user | --password-file | --ca | --device | --model | --model-folder | \
                --revision | --offline | --wheel | --root)
                if [ $# -lt 2 ] || [ -z "$2" ]; then wrong "$option needs a value"; fi
                option=${option#--}
                printf -v "${option//-/_}" %s "$2"
                shift
                ;;
            --cuda | --dry-run | --uninstall | --purge | --with-mosquitto)
                option=${option#--}
                printf -v "${option//-/_}" true
                ;;
            --no-start) start=false ;;
            --no-systemd) systemd=false ;;
            -h | --help)
                usage
                exit 0
                ;;
            *) wrong "there is no option $option" ;;
        esac
        shift
    done
    if [ -n "$root" ]; then
        $dry_run || wrong "--root goes with --dry-run only"
        [ -d "$root" ] || wrong "--root: no such folder"
        root=$(readlink -f -- "$root")
    fi
    if $purge && ! $uninstall; then wrong "--purge goes with --uninstall only"; fi
    if $uninstall; then
        if [ -n "$broker$user$password_file$ca$device$model$offline$wheel" ] || $with_mosquitto || $cuda
        then wrong "--uninstall takes no other option than --purge and --dry-run"; fi
        return
    fi
    if $with_mosquitto && [ -n "$broker$user$password_file$ca" ]; then
        wrong "--with-mosquitto makes its own broker: leave out --broker, --user, --password-file, --ca"
    fi
    if $with_mosquitto && ! $systemd; then wrong "--with-mosquitto needs systemd"; fi
    if [ -n "$offline" ] && [ -n "$wheel" ]; then wrong "--offline has a wheel: leave out --wheel"; fi
    if [ -n "$user" ] && [ -z "$password_file" ]; then wrong "--user needs --password-file"; fi
    if [ -n "$password_file" ] && [ -z "$user" ]; then wrong "--password-file needs --user"; fi
    if [ -n "$user$ca" ] && [ -z "$broker" ]; then wrong "--user and --ca need --broker"; fi
    if [ -n "$model_folder$revision" ] && [ -z "$model" ]; then
        wrong "--model-folder and --revision need --model ID"
    fi
}

wrong() {
    echo "install.sh: $1; --help lists the options" >&2
    exit 2
}

# Checks: nothing is changed here ------------------------------------------------------------------

base=/opt/edged.d    # every installed version, in a folder of its own
current=/opt/edged   # a link to the one in use
state=/var/lib/edged
config=/etc/edged
given=$config/mosquitto.sha256 # what was written for mosquitto
units=/etc/systemd/system

check_box() {
    local ID='' VERSION_ID='' PRETTY_NAME=''
    $dry_run || [ "$(id -u)" = 0 ] || die "only root may install" "run it as root: sudo $0 …"
    if ! $dry_run; then
        exec 9</etc
        flock -n 9 || die "another install.sh is at work" "wait until it has ended"
    fi
    [ "$(uname -s)" = Linux ] || die "this is no Linux"
    [ -r "$root/etc/os-release" ] || die "there is no $root/etc/os-release: what system is this?"
    # shellcheck source=/dev/null
    . "$root/etc/os-release"
    case $ID-$VERSION_ID in
        debian-12 | debian-13 | raspbian-12 | raspbian-13 | ubuntu-22.04 | ubuntu-24.04) ;;
        *) die "${PRETTY_NAME:-$ID $VERSION_ID} is no system this was made for" \
            "Debian or Raspberry Pi OS 12 or 13, Ubuntu 24.04; elsewhere use the container image" ;;
    esac
    arch=$(uname -m)
    case $arch in
        x86_64 | aarch64) ;;
        *) die "there is no onnxruntime-genai for $arch" "it needs a 64-bit system (x86_64, aarch64)" ;;
    esac
    if [ "$(getconf LONG_BIT)" != 64 ]; then
        die "the programs of this system are 32-bit, only its kernel is not" \
            "install the 64-bit Raspberry Pi OS"
    fi
    if $systemd && [ -z "$root" ] && ! command -v systemctl >/dev/null; then
        die "there is no systemd here" "add --no-systemd, and start edged by what this box has"
    fi
    if [ -e "$root$current" ] && [ ! -L "$root$current" ]; then
        die "$current is there, and not made by this" "move it away: mv $current $current.old"
    fi
}

# What was asked for when edged was installed holds until it is uninstalled.
recall() {
    local was=$root$base/.options option
    [ -r "$was" ] || return 0
    while read -r option; do
        case $option in
            --cuda)
                if $cuda; then continue; fi
                cuda=true
                ;;
            --with-mosquitto)
                if $with_mosquitto || [ -n "$broker$user$password_file$ca" ]; then continue; fi
                with_mosquitto=true
                ;;
            --no-systemd)
                if ! $systemd; then continue; fi
                systemd=false
                ;;
            --no-start) # what was started by hand since is looked after as any other
                if $start; then start_if_enabled=true; fi
                continue
                ;;
            *) continue ;;
        esac
        say "$option, as when it was installed (--uninstall forgets it)"
    done <"$was"
    if ! $systemd && [ -e "$root$units/edged.service" ]; then
        die "edged is a service here" "install.sh --uninstall first: settings and models stay"
    fi
}

check_python() {
    local each found='' said
    for each in ${PYTHON:-/usr/bin/python3 /usr/bin/python3.13 /usr/bin/python3.12 /usr/bin/python3.11}
    do
        each=$(command -v "$each") || continue
        said=$("$each" -Ic 'import sys; print(*sys.version_info[:2], sys.implementation.name)' 2>&1) ||
            die "$each does not run: ${said##*$'\n'}" "name another: PYTHON=/path/to/python3.12 $0 …"
        case $said in
            '3 11 cpython' | '3 12 cpython' | '3 13 cpython' | '3 14 cpython')
                python=$each
                python_version=${said% *}
                python_version=${python_version/ /.}
                break
                ;;
        esac
        found=${found:-$each is ${said}}
    done
    [ -n "${python:-}" ] || die \
        "edged needs Python 3.11 to 3.14; ${found:-there is no ${PYTHON:-/usr/bin/python3}}" \
        "name one (PYTHON=/path/to/python3.12 $0 …; one comes with: uv python install --install-dir /opt/python 3.12), or use the container image"
    "$python" -Ic 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module" "apt-get install python${python_version}-venv"
    each=$(readlink -f "$("$python" -Ic 'import sys; print(sys._base_executable)')")
    case $each in
        /home/* | /root/* | /run/user/*)
            $systemd && die "$each lies where the service may not look (ProtectHome)" \
                "name one that lies elsewhere: PYTHON=/usr/bin/python3 $0 …" ;;
    esac
    if [ "$(id -u)" = 0 ]; then
        (cd / && setpriv --reuid=65534 --regid=65534 --clear-groups "$each" -Ic '') 2>/dev/null ||
            die "$each can be run by root only" "it must be readable for all, with what it needs"
    fi
}

# Sets `source` to the bundle, unpacked and compared with its own list of hashes.
check_bundle() {
    if [ -z "$offline" ] && [ -z "$wheel" ] && [ -f "$source/BUNDLE" ]; then offline=$source; fi
    if [ -n "$offline" ]; then
        local bundle=$offline
        [ -r "$bundle" ] || die "--offline $bundle: cannot be read" "name the tar that bundle.sh made"
        if [ ! -d "$bundle" ]; then
            room_for /var/tmp "$(stat -c %s "$bundle")"
            enough_room
            need=()
            tar -xf "$bundle" -C "$work" --no-same-owner --no-same-permissions ||
                die "$offline: cannot be unpacked" "copy it here again"
            bundle=$(echo "$work"/*/)
        fi
        [ -f "$bundle/BUNDLE" ] ||
            die "$offline is no bundle of bundle.sh" "make one: deploy/bundle.sh --help"
        source=$(cd "$bundle" && pwd -P)
        (cd "$source" && sha256sum --check --strict --quiet SHA256SUMS) >&2 ||
            die "$offline is damaged: its files are not those of its SHA256SUMS" "copy it here again"
        [ "$(cd "$source" && find . -type f ! -name SHA256SUMS -printf '%P\n' | sort)" = \
            "$(cut -c67- "$source/SHA256SUMS" | sort)" ] ||
            die "$offline has files that its SHA256SUMS does not name" "copy it here again"
        said() { sed -n "s/^$1=//p" "$source/BUNDLE"; }
        [ "$(said arch)" = "$arch" ] ||
            die "$offline is for $(said arch), this box is $arch" "make one with --arch $arch"
        [ "$(said python)" = "$python_version" ] ||
            die "$offline is for Python $(said python), $python is $python_version" \
                "make one with --python $python_version, or name such a Python by PYTHON="
        [ "$(said extra)" = "$extra" ] ||
            die "$offline is made for $(said extra), this is to be $extra" \
                "take another, or add --cuda; what edged was installed with, --uninstall forgets"
        wheel=$(echo "$source"/wheels/edged-*.whl)
        wheels=$source/wheels
        if [ -z "$model" ]; then
            for model in "$source"/models/*/; do model=${model%/}; done
            [ -d "$model" ] || model=
        fi
    elif [ -n "$wheel" ]; then
        case ${wheel##*/} in edged-*.whl) ;; *) die "--wheel $wheel: no wheel of edged" ;; esac
        [ -r "$wheel" ] || die "--wheel $wheel: cannot be read"
        wheel=$(readlink -f "$wheel")
    elif [ ! -f "$source/pyproject.toml" ]; then
        die "there is no edged beside this script" \
            "run it from a checkout or an unpacked bundle, or add --offline BUNDLE or --wheel FILE"
    fi
    lock=$source/deploy/locks/$extra.lock
    for each in "$lock" "$source"/systemd/edged.{service,sysusers,tmpfiles}; do
        [ -r "$each" ] || die "there is no $each" "this copy is incomplete: get it again"
    done
}

check_gpu() {
    $cuda || return 0
    if [ -e "$root/etc/nv_tegra_release" ] || grep -qs tegra "$root/proc/device-tree/compatible"; then
        die "the published CUDA wheels hold no code for a Jetson's GPU" \
            "use the Jetson image (deploy/jetson), or leave out --cuda to compute on its CPU"
    fi
    [ -n "$root" ] || [ -e /proc/driver/nvidia/version ] ||
        die "--cuda: no NVIDIA driver is loaded here" "install it, or leave out --cuda"
}

# Sets `model_dir`, where the model will be.
check_model() {
    model_dir='' sees=false
    [ -n "$model" ] || return 0
    local name
    if [ -d "$model" ]; then
        if [ -n "$model_folder$revision" ]; then
            wrong "$model is a folder: --model-folder and --revision are for the hub"
        fi
        model=$(readlink -f "$model")
        name=${model##*/}
        [ -r "$model/genai_config.json" ] ||
            die "--model $model: there is no genai_config.json in it" \
                "name the folder that holds it, one made for onnxruntime-genai"
        [ -z "$(find -L "$model" -type f ! -readable -print -quit)" ] ||
            die "--model $model: not all of its files can be read"
        if grep -Eqs '"type": *"phi3v"' "$model/genai_config.json"; then sees=true; fi
    elif [[ $model =~ ^[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$ ]]; then
        name=${model##*/}
    else
        die "--model $model: no such folder, and no owner/name of the hub"
    fi
    [[ $name =~ ^[A-Za-z0-9_][A-Za-z0-9._-]*$ ]] ||
        die "--model: '$name' does not do as a name" "rename the folder to letters, digits, . _ -"
    model_dir=$state/models/$name
    local part=$root$state/models/.$name.part said
    if [ ! -d "$model" ]; then
        if [ -d "$root$model_dir" ]; then
            said=$(hub compare "$root$model_dir") || die "$model_dir is there, and ${said##*$'\n'}" \
                "leave --model out to keep it; remove it to have the other: rm -r $model_dir"
        else
            [ -z "$offline" ] || die "--offline cannot fetch $model" "put it into the bundle: --model"
            said=$(hub size) || die "${said%%$'\n'*}" "${said##*$'\n'}"
            room_for "$state" "$said" "$part"
        fi
    elif [ "$model" != "$model_dir" ]; then
        if [ ! -d "$root$model_dir" ]; then
            room_for "$state" "$(du -sbL "$model" | cut -f1)" "$part"
        elif [ "$(listing "$model")" != "$(listing "$root$model_dir")" ]; then
            die "$model_dir is there, and is not $model" "rename yours, or remove that one"
        fi
    fi
}

# hub compare DIR: how DIR is another than what is asked for, nobody else being asked; hub size: the
# bytes that the hub would send. `edged models pull`, which does the rest, is not installed yet.
hub() {
    "$python" -I - "$model" "$model_folder" "$revision" "$@" 2>&1 <<'PY'
import json, os, pathlib, sys
from urllib import error, parse, request

identity, folder, revision, what, *rest = sys.argv[1:]
if what == "compare":
    try:
        there = json.loads(pathlib.Path(rest[0], "edged-source.json").read_bytes())
    except (OSError, ValueError):
        sys.exit(f"was not fetched from {identity}")
    if there["repository"] != identity or folder.strip("/") not in ("", there["folder"] or "."):
        sys.exit(f"is {there['repository']} {there['folder']}")
    if revision not in ("", there["revision"], there["commit"]):
        sys.exit(f"is {identity} at {there['commit']} ({there['revision']}), not {revision}")
    sys.exit()

where = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
token = os.environ.get("HF_TOKEN", "")


class Stay(request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def ask(path, method="GET", *handlers):
    asked = request.Request(where + parse.quote(path, safe="/?="), method=method)
    if token:
        asked.add_unredirected_header("Authorization", f"Bearer {token}")
    try:
        with request.build_opener(*handlers).open(asked, timeout=30) as answer:
            return answer.read()
    except error.HTTPError as refused:
        if 300 <= refused.code < 400 and handlers:
            return b""
        code = refused.headers.get("X-Error-Code") or refused.code
        if code == "RevisionNotFound":
            sys.exit(f"{identity} has no revision {revision}\nsee to its spelling")
        if code in ("GatedRepo", 403):
            sys.exit(f"{identity} is given only to those who accepted its terms\n"
                     f"accept them at {where}/{identity}, and set HF_TOKEN")
        if refused.code in (401, 404):
            sys.exit(f"{where} has no {identity}\nsee to its spelling; if it is private, set HF_TOKEN")
        sys.exit(f"{where} does not say what {identity} is: {refused}\nrun this again later")
    except OSError as broken:
        sys.exit(f"{where} cannot be reached: {getattr(broken, 'reason', broken)}\n"
                 "see to the network, or name a model's folder with --model")


revision = revision or "main"
answer = ask(f"/api/models/{identity}/revision/{parse.quote(revision, safe='')}?blobs=true")
try:
    answer = json.loads(answer)
except ValueError:
    sys.exit(f"{where} does not answer as the hub does\nsee to the network, or to HF_ENDPOINT")
files = {pathlib.PurePosixPath(each["rfilename"]): each.get("size") or 0 for each in answer["siblings"]}
models = sorted(str(path.parent) for path in files if path.name == "genai_config.json")
wanted = str(pathlib.PurePosixPath(folder.strip("/"))) if folder else models[0] if len(models) == 1 else ""
if not models:
    sys.exit(f"{identity} holds no genai_config.json\n"
             "take a repository made for onnxruntime-genai; their names end in -onnx")
if wanted not in models:
    sys.exit(f"{identity} has no model in {folder}\nit has: {', '.join(models)}" if folder else
             f"{identity} holds several models\nadd --model-folder, one of: {', '.join(models)}")
ask(f"/{identity}/resolve/{answer['sha']}/{pathlib.PurePosixPath(wanted, 'genai_config.json')}", "HEAD", Stay)
kinds = (".onnx", ".data", ".onnx_data", ".json", ".model", ".txt", ".md")
print((100 << 20) + sum(size for path, size in files.items()
                        if str(path.parent) == wanted and path.name.endswith(kinds)))
PY
}

# listing DIR: what tells a model's folder from another without reading all of it
listing() {
    (cd "$1" && find -L . -type f ! -name 'edged-fused.*' -printf '%P %s %Ts\n' | sort)
}

check_settings() {
    local host=$broker port='' tls='' said
    if [[ $host =~ ^(\[[0-9A-Fa-f:]+\]|[^:]+):([0-9]+)$ ]]; then
        host=${BASH_REMATCH[1]} port=${BASH_REMATCH[2]}
    fi
    host=${host#[} host=${host%]}
    [[ $host =~ ^[A-Za-z0-9._:-]*$ ]] || die "--broker: '$host' is no host name and no address"
    if [ "$port" = 8883 ] || [ -n "$ca" ]; then tls=true; fi
    if [ -n "$device" ]; then
        [[ $device =~ ^[A-Za-z0-9_-]{1,64}$ && $device != reply ]] ||
            die "--device: '$device' does not do" "up to 64 of A-Z a-z 0-9 _ -, and not 'reply'"
    fi
    for each in "$password_file" "$ca"; do
        [ -z "$each" ] || [ -r "$each" ] || die "$each cannot be read"
        [ -z "$each" ] || [ -s "$each" ] || die "$each is empty"
    done
    if $with_mosquitto; then
        if [ -z "$device" ] && [ -r "$root$config/edged.toml" ]; then
            device=$(settings device "$root$config/edged.toml") || device=''
        fi
        device=${device:-$(box_name)}
        [ "$device" != operator ] || die "--device: 'operator' is another user of the broker" "name another"
        host=localhost port=8883 tls=true user=$device
        check_mosquitto
    fi
    wanted=("device=$device" "mqtt.host=$host" "mqtt.port=$port" "mqtt.tls=$tls"
        "mqtt.username=$user" "model.path=$model_dir")
    if $with_mosquitto; then wanted+=(client.username=operator); fi
    [ -e "$root$config/edged.toml" ] || return 0
    if $dry_run && [ ! -r "$root$config/edged.toml" ]; then
        say "what only root may read is not looked at: $config/edged.toml"
        return
    fi
    said=$(settings compare "$root$config/edged.toml" "${wanted[@]}") ||
        die "$config/edged.toml: ${said##*$'\n'}" \
            "the file is yours and is not changed: edit it there, or leave that option out"
}

box_name() { # as edged names a device by its host
    local name
    name=$(hostname | sed 's/[^A-Za-z0-9_-]/-/g')
    echo "${name:0:64}"
}

# settings compare FILE NAME=VALUE…: what the file says otherwise; settings device FILE: the name in
# it; settings render NAME=VALUE…
settings() {
    "$python" -I - "$@" 2>&1 <<'PY'
import json, sys, tomllib

what, *rest = sys.argv[1:]
types = {"mqtt.port": int, "mqtt.tls": json.loads}
wanted = {}
for name, value in (each.split("=", 1) for each in rest if "=" in each):
    if value:
        wanted[name] = types.get(name, str)(value)
if what != "render":
    try:
        with open(rest[0], "rb") as file:
            table = tomllib.load(file)
    except (OSError, ValueError) as error:
        sys.exit(f"cannot be read: {error}")
    if what == "device":
        print(table.get("device", ""))
    table |= {f"{name}.{key}": value for name, inner in table.items() if isinstance(inner, dict)
              for key, value in inner.items()}
    for name, value in wanted.items():
        if table.get(name) != value:
            sys.exit(f"{name} is {json.dumps(table.get(name))} there, not {json.dumps(value)}")
else:
    print("# edged: `edged schema config --format markdown` explains every setting, `edged check` looks")
    print("# at what stands here. Passwords and keys are files in /etc/edged/credentials.")
    section = ""
    for name, value in wanted.items():
        begin, _, key = name.rpartition(".")
        if begin != section:
            print(f"\n[{begin}]")
            section = begin
        print(f"{key} = {json.dumps(value, ensure_ascii=False)}")
PY
}

check_mosquitto() {
    local conf=$root/etc/mosquitto files=() each said instead="name it instead: --broker localhost"
    for each in make-certs.sh mosquitto/{edged,listener-tls}.conf mosquitto/acl; do
        [ -r "$source/deploy/brokers/$each" ] ||
            die "there is no $source/deploy/brokers/$each" "this copy is incomplete: get it again"
    done
    if [ ! -e "$root$given" ]; then # nothing of it is ours: then nothing may be there
        for each in certs/{ca.pem,server.pem,server.key} passwords acl conf.d/{edged,listener-tls}.conf; do
            [ ! -e "$conf/$each" ] || die "mosquitto is already set up here: $conf/$each" "$instead"
        done
        if [ -e "$conf/mosquitto.conf" ]; then
            files=("$conf/mosquitto.conf")
            said=$(sed -n 's/^[[:space:]]*include_dir[[:space:]]\+//p' "$conf/mosquitto.conf")
            [[ $'\n'$said$'\n' = *$'\n'/etc/mosquitto/conf.d$'\n'* ]] ||
                die "$conf/mosquitto.conf does not include /etc/mosquitto/conf.d" "$instead"
            for each in $said; do files+=("$root$each"/*.conf); done
            for each in "${!files[@]}"; do [ -e "${files[$each]}" ] || unset "files[$each]"; done
            # what goes with ours; a broker would not start with another password file or listener,
            # and whom it serves now would be cut off
            said=$(awk '!/^[[:space:]]*(#|$)/ && $1 !~ /^(include_dir|pid_file|persist.*|log_.*)$/ {
                print FILENAME ": " $0
                exit
            }' "${files[@]}")
            [ -z "$said" ] || die "mosquitto is already set up here: $said" "$instead"
        fi
        if [ -z "$root" ]; then
            ! connected 8883 0A || die "something listens on port 8883 already" "$instead"
            if command -v mosquitto >/dev/null && connected 1883 01; then
                die "there are clients on port 1883, which would be closed" "$instead"
            fi
        fi
    fi
    packages=()
    for each in mosquitto openssl; do command -v $each >/dev/null || packages+=("$each"); done
    if [ ${#packages[@]} = 0 ]; then return; fi
    [ -z "$offline" ] || die "${packages[*]} is not installed, and --offline cannot fetch it" \
        "bring its packages first (mosquitto, libmosquitto1, openssl), or use another --broker"
    command -v apt-get >/dev/null || die "${packages[*]} is not installed, and there is no apt-get"
}

# connected PORT STATE: whether a local TCP port is in that state (0A: listening, 01: in use)
connected() {
    awk -v port=":$(printf %04X "$1")" -v state="$2" \
        'substr($2, length($2) - 4) == port && $4 == state { found = 1 } END { exit !found }' \
        /proc/net/tcp /proc/net/tcp6 2>/dev/null
}

# Room: what is needed is added up by file system, and compared once.
declare -A need=() place=()

# room_for FOLDER BYTES [PATH…]: less what is there of these, which a run that was ended has left
room_for() {
    local at=$root$1 bytes=$2 device each
    shift 2
    for each in "$@"; do
        [ ! -e "$each" ] || bytes=$((bytes - $(du -s -B1 "$each" | cut -f1)))
    done
    while [ ! -d "$at" ]; do at=${at%/*}/; at=${at%/}; at=${at:-/}; done
    device=$(stat -c %d "$at")
    need[$device]=$((${need[$device]:-0} + bytes))
    place[$device]=$at
}

enough_room() {
    local each free
    for each in "${!need[@]}"; do
        free=$(df --output=avail -B1 "${place[$each]}" | tail -n 1)
        [ "${need[$each]}" -lt "$free" ] ||
            die "${place[$each]} has $((free >> 20)) MB free, $((need[$each] >> 20)) MB are needed" \
                "make room, then run this again"
    done
}

# Sets `key`, which names the version: the same sources, lock and Python are the same version.
check_version() {
    local what=$wheel
    if [ -z "$what" ]; then
        what=$(cd "$source" && find edged pyproject.toml README.md LICENSE -type f \
            ! -path '*/__pycache__/*' -print0 | sort -z | xargs -0 sha256sum)
    else
        what=$(sha256sum <"$wheel")
    fi
    key=$({
        echo "$what"
        sha256sum <"$lock"
        "$python" -Ic 'import sys; print(sys.version, sys._base_executable)'
    } | sha256sum | cut -c1-12)
    [ ! -e "$root$base/$key/.complete" ] || return 0
    local left=()
    mapfile -t left < <(others '' 2>/dev/null)
    room_for "$base" "$(if $cuda; then echo 4000000000; else echo 700000000; fi)" "${left[@]}"
    if [ -z "$wheels" ]; then
        room_for /var/tmp "$(if $cuda; then echo 3000000000; else echo 150000000; fi)"
    fi
}

# Fetched first: what is needed of a network, but for a model of the hub ---------------------------

fetch() {
    ! $dry_run || return 0
    if $with_mosquitto && [ ${#packages[@]} != 0 ]; then
        say "fetching ${packages[*]}"
        # update says nothing by its status where it fails; then nothing can be fetched, or all is here
        apt-get -qq update || true
        apt-get -qq install --download-only --yes --no-install-recommends "${packages[@]}" >/dev/null ||
            die "apt-get cannot fetch ${packages[*]}; nothing was changed" \
                "see to the network and to /etc/apt, or name another broker: --broker"
    fi
    if [ -e "$base/$key/.complete" ] || [ -n "$wheels" ]; then return; fi
    say "fetching edged's packages"
    wheels=$work/wheels
    TMPDIR=$work "$python" -m venv "$work/build"
    download --requirement "$lock" --dest "$wheels"
    if [ -z "$wheel" ]; then
        download --requirement "$source/deploy/locks/build.lock" --dest "$work/tools"
        TMPDIR=$work "$work/build/bin/python" -Im pip --disable-pip-version-check --quiet install \
            --no-index --find-links "$work/tools" --require-hashes \
            --requirement "$source/deploy/locks/build.lock"
        TMPDIR=$work "$work/build/bin/python" -Im pip --disable-pip-version-check --quiet wheel --no-index \
            --no-deps --no-build-isolation --wheel-dir "$work/wheel" "$source"
        wheel=$(echo "$work"/wheel/edged-*.whl)
    fi
}

# download OPTION…: wheels only, of the index that this box is set up for
download() {
    TMPDIR=$work "$work/build/bin/python" -m pip --disable-pip-version-check --no-input --quiet \
        --no-cache-dir download --require-hashes --only-binary :all: "$@" ||
        die "edged's packages cannot be fetched; nothing was changed" \
            "see to the network, or bring them along: deploy/bundle.sh makes a bundle for --offline"
}

# Steps: each looks whether it is done already -----------------------------------------------------

install_user() {
    if ! getent passwd edged >/dev/null && act "make the user edged"; then
        # as systemd/edged.sysusers has it, for systems without systemd-sysusers too
        getent group edged >/dev/null || groupadd --system edged
        useradd --system --gid edged --home-dir "$state" --no-create-home \
            --shell /usr/sbin/nologin --comment "edged, answers over MQTT" edged
    fi
    local type path mode user group
    while read -r type path mode user group; do
        [ "$type" = d ] || continue
        # without systemd edged reads its credentials itself
        case $path in */credentials) $systemd || mode=0750 group=edged ;; esac
        folder "$root$path" "${mode#0}" "$user:$group"
    done <"$source/systemd/edged.tmpfiles"
}

install_version() {
    local venv=$base/$key
    if [ ! -e "$root$venv/.complete" ] && act "install edged into $venv (minutes)"; then
        remove_old
        rm -rf "$venv"
        mkdir -p "$base"
        TMPDIR=$work "$python" -m venv "$venv"
        pip install --require-hashes --requirement "$lock"
        pip install --no-deps "$wheel"
        "$venv/bin/python" -Im pip check
        sync -f "$venv"
        touch "$venv/.complete"
    fi
    if ! $dry_run; then
        as_edged "$venv/bin/edged" selftest >"$work/selftest" 2>&1 || {
            tail -n 20 "$work/selftest" >&2
            if [ "$(readlink "$current")" = "${base##*/}/$key" ]; then
                die "edged does not pass its own test any more" \
                    "remove what is damaged, and run this again: rm -r $venv"
            fi
            die "edged does not pass its own test here; what was there goes on as it was"
        }
        echo "edged passes its own test"
    fi
}

switch_version() {
    link "${base##*/}/$key" "$root$current"
    link "$current/bin/edged" "$root/usr/local/bin/edged"
}

# pip install …: of the wheels that were fetched, or brought along
pip() {
    TMPDIR=$work "$base/$key/bin/python" -Im pip --isolated --disable-pip-version-check --no-input --quiet \
        --no-cache-dir "$@" --no-index --find-links "$wheels" --only-binary :all: ||
        die "edged's packages cannot be installed into $base/$key" "see above, then run this again"
}

# as_edged COMMAND…: as the user, and with the credentials and folders, that the service has
as_edged() {
    (cd / && setpriv --reuid=edged --regid=edged --init-groups --no-new-privs \
        env -i PATH="$PATH" HOME="$state" LANG=C.UTF-8 PYTHONDONTWRITEBYTECODE=1 STATE_DIRECTORY="$state" \
        CREDENTIALS_DIRECTORY="$work/credentials" "$@")
}

# in_use VERSION: whether a process runs from it
in_use() {
    local each program
    for each in /proc/[0-9]*/cmdline; do
        program=''
        { IFS= read -r -d '' program <"$each"; } 2>/dev/null || true
        case $program in "$1"/*) return 0 ;; esac
    done
    return 1
}

# others KEY: the versions that are neither that one nor the current one, and that nothing runs from
others() {
    local each
    for each in "$root$base"/*/; do
        each=${each%/}
        case ${each##*/} in
            "$1" | '*' | "$(basename "$(readlink "$root$current")" 2>/dev/null)") ;;
            *)
                if in_use "$each"; then
                    say "$each is still in use; the next run removes it" >&2
                else
                    echo "$each"
                fi
                ;;
        esac
    done
}

remove_old() {
    local old=()
    mapfile -t old < <(others "$key")
    remove "${old[@]}"
}

install_model() {
    [ -n "$model_dir" ] || return 0
    local edged=$base/$key/bin/edged into=$root$model_dir part=$root${model_dir%/*}/.${model_dir##*/}.part
    if [ -d "$into" ]; then
        :
    elif [ -d "$model" ]; then
        if act "copy $model to $into"; then
            rm -rf "$part"
            cp -rL --preserve=timestamps "$model" "$part" ||
                die "$model could not be copied; what was there goes on as it was" \
                    "see above, then run this again"
            chown -R root:root "$part"
            chmod -R u=rwX,go=rX "$part"
            sync -f "$part"
            mv -T "$part" "$into"
        fi
    elif act "fetch $model to $into"; then
        "$edged" models pull "$model" --to "$into" ${model_folder:+--folder "$model_folder"} \
            ${revision:+--revision "$revision"} ||
            die "$model could not be fetched; what was there goes on as it was" \
                "see above, then run this again: it goes on where it was"
    fi
    if grep -Eqs '"type": *"phi3v"' "$into/genai_config.json"; then sees=true; fi
    if $sees && [ ! -e "$into/edged-fused.json" ] && act "fuse $into, so that it sees"; then
        "$edged" models fuse "$into" || die "$into could not be fused" "see above, then run this again"
    fi
}

remember_options() {
    {
        ! $cuda || echo --cuda
        ! $with_mosquitto || echo --with-mosquitto
        $systemd || echo --no-systemd
        if ! $start || $start_if_enabled; then echo --no-start; fi
    } >"$work/options"
    if [ -s "$work/options" ] || [ -e "$root$base/.options" ]; then
        put "$work/options" "$root$base/.options"
    fi
}

install_settings() {
    local mode=600 owner=root:root
    if ! $systemd; then mode=640 owner=root:edged; fi
    if [ -n "$password_file" ]; then
        put "$password_file" "$root$config/credentials/mqtt-password" $mode $owner
    fi
    if [ -n "$ca" ]; then put "$ca" "$root$config/credentials/mqtt-ca" $mode $owner; fi
    if [ ! -e "$root$config/edged.toml" ]; then
        settings render "${wanted[@]}" >"$work/edged.toml"
        put "$work/edged.toml" "$root$config/edged.toml" 640 "$(in_edged_group)"
    fi
}

install_mosquitto() {
    $with_mosquitto || return 0
    local from=$source/deploy/brokers to=$root/etc/mosquitto owes=(edged mosquitto) name
    local authority=$root$config/authority credentials=$root$config/credentials
    if [ ${#packages[@]} != 0 ] && act "install ${packages[*]} by apt-get"; then
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --yes --no-install-recommends \
            "${packages[@]}" >/dev/null 8<&- 9<&- ||
            die "apt-get could not install ${packages[*]}" "mend that (apt-get -f install), then run this again"
    fi
    if $dry_run; then
        [ -e "$to/conf.d/edged.conf" ] || act "make certificates and passwords, write $to" || true
        return 0
    fi
    if [ ! -e "$authority/server.pem" ] && act "make an authority and a certificate in $authority"; then
        install -d -m 700 "$authority"
        local names=(localhost 127.0.0.1)
        name=$(hostname)
        if [[ $name =~ ^[A-Za-z0-9.-]+$ ]]; then names=("$name" "${name%%.*}.local" "${names[@]}"); fi
        sh "$from/make-certs.sh" "$authority" server "${names[@]}" >/dev/null ||
            die "no certificate could be made in $authority" "see above, then run this again"
    fi
    give "$authority/ca.pem" "$to/certs/ca.pem"
    give "$authority/server.pem" "$to/certs/server.pem"
    give "$authority/server.key" "$to/certs/server.key" 640 root:mosquitto
    give "$authority/ca.pem" "$credentials/mqtt-ca" 600
    for name in mqtt-password client-password; do
        if [ ! -e "$credentials/$name" ]; then
            (umask 077 && head -c 24 /dev/urandom | base64 >"$work/password")
            put "$work/password" "$credentials/$name" 600
        fi
    done
    if [ ! -e "$to/passwords" ]; then # yours from then on, as the ACL
        (umask 077 && printf '%s:%s\n' "$device" "$(head -n 1 "$credentials/mqtt-password")" \
            operator "$(head -n 1 "$credentials/client-password")" >"$work/passwords")
        mosquitto_passwd -U "$work/passwords"
        give "$work/passwords" "$to/passwords" 640 root:mosquitto
    fi
    if [ ! -e "$to/acl" ]; then
        sed "s/\bdoor\b/$device/g" "$from/mosquitto/acl" >"$work/acl"
        give "$work/acl" "$to/acl" 640 root:mosquitto
    fi
    give "$from/mosquitto/listener-tls.conf" "$to/conf.d/listener-tls.conf"
    give "$from/mosquitto/edged.conf" "$to/conf.d/edged.conf"
    [ -e "$base/.restart-mosquitto" ] || return 0
    if running_systemd; then
        owes=()
        act "restart mosquitto"
        systemctl restart mosquitto ||
            die "mosquitto does not start with what is in $to" \
                "journalctl -u mosquitto says why; mend it, then run this again"
    fi
    rm "$base/.restart-mosquitto"
}

install_units() {
    $systemd || return 0
    local dropins=() each
    if $cuda; then dropins+=(cuda); fi
    if grep -qs 'Raspberry Pi' "$root/proc/device-tree/model"; then dropins+=(pi-sensors); fi
    put "$source/systemd/edged.sysusers" "$root/usr/lib/sysusers.d/edged.conf"
    put "$source/systemd/edged.tmpfiles" "$root/usr/lib/tmpfiles.d/edged.conf"
    for each in "${dropins[@]}"; do
        put "$source/systemd/edged.service.d/$each.conf" "$root$units/edged.service.d/$each.conf"
    done
    put "$source/systemd/edged.service" "$root$units/edged.service"
}

start_service() {
    ! $dry_run || return 0
    local stale=$base/.restart-edged enabled=false
    if $systemd && systemctl --quiet is-enabled edged 2>/dev/null; then enabled=true; fi
    if $start_if_enabled && ! $enabled; then start=false; fi
    if $systemd && $start && ! $enabled; then act "enable edged" && systemctl --quiet enable edged; fi
    if ! $systemd || ! running_systemd; then
        if ! $systemd && [ -e "$stale" ]; then
            say "an edged that runs goes on as it was until it is started again"
        elif $start && $systemd; then
            say "systemd does not run here (a container, a chroot): enabled, not started"
        fi
        rm -f "$stale"
        return
    fi
    if [ -e "$stale" ]; then systemctl daemon-reload; fi
    # Not waited for: READY is said once the broker answers, and that may take; meanwhile it is
    # `activating`, and must be restarted to see what is new.
    case $(systemctl is-active edged) in
        active | activating | reloading | deactivating)
            if [ ! -e "$stale" ]; then return; fi
            if ! $start; then
                say "edged runs on as it was: systemctl restart edged"
                return
            fi
            act "restart edged" && systemctl restart --no-block edged
            ;;
        *)
            if $start; then
                systemctl reset-failed edged 2>/dev/null || true # it may have been started too often
                act "start edged" && systemctl start --no-block edged
            fi
            ;;
    esac
    rm -f "$stale"
}

# What stands here now, looked at as the service sees it; false if edged is not ready.
look() {
    local each
    install -d -m 700 -o edged -g edged "$work/credentials"
    for each in "$config"/credentials/*; do
        [ ! -f "$each" ] || install -m 400 -o edged -g edged "$each" "$work/credentials/"
    done
    if ! as_edged "$current/bin/edged" check >"$work/check" 2>&1; then
        sed "s|$work/credentials/|$config/credentials/|g" "$work/check"
        say "installed; not ready, for what \`edged check\` found just now. To look again, as root:" \
            "CREDENTIALS_DIRECTORY=$config/credentials edged check"
        return 1
    fi
    say "\`edged check\` finds nothing wrong"
    if ! $systemd || ! running_systemd || ! systemctl --quiet is-enabled edged; then return; fi
    for ((each = 0; each < 300; each++)); do # a large model on a slow card
        case $(systemctl show --property=ActiveState,SubState --value edged | tr '\n' ' ') in
            'active '*) return ;;
            *auto-restart* | failed* | inactive*) break ;;
        esac
        sleep 1
    done
    each=$(systemctl show --property=StatusText --value edged)
    say "installed; not ready, edged is $(systemctl is-active edged || true)${each:+: $each}" \
        "(journalctl -u edged says more)"
    return 1
}

# Ways -------------------------------------------------------------------------------------------

uninstall() {
    $dry_run || [ "$(id -u)" = 0 ] || die "only root may uninstall" "run it as root: sudo $0 …"
    if [ -e "$root$current" ] && [ ! -L "$root$current" ]; then
        die "$current was not made by this" "remove it by hand"
    fi
    if [ -e "$root$units/edged.service" ] && ! $dry_run && command -v systemctl >/dev/null; then
        if running_systemd; then systemctl --quiet stop edged; fi
        if systemctl --quiet is-enabled edged 2>/dev/null; then systemctl --quiet disable edged; fi
    fi
    local each
    for each in "$source"/systemd/edged.service.d/*.conf; do
        remove "$root$units/edged.service.d/${each##*/}"
    done
    if [ -d "$root$units/edged.service.d" ] && ! $dry_run; then
        rmdir --ignore-fail-on-non-empty "$root$units/edged.service.d"
    fi
    remove "$root$units/edged.service" "$root"/usr/lib/{sysusers,tmpfiles}.d/edged.conf
    if [ "$(readlink "$root/usr/local/bin/edged")" = "$current/bin/edged" ]; then
        remove "$root/usr/local/bin/edged"
    fi
    if [ -e "$base/.restart-mosquitto" ] && ! $dry_run && running_systemd; then
        systemctl try-restart mosquitto
    fi
    remove "$root$current" "$root$base"
    if ! $dry_run && running_systemd; then systemctl daemon-reload; fi
    if $purge; then
        purge_mosquitto
        remove "$root$config" "$root$state"
        if getent passwd edged >/dev/null && act "remove the user edged"; then userdel edged; fi
    elif [ -e "$root$config" ] || [ -e "$root$state" ]; then
        say "left: $config, $state and the user edged, whose files they are (--purge removes them)"
    fi
    if [ -e "$root/etc/mosquitto/conf.d/edged.conf" ]; then
        say "left: mosquitto and its settings in /etc/mosquitto, which others may use"
    fi
    $changed || say "nothing is installed here; nothing changed"
}

# What was written for mosquitto goes with the passwords and the authority that it is made from.
purge_mosquitto() {
    local files=() each
    [ -e "$root$given" ] || return 0
    mapfile -t files < <(sed -n "s|^[0-9a-f]*  - \(/etc/mosquitto/\)|$root\1|p" "$root$given" | sort -u)
    for each in "${files[@]}"; do
        if ! ours "$each"; then
            say "$each was changed by others, who may use mosquitto"
            return
        fi
    done
    remove "${files[@]}"
    if ! $dry_run && running_systemd; then systemctl try-restart mosquitto; fi
}

main() {
    trap failed ERR
    arguments "$@"
    if $uninstall; then
        uninstall
        return
    fi
    recall
    check_box
    extra=cpu
    if $cuda; then extra=cuda; fi
    local each
    for each in /var/tmp/edged-install.*; do # what a run that was killed has left
        if ! $dry_run && [ -O "$each" ] && [ ! -L "$each" ]; then flock -n "$each" rm -rf "$each" || true; fi
    done
    work=$(mktemp -d /var/tmp/edged-install.XXXXXX)
    chmod 711 "$work" # the user edged is shown copies of what it may read
    exec 8<"$work"
    flock 8
    trap 'rm -rf "$work"' EXIT
    trap 'exit 129' HUP
    trap 'exit 130' INT
    trap 'exit 143' TERM
    check_python
    check_bundle
    check_gpu
    check_model
    check_settings
    check_version
    enough_room
    fetch

    owes=(edged)
    install_user
    remember_options
    install_version
    install_model
    install_settings
    install_mosquitto
    install_units
    switch_version
    owes=()
    start_service
    $dry_run || remove_old

    if $dry_run; then
        $changed || say "all is as it should be: nothing would be changed"
        return
    fi
    $changed || say "nothing changed"
    if ! $systemd; then
        say "to run it, as the user edged: CREDENTIALS_DIRECTORY=$config/credentials" \
            "STATE_DIRECTORY=$state $current/bin/edged run"
    elif ! $start; then
        say "to start it, now and with the box: systemctl enable --now edged"
    fi
    if $with_mosquitto && $changed; then
        say "clients of the broker: its users are in /etc/mosquitto/acl; mosquitto_passwd adds" \
            "them, and they need $config/authority/ca.pem"
    fi
    look || exit 3
    if ! $changed; then
        say "all is as it should be"
        return
    fi
    say "done: $("$current/bin/edged" --version). To see how it stands, as root:" \
        "CREDENTIALS_DIRECTORY=$config/credentials edged check (or top, or ask)"
}

main "$@"
