#!/bin/sh
# Makes an authority and certificates signed by it, for a broker and its clients; needs openssl.
#
#   make-certs.sh DIR server NAME…    the broker's, for these host names and addresses
#   make-certs.sh DIR client NAME…    one for each of these users; NAME is what the broker's ACL calls it
#
# In DIR: ca.pem and ca.key (the authority's: keep DIR off the broker and the boxes), server.pem and
# server.key, clients/NAME.pem and clients/NAME.key. Nothing that is there is ever overwritten: run
# again, it makes what is missing. To renew a certificate, remove its .pem; the key stays.
set -eu
umask 077

CA_DAYS=${CA_DAYS:-3650}
DAYS=${DAYS:-1825}

die() {
    echo "make-certs.sh: $*" >&2
    exit 1
}

usage() {
    sed -n 's/^#   //p' "$0" >&2
    exit 2
}

# openssl, its chatter kept back unless it fails
ssl() {
    openssl "$@" 2>"$work/said" || die "openssl $1 failed: $(cat "$work/said")"
}

# key FILE: a private key, unless it is there
key() {
    [ -e "$1" ] && return
    ssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out "$work/key"
    mv "$work/key" "$1"
}

authority() {
    if [ ! -e "$dir/ca.pem" ]; then
        key "$dir/ca.key"
        ssl req -new -x509 -key "$dir/ca.key" -out "$work/pem" -days "$CA_DAYS" \
            -subj "/CN=edged authority" -config "$work/empty" \
            -addext basicConstraints=critical,CA:TRUE,pathlen:0 \
            -addext keyUsage=critical,keyCertSign,cRLSign -addext subjectKeyIdentifier=hash
        chmod 644 "$work/pem"
        mv "$work/pem" "$dir/ca.pem"
        echo "made $dir/ca.pem"
    fi
    [ -e "$dir/ca.key" ] || die "there is no $dir/ca.key, so nothing can be signed"
}

# certificate STEM CN USE [NAMES]: STEM.key and STEM.pem, as far as they are missing
certificate() {
    if [ -e "$1.pem" ]; then
        [ -e "$1.key" ] || die "there is $1.pem, but not its key: remove it to have both made anew"
        echo "there is $1.pem, left as it is"
        return
    fi
    key "$1.key"
    {
        echo "basicConstraints=critical,CA:FALSE"
        echo "keyUsage=critical,digitalSignature"
        echo "extendedKeyUsage=$3"
        echo "subjectKeyIdentifier=hash"
        echo "authorityKeyIdentifier=keyid"
        [ -z "${4:-}" ] || echo "subjectAltName=$4"
    } >"$work/ext"
    ssl req -new -key "$1.key" -subj "/CN=$2" -config "$work/empty" -out "$work/csr"
    ssl x509 -req -in "$work/csr" -CA "$dir/ca.pem" -CAkey "$dir/ca.key" -sha256 \
        -set_serial "0x$(openssl rand -hex 16)" -days "$DAYS" -extfile "$work/ext" \
        -out "$work/pem"
    chmod 644 "$work/pem"
    mv "$work/pem" "$1.pem"
    echo "made $1.pem"
}

# alternatives NAME…: the names of a server as openssl writes them
alternatives() {
    list=
    for name in "$@"; do
        case $name in
            *[!A-Za-z0-9.:-]* | '') die "'$name' is no host name and no address" ;;
            *:*) kind=IP ;;
            *[!0-9.]*) kind=DNS ;;
            *) kind=IP ;;
        esac
        list="$list${list:+,}$kind:$name"
    done
    echo "$list"
}

[ $# -ge 3 ] || usage
dir=$1 what=$2
shift 2
mkdir -p "$dir/clients"
work=$(mktemp -d "$dir/.work.XXXXXX")
trap 'rm -rf "$work"' EXIT
printf '[req]\ndistinguished_name=dn\n[dn]\n' >"$work/empty"

case $what in
    server)
        names=$(alternatives "$@")
        # A certificate that is there, but for other names, would be found out only by the clients.
        if [ -e "$dir/server.pem" ] && [ "$(cat "$dir/server.names" 2>/dev/null)" != "$names" ]; then
            die "$dir/server.pem is for other names: remove it to have it made anew"
        fi
        authority
        echo "$names" >"$dir/server.names"
        certificate "$dir/server" "$1" serverAuth "$names"
        ;;
    client)
        for name in "$@"; do
            case $name in
                *[!A-Za-z0-9_-]* | '') die "'$name': a user's name is of A-Z a-z 0-9 _ -" ;;
            esac
            [ ${#name} -le 64 ] || die "'$name': a user's name has 64 characters at most"
        done
        authority
        for name in "$@"; do
            certificate "$dir/clients/$name" "$name" clientAuth
        done
        ;;
    *) usage ;;
esac
