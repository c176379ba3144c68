"""Units of systemd for a device, for the server and for its port of enrolments, with only the rights that they need."""

CLIENT_UNIT, SERVER_UNIT = "fedveil-client.service", "fedveil-server.service"
ENROLMENT_UNIT = "fedveil-enrolment.service"

# Training a small convolutional network under DP-SGD peaks at 530 MiB; a server keeps a few models.
_CLIENT = """\
ExecStart=/opt/fedveil/bin/fedveil client start %S/fedveil-client
Restart=always
MemoryMax=1G
CPUWeight=20
Nice=10"""
_SERVER = """\
ExecStart=/opt/fedveil/bin/fedveil server %S/fedveil-server $RUN
EnvironmentFile=-%S/fedveil-server/run.env
Restart=on-failure
RestartPreventExitStatus=2 3 4 5
MemoryMax=8G"""

# The user is the server's, whose bundle it shares. It ends once no token is open.
_ENROLMENT = """\
ExecStart=/opt/fedveil/bin/fedveil server enrol %S/fedveil-server
User=fedveil-server
Restart=on-failure
RestartPreventExitStatus=2 3 4 5
MemoryMax=512M"""

# The bundle is the state folder: systemd gives it to the service's own, fresh user. Nothing of torch, OpenBLAS or
# SQLite needs what is taken away; MemoryDenyWriteExecute is not set since torch generates code. Of the open files
# `base/open_files.py` lets in a quarter as connections.
_UNIT = """\
[Unit]
Description=fedveil {what} of the federation {federation}
Wants=network-online.target time-sync.target
After=network-online.target time-sync.target
StartLimitIntervalSec=0

[Service]
{own}
RestartSec=10
KillMode=control-group
TimeoutStopSec=60
DynamicUser=yes
StateDirectory={folder}
StateDirectoryMode=0700
WorkingDirectory=%S/{folder}
UMask=0077
LimitCORE=0
LimitNOFILE=65536
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
    """Return the unit of one client; its bundle is in /var/lib/fedveil-client, the package in /opt/fedveil."""
    return _UNIT.format(what=f"client {name}", federation=federation, folder="fedveil-client", own=_CLIENT)


def enrolment_unit(federation: str) -> str:
    """Return the unit of the server's port for enrolments, beside the server's own unit."""
    return _UNIT.format(what="enrolment", federation=federation, folder="fedveil-server", own=_ENROLMENT)


def server_unit(federation: str) -> str:
    """Return the unit of the server; its bundle lies in /var/lib/fedveil-server, and `run.env` there names the run.

    A run that is refused, has no budget, or was ended or left in doubt by an alarm of its audit is not tried again.
    """
    return _UNIT.format(what="server", federation=federation, folder="fedveil-server", own=_SERVER)
