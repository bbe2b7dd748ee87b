#!/usr/bin/env bash
# Run both set-up commands of the README in a fresh clone each, with a fresh environment, and say how long they took.
# Usage: tools/fresh_clone.sh [demo|tests]   (default: both)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

command_of() {  # the README's one-line command that contains $1
    grep -F "python3 -m venv" "$root/README.md" | grep -F -- "$1"
}

run() {
    git clone -q "$root" "$scratch/$1"
    cd "$scratch/$1"
    local start=$SECONDS
    eval "$2"
    echo "$1: $((SECONDS - start)) s with installation"
}

case "${1:-both}" in
    demo | both) run demo "$(command_of 'pipeline --config')" ;;&
    tests | both) run tests "$(command_of 'pytest')" ;;
esac
