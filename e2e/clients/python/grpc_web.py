"""gRPC-Web as browsers send it: binary and as text, unary and as a stream, with CORS."""

import base64
import http.client
import struct
import urllib.parse

from check import check, expect, run
from stubs import pb

PROMPT = "def add(a, b):\n    return"
PATH = "/trustformers.v1.InferenceService"


def frame(message):
    data = message.SerializeToString()
    return struct.pack(">BI", 0, len(data)) + data


def call(server, method, message, as_text=False):
    """The messages and the trailers of an answer, and its headers."""
    kind = "application/grpc-web-text" if as_text else "application/grpc-web+proto"
    body = base64.b64encode(frame(message)) if as_text else frame(message)
    address = urllib.parse.urlsplit(f"//{server.grpc_address}")
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    headers = {"content-type": kind, "accept": kind, "x-grpc-web": "1", "origin": "http://localhost:3000"}
    connection.request("POST", f"{PATH}/{method}", body, headers)
    response = connection.getresponse()
    data = response.read()
    expect(response.status == 200, response.status, data)
    if as_text:
        # Each chunk may be padded for itself.
        data = b"".join(base64.b64decode(part + b"=" * (-len(part) % 4)) for part in data.split(b"=") if part)
    messages, trailers = [], {}
    while data:
        flags, length = struct.unpack(">BI", data[:5])
        content, data = data[5 : 5 + length], data[5 + length :]
        if flags & 0x80:
            lines = [line.split(":", 1) for line in content.decode().split("\r\n") if line]
            trailers = {name.strip().lower(): value.strip() for name, value in lines}
        else:
            messages.append(content)
    return messages, trailers, response.headers


def request(server, **fields):
    return pb.GenerateRequest(prompt=PROMPT, max_tokens=8, **({"model": server.model} | fields))


@check("unary, binary and as text")
def unary(server):
    for as_text in (False, True):
        messages, trailers, headers = call(server, "Generate", request(server), as_text)
        expect(trailers["grpc-status"] == "0" and len(messages) == 1, trailers)
        expect("a + b" in pb.GenerateResponse.FromString(messages[0]).text, messages)
        expect(headers["access-control-allow-origin"] in ("*", "http://localhost:3000"), headers.items())


@check("stream, binary and as text")
def stream(server):
    for as_text in (False, True):
        messages, trailers, _ = call(server, "GenerateStream", request(server), as_text)
        pieces = [pb.GenerateStreamResponse.FromString(message) for message in messages]
        expect(trailers["grpc-status"] == "0" and len(pieces) > 2, trailers)
        expect("a + b" in "".join(piece.text for piece in pieces), pieces)


@check("errors in the trailers, or in the headers of an answer without messages")
def errors(server):
    messages, trailers, headers = call(server, "Generate", request(server, model="missing"))
    status = trailers.get("grpc-status") or headers["grpc-status"]
    expect(status == "5" and not messages, trailers, headers.items())


@check("CORS: the preflight of a browser")
def preflight(server):
    address = urllib.parse.urlsplit(f"//{server.grpc_address}")
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    headers = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type,x-grpc-web",
    }
    connection.request("OPTIONS", f"{PATH}/Generate", headers=headers)
    response = connection.getresponse()
    response.read()
    allowed = response.headers["access-control-allow-headers"] or ""
    expect(response.status in (200, 204), response.status)
    expect(allowed == "*" or "x-grpc-web" in allowed.lower(), response.headers.items())


run("grpc-web")
