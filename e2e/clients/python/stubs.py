"""The code that grpcio generates from our .proto, as a user of it would generate it."""

import importlib
import pathlib
import sys
import tempfile

from grpc_tools import protoc

PROTO = pathlib.Path(__file__).resolve().parents[3] / "proto" / "proto"


def generate(file="trustformers/v1/inference.proto", names=("inference_pb2", "inference_pb2_grpc")):
    """Compiles a .proto into a folder of its own, and gives the modules that are named."""
    package = file.rsplit("/", 1)[0].replace("/", ".")
    with tempfile.TemporaryDirectory(prefix="trustformers-stubs-") as folder:
        arguments = [
            "protoc",
            f"-I{PROTO}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            str(PROTO / file),
        ]
        if protoc.main(arguments) != 0:
            raise RuntimeError(f"protoc cannot compile {file}")
        sys.path.insert(0, folder)
        modules = [importlib.import_module(f"{package}.{name}") for name in names]
        sys.path.remove(folder)
    return modules


pb, services = generate()
