"""Locks that the kernel keeps on files of one folder.

Read `manager`, `mounts` (which file systems can do it).
May import the waiting room, the interface and the ground.
"""
