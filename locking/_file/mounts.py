"""Whether a file lies on this machine. Linux only; elsewhere the answer is always that it may."""

from __future__ import annotations

import os

_NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "glusterfs",
    "lustre",
    "gpfs",
    "beegfs",
}


def network_file_system(fd: int) -> str | None:
    """The type of the network file system that an open file lies on; None if it is local or unknown.

    Reads the kernel's table of mounts, which is made in memory: no disk and no server is asked.
    """
    device = os.fstat(fd).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        table = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        text = b""
        while part := os.pread(table, 1 << 16, len(text)):
            text += part
    finally:
        os.close(table)
    for line in text.decode("utf-8", "replace").splitlines():
        mount, _, rest = line.partition(" - ")  # see proc(5): the type stands behind the separator
        if mount.split(" ")[2:3] == [number]:
            kind = rest.split(" ")[0]
            return kind if kind in _NETWORK or kind.startswith("fuse.") else None
    return None
