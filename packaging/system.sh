#!/bin/sh
# Installs what some tests of the service use from the system's packages (Debian, Ubuntu): a Redis server, HAProxy and
# Chromium. Tests that miss one skip and say so. Needs root.
set -eu
apt-get update -q
DEBIAN_FRONTEND=noninteractive apt-get install -yq --no-install-recommends redis-server haproxy chromium
