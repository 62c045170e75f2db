#!/usr/bin/env bash
# Installs the Debian packages without which tests are skipped: a browser, a SLURM, and tools for networks and mounts. Does nothing
# where they are, and where it could not: not root, or no apt-get. Without a network it says so in one line, and the tests are skipped.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin # where daemons are; a user's own path may lack it
declare -A package=([chromium]=chromium [slurmctld]=slurm-wlm [munged]=munge [ip]=iproute2 [unshare]=util-linux [mount]=mount)
missing=()
for program in "${!package[@]}"; do
    command -v "$program" >/dev/null || missing+=("${package[$program]}")
done
if [ ${#missing[@]} = 0 ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi
if [[ " ${missing[*]} " = *" chromium "* ]]; then missing+=(fonts-dejavu-core); fi # a page needs letters
echo "Installing ${missing[*]} ..." >&2
log=$(mktemp)
export DEBIAN_FRONTEND=noninteractive
{ timeout 60 apt-get update -qq && timeout 300 apt-get install -y -qq --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null ||
    echo "warning: apt-get install ${missing[*]} failed, so some tests are skipped: $(tail -n 1 "$log")" >&2
rm -f "$log"
