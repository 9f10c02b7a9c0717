"""Namespaces of a worker's own: its processes, mounts, network and users are not the host's.

Set up by the worker itself with plain system calls; no helper binary is needed. Every process in
there has one user of the host's: a dedicated one if the trainer runs as root, else the trainer's.
Inside, that user is number 1000. The file system is made up of read-only views of /usr and of the
interpreter; there is no /etc of the host's, no /home, no /sys and no device but the harmless ones.
"""

import os
import pwd

from cir_jax.sandbox import linux
from cir_jax.sandbox.limits import Limits
from cir_jax.sandbox.runtime import Runtime

INNER_ID = 1000
_ALL_BUT_USERS = (
    linux.CLONE_NEWNS
    | linux.CLONE_NEWPID
    | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC
    | linux.CLONE_NEWUTS
    | linux.CLONE_NEWCGROUP
)
_ROOT = "/run"
"""A folder that every machine has; the new root is put together on top of it."""
_HOST_LINKS = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")
_DEVICES = ("null", "zero", "full", "random", "urandom")
_LINKS = {
    "dev/fd": "/proc/self/fd",
    "dev/stdin": "/proc/self/fd/0",
    "dev/stdout": "/proc/self/fd/1",
    "dev/stderr": "/proc/self/fd/2",
    "dev/shm": "/tmp",
}
_FILES = {
    "etc/passwd": f"user:x:{INNER_ID}:{INNER_ID}::/tmp:/bin/sh\n",
    "etc/group": f"user:x:{INNER_ID}:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "etc/hosts": "127.0.0.1 localhost\n",
}


def dedicated_uid() -> int:
    """A host user and group that no account has, for programs of a trainer that is root."""
    # Between people's accounts and the ranges that containers and systemd hand out.
    for uid in range(58391, 60000):
        try:
            pwd.getpwuid(uid)
        except KeyError:
            return uid
    raise OSError("every user number from 58391 to 59999 has an account")


def can_change_user(uid: int) -> bool:
    """Whether this process is a root that may become `uid`, which not every container has."""
    if os.geteuid() != 0:
        return False
    for name in ("uid_map", "gid_map"):
        with open(f"/proc/self/{name}") as file:
            ranges = [[int(field) for field in line.split()] for line in file]
        if not any(first <= uid < first + count for first, _, count in ranges):
            return False
    return True


def enter_user_namespace(uid: int) -> None:
    """Moves the calling process, which has one thread, to fresh namespaces of every kind.

    Only its children are in the new process namespace. User INNER_ID in there is the host's `uid`.
    The caller has all capabilities, which count for the new namespaces only.

    Raises:
      OSError: this machine does not let it.
    """
    pid = os.getpid()
    entered, tell = os.pipe()
    mapper = os.fork()
    if mapper == 0:
        os.close(tell)
        os._exit(_map_ids(pid, uid, entered))
    os.close(entered)
    try:
        linux.unshare(linux.CLONE_NEWUSER | _ALL_BUT_USERS)
        os.write(tell, b"x")
    finally:
        os.close(tell)
        _, status = os.waitpid(mapper, 0)
    if status:
        number = os.waitstatus_to_exitcode(status)
        raise OSError(number, f"map user {uid} into the namespace: {os.strerror(number)}")


def _map_ids(pid: int, uid: int, entered: int) -> int:
    """From outside, where the right to do so is: maps INNER_ID to `uid`. Returns an errno."""
    try:
        if not os.read(entered, 1):
            return 0  # it did not enter, and says so itself
        # An unprivileged user may map a group only without setgroups.
        texts = {"uid_map": f"{INNER_ID} {uid} 1", "gid_map": f"{INNER_ID} {uid} 1"}
        if uid == os.geteuid():
            texts["gid_map"] = f"{INNER_ID} {os.getegid()} 1"
            texts = {"setgroups": "deny"} | texts
        for name, text in texts.items():
            with open(f"/proc/{pid}/{name}", "w") as file:
                file.write(text)
        return 0
    except OSError as error:
        return error.errno or 1


def enter_as_root() -> None:
    """Like enter_user_namespace, as the host's root where user namespaces are switched off."""
    linux.unshare(_ALL_BUT_USERS)


def build_root(runtime: Runtime, user: int | None) -> None:
    """Replaces the root of this mount namespace; to be called in its first process.

    Args:
      user: whom to become once paths that are closed to others are open; None: nobody yet.
    """
    linux.set_hostname("sandbox")
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    # As the host's root, paths that are closed to others can be opened; what is made later has to
    # belong to the inner user.
    views = {path: os.open(path, os.O_PATH) for path in _host_paths(runtime)}
    if user is not None:
        become(user)
    linux.mount("tmpfs", _ROOT, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=1m")
    for folder in ("proc", "dev", "etc", "tmp", "run"):
        os.mkdir(f"{_ROOT}/{folder}", 0o755)
    for name in _HOST_LINKS:
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{_ROOT}/{name}")
    for name, target in _LINKS.items():
        os.symlink(target, f"{_ROOT}/{name}")
    for name, text in _FILES.items():
        with open(f"{_ROOT}/{name}", "w") as file:
            file.write(text)
    for path, view in views.items():
        _bind(view, _ROOT + runtime.inside(path), device=path.startswith("/dev/"))
    for view in views.values():
        os.close(view)
    for path in runtime.hidden:
        over = _ROOT + runtime.inside(path)
        linux.mount("tmpfs", over, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "mode=755,size=4k")
    linux.make_read_only(_ROOT, devices=True)
    _mount_proc()
    linux.enter_root(_ROOT)


def _host_paths(runtime: Runtime) -> list[str]:
    links = [f"/{name}" for name in _HOST_LINKS]
    folders = ["/usr", *(path for path in links if os.path.isdir(path))]
    inner = [path for path in runtime.folders if not f"{path}/".startswith("/usr/")]
    folders = [path for path in folders if not os.path.islink(path)]
    return folders + inner + [f"/dev/{name}" for name in _DEVICES]


def _mount_proc() -> None:
    """Without the right to do so, /proc stays empty.

    The kernel demands that the host's is still in sight, so the old root must be.
    """
    flags = linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC
    try:
        linux.mount("proc", f"{_ROOT}/proc", "proc", flags, "hidepid=2")
    except OSError:
        return  # refused where the host's is partly covered, as in many containers
    # A program could have others taken first if memory runs out. The mount is made read-only, not
    # the file system: so rights are checked first, and an attack can tell who it is.
    linux.make_read_only(f"{_ROOT}/proc", recursive=False)


def become(user: int) -> None:
    if os.getresuid() != (user,) * 3:
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)


def _bind(view: int, target: str, *, device: bool) -> None:
    if device:
        with open(target, "w"):
            pass
    else:
        os.makedirs(target)
    linux.mount(f"/proc/self/fd/{view}", target, None, linux.MS_BIND | linux.MS_REC)
    linux.make_read_only(target, devices=device)


def scratch(limits: Limits) -> linux.Mount:
    """A fresh file system on /tmp (where /dev/shm points, too), the only one to write to."""
    options = f"size={limits.scratch_bytes},nr_inodes={limits.num_scratch_files},mode=1777"
    return linux.Mount("tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, options)
