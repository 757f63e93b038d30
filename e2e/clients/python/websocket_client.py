"""The `websockets` package on `GET /v1/stream`: several requests on one connection, cancelled, refused."""

import json

from check import check, expect, run
from websockets.sync.client import connect

PROMPT = "def add(a, b):\n    return"


def open_socket(server):
    address = server.base_url.replace("http", "ws", 1) + "/v1/stream"
    return connect(address, proxy=None, open_timeout=30, max_size=None)


def send(socket, **message):
    socket.send(json.dumps(message))


def receive(socket):
    return json.loads(socket.recv(timeout=60))


def until_ends(socket, names):
    """Every message, by the id of its request, until each of the requests has ended."""
    messages = {name: [] for name in names}
    while any(not found or found[-1]["type"] not in ("finished", "error") for found in messages.values()):
        message = receive(socket)
        messages[message["id"]].append(message)
    return messages


def generation(server, **fields):
    return {
        "type": "generate",
        "model": server.model,
        "prompt": PROMPT,
        "max_tokens": 8,
        "temperature": 0,
    } | fields


@check("two requests at a time, each with its own tokens and end")
def several(server):
    with open_socket(server) as socket:
        for name in ("a", "b"):
            send(socket, id=name, **generation(server))
        messages = until_ends(socket, ("a", "b"))
        for found in messages.values():
            text = "".join(message["text"] for message in found if message["type"] == "token")
            expect("a + b" in text, text)
            expect(found[-1]["finish_reason"] in ("stop", "length"), found[-1])
            expect(found[-1]["usage"]["completion_tokens"] == len(found) - 1, found[-1])
        # An id may be used again after its end.
        send(socket, id="a", **generation(server, max_tokens=1))
        expect(until_ends(socket, ("a",))["a"][-1]["finish_reason"] == "length", "the second use of an id")


@check("chat")
def chat(server):
    with open_socket(server) as socket:
        messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
        send(socket, id="c", type="chat", model=server.model, messages=messages, max_tokens=16, temperature=0)
        found = until_ends(socket, ("c",))["c"]
        deltas = [message["chunk"]["choices"][0]["delta"] for message in found if message["type"] == "token"]
        expect("Paris" in "".join(delta.get("content", "") for delta in deltas), found)
        expect(found[-1]["type"] == "finished", found[-1])


@check("cancel ends one request, and the others go on")
def cancel(server):
    with open_socket(server) as socket:
        send(socket, id="long", **generation(server, max_tokens=2000))
        first = receive(socket)
        expect((first["id"], first["type"]) == ("long", "token"), first)
        send(socket, id="short", **generation(server))
        send(socket, id="long", type="cancel")
        messages = until_ends(socket, ("long", "short"))
        expect(messages["long"][-1]["finish_reason"] == "cancelled", messages["long"][-1])
        expect(messages["short"][-1]["finish_reason"] in ("stop", "length"), messages["short"][-1])


@check("errors of one request leave the connection open")
def errors(server):
    with open_socket(server) as socket:
        cases = [
            (generation(server, model="missing"), "unknown_model"),
            (generation(server, temperature=-1), "invalid_request"),
            ({"type": "sing"}, "invalid_request"),
        ]
        for number, (request, kind) in enumerate(cases):
            send(socket, id=f"wrong-{number}", **request)
            found = until_ends(socket, (f"wrong-{number}",))[f"wrong-{number}"][-1]
            expect(found["type"] == "error" and found["error"]["type"] == kind, found)
        socket.send("{")
        found = receive(socket)
        expect(found["type"] == "error" and found["id"] is None, found)
        send(socket, id="right", **generation(server))
        expect(until_ends(socket, ("right",))["right"][-1]["type"] == "finished", "after errors")


@check("a closed connection ends its requests")
def leave(server):
    with open_socket(server) as socket:
        for number in range(8):
            send(socket, id=str(number), **generation(server, max_tokens=2000))
        receive(socket)
    with open_socket(server) as socket:
        send(socket, id="next", **generation(server))
        expect(until_ends(socket, ("next",))["next"][-1]["type"] == "finished", "after a closed connection")


run("websocket")
