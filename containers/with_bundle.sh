#!/bin/sh
# A verb of fedveil, once the desk of compose.yaml has given the bundle. It would wait after a restart as well: podman restarts
# nothing that depends on a container that has ended, so no service depends on the desk.
until [ -e /bundle/given ]; do sleep 1; done
exec fedveil "$@"
