"""Units of systemd for a device and for the server, with no right that they do not need."""

from __future__ import annotations

CLIENT_UNIT, SERVER_UNIT = "fedveil-client.service", "fedveil-server.service"

# Training a small convolutional network under DP-SGD peaks at 530 MiB; a server keeps a few models.
OPEN_FILES = 1 << 16  # `links/open_files.py` lets in a quarter as connections
CLIENT_LIMITS = "MemoryMax=1G\nCPUWeight=20\nNice=10"
SERVER_LIMITS = "MemoryMax=8G"

# The bundle is the state folder: systemd gives it to the service's own, fresh user. Nothing of torch, OpenBLAS or
# SQLite needs what is taken away; MemoryDenyWriteExecute is not set since torch generates code.
_UNIT = """\
[Unit]
Description=fedveil {what} of the federation {federation}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
ExecStart=/opt/fedveil/bin/fedveil {verb} %S/{folder}{more}
{restart}
RestartSec=10
KillMode=control-group
TimeoutStopSec=60
DynamicUser=yes
StateDirectory={folder}
StateDirectoryMode=0700
WorkingDirectory=%S/{folder}
UMask=0077
{limits}
LimitCORE=0
LimitNOFILE={files}
CapabilityBoundingSet=
LockPersonality=yes
NoNewPrivileges=yes
PrivateDevices=yes
PrivateTmp=yes
PrivateUsers=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHome=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectProc=invisible
ProtectSystem=strict
RemoveIPC=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
SystemCallArchitectures=native
SystemCallErrorNumber=EPERM
SystemCallFilter=@system-service
SystemCallFilter=~@privileged

[Install]
WantedBy=multi-user.target
"""


def client_unit(federation: str, name: str) -> str:
    """Return the unit of one client; its bundle lies in /var/lib/fedveil-client, the package in /opt/fedveil."""
    return _UNIT.format(
        what=f"client {name}",
        federation=federation,
        verb="client start",
        folder="fedveil-client",
        more="",
        restart="Restart=always",
        limits=CLIENT_LIMITS,
        files=OPEN_FILES,
    )


def server_unit(federation: str) -> str:
    """Return the unit of the server; its bundle lies in /var/lib/fedveil-server, and `run.env` there names the run.

    A run that is refused, has no budget, or was ended or left in doubt by an alarm of its audit is not tried again.
    """
    return _UNIT.format(
        what="server",
        federation=federation,
        verb="server",
        folder="fedveil-server",
        more=" $RUN",
        restart="EnvironmentFile=-%S/fedveil-server/run.env\nRestart=on-failure\nRestartPreventExitStatus=2 3 4 5",
        limits=SERVER_LIMITS,
        files=OPEN_FILES,
    )
