#!/bin/sh
# Sets up what this repository needs on Debian 12 or 13 with Node.js. What is there already is left
# alone, and nothing of the machine's own package configuration is changed.
#
#   sh scripts/setup.sh [tools] [qemu] [guest] [newer] [gdb]
#
# Default: all. What comes behind the word `try` may fail.
#
#   tools   node_modules: Bun, zig, the type checker, the linter
#   qemu    QEMU 9.0 or later (FSL_QEMU names another binary); root and apt-get when it is missing
#   guest   the guests of tests, demo and benchmark, in .cache/guest; apt-get; brings qemu along
#   newer   a second, newer QEMU for tests, in .cache/packages; Debian only. Tried once, may fail.
#           FSL_QEMU_NEWER names one that is here already
#   gdb     a debugger for tests, in .cache/packages. Tried once, may fail
set -eu
cd "$(dirname "$0")/.."
root=$PWD
PATH="$root/node_modules/.bin:$PATH"
export PATH

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
  say "$*"
  exit 1
}

# -- is anything to do? ----------------------------------------------------------------------------

tools_ready() {
  [ -x node_modules/.bin/bun ] && [ ! package-lock.json -nt node_modules/.package-lock.json ]
}

major_version() { "$1" --version | sed -n 's/.*version \([0-9][0-9]*\)\..*/\1/p' | head -n 1; }

# Starting QEMU only to ask its version takes 50 ms and more, so the answer is kept until the binary
# changes.
qemu_ready() {
  qemu=$(command -v "${FSL_QEMU:-qemu-system-x86_64}") || return 1
  checked=.cache/qemu-checked
  [ -f $checked ] && [ "$(cat $checked)" = "$qemu" ] && [ $checked -nt "$qemu" ] && return
  version=$(major_version "$qemu")
  [ "${version:-0}" -ge 9 ] || return 1
  mkdir -p .cache
  echo "$qemu" >$checked
}

guest_ready() {
  made=.cache/guest/guest.json
  [ -f .cache/packages/matrix-tried ] && [ -f $made ] && [ -z "$(find scripts/guest -newer $made -type f)" ]
}

# The unpacked QEMU holds absolute paths: it is made again when this directory has moved.
newer_ready() {
  [ -z "${FSL_QEMU_NEWER:-}" ] || return 0
  tried=.cache/packages/newer-tried
  [ -f $tried ] && [ "$(head -n 1 $tried)" = "$(cd .cache/packages && pwd -P)" ]
}

gdb_ready() {
  command -v gdb >/dev/null || [ -f .cache/packages/gdb-tried ]
}

# -- apt, without touching the machine's configuration ---------------------------------------------

# apt-get, apt-cache with the machine's own sources, and backports beside them on a Debian whose own
# QEMU is too old, but with package lists that live in .cache/apt.
private_apt() {
  program=$1
  shift
  DEBIAN_FRONTEND=noninteractive "$program" \
    -o Dir::Etc::sourcelist="$root/.cache/apt/sources.list" \
    -o Dir::Etc::sourceparts="$root/.cache/apt/sources.list.d" \
    -o Dir::State::lists="$root/.cache/apt/lists" \
    -o Dir::Cache="$root/.cache/apt/cache" \
    -o APT::Sandbox::User=root -o DPkg::Lock::Timeout=300 \
    -o Acquire::Languages=none -o Acquire::Retries=3 "$@"
}

keyring=/usr/share/keyrings/debian-archive-keyring.gpg

# Which server a machine takes its packages from is the machine's affair: the address of other
# suites is derived from the one that the release itself comes from.
find_mirror() {
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  uris=$(private_apt apt-get update --print-uris)
  mirror=$(printf '%s\n' "$uris" |
    sed -n "s|^'\(.*\)/dists/$codename/InRelease'.*|\1|p" | head -n 1)
}

add_backports() {
  [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ] || return 0
  find_mirror
  case $uris in *"/dists/$codename-backports/"*) return 0 ;; esac
  [ -n "$mirror" ] ||
    fail "apt has no source for Debian $codename, so none for its backports; install QEMU by hand"
  {
    printf 'Types: deb\nURIs: %s\nSuites: %s-backports\nComponents: main\n' "$mirror" "$codename"
    [ ! -f "$keyring" ] || echo "Signed-By: $keyring"
  } >.cache/apt/sources.list.d/fsl-backports.sources
}

copy_sources() {
  rm -rf .cache/apt/sources.list.d
  mkdir -p .cache/apt/sources.list.d .cache/apt/lists/partial .cache/apt/cache/archives/partial
  : >.cache/apt/sources.list
  [ ! -f /etc/apt/sources.list ] || cp /etc/apt/sources.list .cache/apt/sources.list
  for source in /etc/apt/sources.list.d/*.list /etc/apt/sources.list.d/*.sources; do
    [ ! -f "$source" ] || cp "$source" .cache/apt/sources.list.d/
  done
}

apt_prepared=
prepare_apt() {
  [ -z "$apt_prepared" ] || return 0
  say "reading package lists"
  copy_sources
  add_backports
  # A source that has nothing to do with us may fail; what we need and do not get is noticed below.
  private_apt apt-get update >.cache/apt/update.log 2>&1 ||
    say "apt-get update had errors, see .cache/apt/update.log"
  apt_prepared=yes
}

apt_install() {
  say "installing $*"
  log=.cache/apt/install.log
  if ! private_apt apt-get install -y --no-install-recommends "$@" >$log 2>&1; then
    tail -n 15 $log >&2
    fail "apt-get install failed, the whole output is in $log"
  fi
  private_apt apt-get clean
}

# -- the sets --------------------------------------------------------------------------------------

set_up_tools() {
  tools_ready && return
  command -v npm >/dev/null || fail "npm is missing; install Node.js 18 or later with npm"
  say "npm ci"
  npm ci >&2
  # npm may be told to run no install scripts; Bun's puts its binary in place.
  bun --version >/dev/null 2>&1 || node node_modules/bun/install.js >&2 || true
  bun --version >/dev/null 2>&1 ||
    fail "node_modules/.bin/bun does not run; remove node_modules and try again"
  touch node_modules/.package-lock.json
}

set_up_qemu() {
  qemu_ready && return
  [ -z "${FSL_QEMU:-}" ] || fail "FSL_QEMU: expected a QEMU of 9.0 or later, found $FSL_QEMU"
  command -v apt-get >/dev/null ||
    fail "QEMU 9.0 or later is missing and apt-get is not here; install it by hand"
  [ "$(id -u)" -eq 0 ] || fail "QEMU 9.0 or later is missing; run as root: npm run setup"
  prepare_apt
  codename=$(. /etc/os-release && echo "${VERSION_CODENAME:-}")
  if [ "$codename" = bookworm ]; then set -- -t bookworm-backports; else set --; fi
  # qemu-utils has qemu-img and qemu-storage-daemon; tests skip what is not there.
  apt_install "$@" qemu-system-x86 qemu-utils
  qemu_ready ||
    fail "QEMU: expected 9.0 or later, found $(qemu-system-x86_64 --version | head -n 1)"
}

# Downloads a package and unpacks it, without installing it.
unpack() {
  say "unpacking $1"
  rm -rf .cache/download "$2"
  mkdir -p .cache/download "$2"
  (cd .cache/download && private_apt apt-get download "$1" >"$root/.cache/apt/install.log" 2>&1) ||
    fail "apt-get download $1 failed: $(tail -n 3 .cache/apt/install.log)"
  dpkg -x .cache/download/*.deb "$2"
  rm -rf .cache/download
}

# The distribution's kernel and busybox are for the guest: this machine neither boots nor runs them.
fetch_guest_packages() {
  [ ! -f .cache/packages/complete ] || return 0
  command -v apt-get >/dev/null ||
    fail "the test guests need apt-get: they are made of Debian's kernel and busybox"
  prepare_apt
  kernel=$(private_apt apt-cache depends linux-image-cloud-amd64 |
    sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n 1)
  [ -n "$kernel" ] ||
    fail "apt knows no package for linux-image-cloud-amd64, see .cache/apt/update.log"
  unpack "$kernel" .cache/packages/kernel
  unpack busybox-static .cache/packages/busybox
  : >.cache/packages/complete
}

# Firmware and a second architecture for the tests of docs/guests.md, which skip what is not there.
# Tried once.
fetch_matrix_packages() {
  [ ! -f .cache/packages/matrix-tried ] || return 0
  mkdir -p .cache/packages
  prepare_apt
  suite=
  case $(. /etc/os-release && echo "${VERSION_CODENAME:-}") in
  bookworm) suite=/bookworm-backports ;;
  esac
  for package in "ovmf ovmf" "qemu-system-arm$suite qemu-arm"; do
    name=${package% *}
    (unpack "$name" ".cache/packages/${package#* }") || say "going on without $name"
  done
  : >.cache/packages/matrix-tried
}

set_up_guest() {
  guest_ready && return
  fetch_guest_packages
  fetch_matrix_packages
  say "building the test guests (a minute when zig has to build its C library first)"
  bun scripts/guest/build.ts .cache/packages/kernel .cache/packages/busybox
}

# apt-get of a machine with nothing installed and no sources but those of the newer QEMU.
newer_apt() {
  private_apt apt-get \
    -o Dir::Etc::sourcelist="$root/.cache/apt/newer/sources.list" \
    -o Dir::Etc::sourceparts=/dev/null \
    -o Dir::Etc::preferences=/dev/null -o Dir::Etc::preferencesparts=/dev/null \
    -o Dir::State::lists="$root/.cache/apt/newer/lists" \
    -o Dir::State::status="$root/.cache/apt/newer/status" \
    -o Dir::Cache="$root/.cache/apt/newer" "$@" >>.cache/apt/newer.log 2>&1
}

# Unpacks the newest QEMU of Debian 13 with all of its libraries, the C library and its loader among
# them, and makes the program use these. It stays an ordinary ELF program that fsl can preload its
# library into. Prints why it cannot be had.
fetch_newer() {
  because() {
    echo "$*"
    exit 1
  }
  at=$1
  grep -qx 'ID="*debian"*' /etc/os-release || because "only Debian has a package of it"
  rm -rf .cache/apt/newer "$at"
  mkdir -p .cache/apt/newer/lists/partial .cache/apt/newer/archives/partial "$at"
  : >.cache/apt/newer.log
  copy_sources
  find_mirror
  [ -n "$mirror" ] || because "apt has no source for Debian $codename"
  signed=
  [ ! -f $keyring ] || signed="[signed-by=$keyring] "
  for suite in trixie trixie-backports; do
    echo "deb $signed$mirror $suite main"
  done >.cache/apt/newer/sources.list
  : >.cache/apt/newer/status
  newer_apt update --error-on=any || because "$(sed -n '/^[EW]: /{p;q;}' .cache/apt/newer.log)"
  newer_apt install --download-only -y --no-install-recommends -t trixie-backports \
    qemu-system-x86 patchelf || because "$(grep '^E: ' .cache/apt/newer.log | tail -n 1)"
  for package in .cache/apt/newer/archives/*.deb; do
    dpkg -x "$package" "$at" || because "$package cannot be unpacked"
  done
  rm -rf .cache/apt/newer "$at/usr/share/doc" "$at/usr/share/man" "$at/usr/share/locale"
  # Where QEMU looks for its firmware and modules before it looks at the machine's.
  ln -s ../.. "$at/usr/bin/qemu-bundle"
  loader=$(find "$at/usr/lib" -name 'ld-linux-*.so.*' -type f | head -n 1)
  qemu=$at/usr/bin/qemu-system-x86_64
  "$loader" --library-path "${loader%/*}" "$at/usr/bin/patchelf" --set-interpreter "$loader" \
    --force-rpath --set-rpath "${loader%/*}" "$qemu" >&2 || because "patchelf failed"
  version=$(major_version "$qemu")
  [ "${version:-0}" -ge 11 ] || because "expected QEMU 11.0 or later, found ${version:-none}"
}

set_up_newer() {
  newer_ready && return
  say "fetching a newer QEMU (50 MB)"
  mkdir -p .cache/packages
  packages=$(cd .cache/packages && pwd -P)
  if why=$(fetch_newer "$packages/qemu-newer"); then
    echo "$packages" >.cache/packages/newer-tried
  else
    rm -rf .cache/apt/newer "$packages/qemu-newer"
    why=${why:-see .cache/apt/newer.log}
    printf '%s\n%s\n' "$packages" "$why" >.cache/packages/newer-tried
    say "going on without a newer QEMU: $why (once more: rm .cache/packages/newer-tried)"
  fi
}

# Downloads the small gdb with those of its libraries that this machine does not have, and unpacks
# them. Prints why it cannot be had.
fetch_gdb() {
  command -v apt-get >/dev/null || { echo "apt-get is not here" && return 1; }
  prepare_apt
  at=.cache/packages/gdb
  rm -rf .cache/download "$at"
  mkdir -p .cache/download/partial "$at"
  # Nothing is installed: the machine's package state is only read, so its lock is not needed.
  private_apt apt-get install --download-only -y --no-install-recommends \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$root/.cache/download" \
    gdb-minimal >.cache/apt/gdb.log 2>&1 ||
    { echo "$(grep '^E: ' .cache/apt/gdb.log | tail -n 1)" && return 1; }
  for package in .cache/download/*.deb; do
    dpkg -x "$package" "$at" || { echo "$package cannot be unpacked" && return 1; }
  done
  rm -rf .cache/download "$at/usr/share/doc" "$at/usr/share/man" "$at/usr/share/locale"
}

set_up_gdb() {
  gdb_ready && return
  say "fetching gdb (5 MB)"
  mkdir -p .cache/packages
  if why=$(fetch_gdb); then
    : >.cache/packages/gdb-tried
  else
    rm -rf .cache/packages/gdb
    echo "${why:-see .cache/apt/gdb.log}" >.cache/packages/gdb-tried
    say "going on without gdb: $why (once more: rm .cache/packages/gdb-tried)"
  fi
}

# -- go --------------------------------------------------------------------------------------------

# Sets up one set, unless it is ready; never two at a time.
set_up() {
  if "$1_ready"; then return; fi
  mkdir -p .cache
  exec 9>.cache/setup.lock
  flock 9
  "set_up_$1"
  exec 9>&-
}

[ $# -gt 0 ] || set -- tools qemu guest newer gdb
while [ $# -gt 0 ]; do
  case $1 in
  tools) set_up tools ;;
  qemu) set_up qemu ;;
  guest)
    set_up qemu
    set_up guest
    ;;
  newer) set_up newer ;;
  gdb) set_up gdb ;;
  try)
    shift
    sh "$root/scripts/setup.sh" "$@" || say "going on without $*"
    break
    ;;
  *) fail "unknown set '$1': expected tools, qemu, guest, newer or gdb" ;;
  esac
  shift
done
