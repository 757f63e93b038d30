#!/usr/bin/env python3
"""Packs folders and files into an image archive, without a container engine and byte for byte reproducible.

The archive is an OCI image layout and a docker archive at once, so `ctr images import`, `docker load`,
`podman load` and `skopeo` read it. Layers are stored uncompressed (their digest is then also the image's
"diff id"), in the order given: each --root folder is one layer, all --file entries together are the last one.
A layer that several images share has the same digest in each. Owner, times and order are fixed: the same
content gives the same bytes on every machine.

Beside ARCHIVE it writes ARCHIVE.id, one line `NAME DIGEST`, so that a node that already has the image need
not load it.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import stat
import sys
import tarfile

ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
EPOCH = "1970-01-01T00:00:00Z"


def entry(name, mode, kind=tarfile.REGTYPE, size=0, target=""):
    """A tar header that carries nothing of the machine it was made on."""
    info = tarfile.TarInfo(name)
    info.mode, info.type, info.size, info.linkname = mode, kind, size, target
    return info


def layer_of_root(folder):
    """The whole folder as one layer, its modes kept, sorted by path."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        paths = []
        for base, folders, files in os.walk(folder):
            paths += [os.path.join(base, name) for name in folders + files]
        for path in sorted(paths):
            name, status = os.path.relpath(path, folder), os.lstat(path)
            mode = stat.S_IMODE(status.st_mode)
            if stat.S_ISLNK(status.st_mode):
                tar.addfile(entry(name, 0o777, tarfile.SYMTYPE, target=os.readlink(path)))
            elif stat.S_ISDIR(status.st_mode):
                tar.addfile(entry(name, mode, tarfile.DIRTYPE))
            elif stat.S_ISREG(status.st_mode):
                with open(path, "rb") as data:
                    tar.addfile(entry(name, mode, size=status.st_size), data)
            else:
                sys.exit(f"error: {path}: only files, folders and links can be packed")
    return out.getvalue()


def layer_of_files(specs):
    """Single files, each SOURCE:DESTINATION:MODE, with the folders they need."""
    out, made = io.BytesIO(), set()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for spec in sorted(specs, key=lambda spec: spec.split(":")[1]):
            try:
                source, destination, mode = spec.split(":")
            except ValueError:
                sys.exit(f"error: --file {spec}: expected SOURCE:DESTINATION:MODE")
            parts = destination.strip("/").split("/")
            for depth in range(1, len(parts)):
                parent = "/".join(parts[:depth])
                if parent not in made:
                    made.add(parent)
                    tar.addfile(entry(parent, 0o755, tarfile.DIRTYPE))
            with open(source, "rb") as data:
                tar.addfile(entry("/".join(parts), int(mode, 8), size=os.stat(source).st_size), data)
    return out.getvalue()


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def path_of(descriptor):
    """Where the archive holds the blob of a descriptor."""
    return "blobs/sha256/" + descriptor["digest"].removeprefix("sha256:")


def pack(options):
    blobs = {}

    def blob(media_type, data):
        digest = hashlib.sha256(data).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = data
        return {
            "mediaType": f"application/vnd.oci.image.{media_type}",
            "digest": f"sha256:{digest}",
            "size": len(data),
        }

    layers = [blob("layer.v1.tar", layer_of_root(root)) for root in options.root]
    if options.file:
        layers.append(blob("layer.v1.tar", layer_of_files(options.file)))
    architecture = ARCHITECTURES[platform.machine()]
    config = blob(
        "config.v1+json",
        canonical(
            {
                "created": EPOCH,
                "architecture": architecture,
                "os": "linux",
                "config": {
                    "User": options.user,
                    "Env": ["PATH=/usr/local/bin:/usr/bin:/bin", *options.env],
                    "Entrypoint": options.entrypoint,
                    **({"Cmd": options.cmd} if options.cmd else {}),
                    "WorkingDir": options.workdir,
                    "ExposedPorts": {port: {} for port in options.port},
                    "Labels": dict(label.split("=", 1) for label in options.label),
                },
                "rootfs": {"type": "layers", "diff_ids": [layer["digest"] for layer in layers]},
                "history": [{"created": EPOCH, "created_by": "e2e/images/pack.py"} for _ in layers],
            }
        ),
    )
    manifest_json = canonical(
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        }
    )
    manifest = blob("manifest.v1+json", manifest_json)
    manifest["platform"] = {"architecture": architecture, "os": "linux"}
    manifest["annotations"] = {
        "io.containerd.image.name": options.tag,
        "org.opencontainers.image.ref.name": options.tag.rsplit(":", 1)[1],
    }
    files = {
        **blobs,
        "oci-layout": canonical({"imageLayoutVersion": "1.0.0"}),
        "index.json": canonical(
            {
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.index.v1+json",
                "manifests": [manifest],
            }
        ),
        "manifest.json": canonical(
            [
                {
                    "Config": path_of(config),
                    "RepoTags": [options.tag],
                    "Layers": [path_of(layer) for layer in layers],
                }
            ]
        ),
    }
    write(options.output, files)
    with open(options.output + ".id", "w", encoding="utf-8") as out:
        out.write(f"{options.tag} {manifest['digest']}\n")
    shown = " + ".join(f"{layer['size'] / 1e6:.1f}" for layer in layers)
    megabytes = sum(layer["size"] for layer in layers) / 1e6
    print(f"{options.tag}  {megabytes:.1f} MB ({shown})  {manifest['digest']}")


def write(output, files):
    """Written beside and renamed: an interrupted run leaves no half archive under the final name."""
    part = output + ".part"
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for name in sorted(files):
            tar.addfile(entry(name, 0o644, size=len(files[name])), io.BytesIO(files[name]))
    os.replace(part, output)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, metavar="ARCHIVE")
    parser.add_argument(
        "--tag", required=True, metavar="NAME:TAG", help="full name, such as localhost/thing:v1"
    )
    parser.add_argument(
        "--root", action="append", default=[], metavar="FOLDER", help="a folder that becomes one layer"
    )
    parser.add_argument("--file", action="append", default=[], metavar="SOURCE:DESTINATION:MODE")
    parser.add_argument("--user", default="")
    parser.add_argument("--workdir", default="/")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--port", action="append", default=[], metavar="8080/tcp")
    parser.add_argument("--label", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument(
        "--entrypoint", action="append", default=None, metavar="ARGUMENT", help="repeat for each argument"
    )
    parser.add_argument(
        "--cmd",
        action="append",
        default=[],
        metavar="ARGUMENT",
        help="of the entrypoint, where none is given",
    )
    options = parser.parse_args()
    if ":" not in options.tag.rsplit("/", 1)[-1]:
        parser.error(f"--tag {options.tag}: has no tag after the name")
    pack(options)


if __name__ == "__main__":
    main()
