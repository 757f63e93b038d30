#!/usr/bin/env python3
"""Makes the root folder that all our images share: glibc and the few files that programs expect, nothing
else.

Used twice, so that both ways give the same content: by build.sh (images packed without an engine) and inside
the Dockerfile. The libraries are this machine's, so binaries that were linked here run on it. The folders are
laid out like a merged-/usr Debian, because that is where GPU container toolkits put the driver's libraries;
libdl, libpthread and librt are empty shells in today's glibc, but drivers still name them.
"""

import os
import pathlib
import re
import shutil
import subprocess
import sys

LIBRARIES = ["libc.so.6", "libm.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"]
USER_ID = 65532
PASSWD = (
    f"root:x:0:0:root:/:/sbin/nologin\nnonroot:x:{USER_ID}:{USER_ID}:nonroot:/home/nonroot:/sbin/nologin\n"
)
GROUP = f"root:x:0:\nnonroot:x:{USER_ID}:\n"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"


def installed_libraries():
    """Name -> path, as the dynamic loader of this machine would find it (64-bit entries only)."""
    listing = subprocess.run(["/sbin/ldconfig", "-p"], check=True, capture_output=True, text=True).stdout
    found = {}
    for name, flags, path in re.findall(r"^\t(\S+) \(([^)]*)\) => (\S+)$", listing, re.M):
        if "x86-64" in flags or "AArch64" in flags:
            found.setdefault(name, path)
    return found


def put(root, path, data, mode=0o644):
    target = root / path.lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(data, pathlib.Path):
        shutil.copyfile(data, target)
    else:
        target.write_text(data, encoding="utf-8")
    target.chmod(mode)


def make(root):
    machine = os.uname().machine
    found = installed_libraries()
    missing = [name for name in LIBRARIES if name not in found]
    if missing:
        sys.exit(
            f"error: this machine has no {', '.join(missing)} (ldconfig -p): images need glibc 2.34 or newer"
        )
    loader = next(name for name in found if name.startswith("ld-linux"))
    folder = f"/usr/lib/{machine}-linux-gnu"
    for name in LIBRARIES:
        put(root, f"{folder}/{name}", pathlib.Path(found[name]).resolve(), 0o755)
    # The loader's path is compiled into every program: /lib64 on x86-64, /lib on arm64.
    place = "/usr/lib64" if machine == "x86_64" else "/usr/lib"
    put(root, f"{place}/{loader}", pathlib.Path(found[loader]).resolve(), 0o755)
    (root / "usr/lib64").mkdir(exist_ok=True)
    for link in ("lib", "lib64"):
        os.symlink(f"usr/{link}", root / link)
    put(root, "/etc/ld.so.conf", f"{folder}\n/usr/local/nvidia/lib64\n")
    put(root, "/etc/passwd", PASSWD)
    put(root, "/etc/group", GROUP)
    put(root, "/etc/nsswitch.conf", "hosts: files dns\n")
    put(root, "/etc/ssl/certs/ca-certificates.crt", pathlib.Path(CERTIFICATES))
    for name, mode in (("home/nonroot", 0o755), ("usr/bin", 0o755), ("tmp", 0o1777)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(mode)
    # The umask of the user must not show in the image.
    for base, folders, _ in os.walk(root):
        for name in folders:
            path = pathlib.Path(base) / name
            if not path.is_symlink() and path != root / "tmp":
                path.chmod(0o755)


def main():
    if len(sys.argv) != 2:
        sys.exit("usage: root.py FOLDER (replaced)")
    root = pathlib.Path(sys.argv[1])
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    make(root)


if __name__ == "__main__":
    main()
