"""Checks of one client against a running server: a line PASS or FAIL for each, and the exit code.

Every program here is started with the server's addresses and the names of its models: see `run.sh`.
"""

import argparse
import dataclasses
import sys
import traceback

CHECKS = []


class NoEmbedModel(Exception):
    """A check needs a model that embeds, and the server has none."""


@dataclasses.dataclass(frozen=True)
class Server:
    """Where the server listens and which of its models are asked."""

    base_url: str
    grpc_address: str
    model: str
    embedder: str

    @property
    def embed_model(self):
        """The model that embeds; where the server has none, the check that asks for it is left out."""
        if self.embedder == "none":
            raise NoEmbedModel("the server has no model that embeds")
        return self.embedder


def check(what):
    """Registers a check; it fails by raising."""

    def register(function):
        CHECKS.append((what, function))
        return function

    return register


def expect(condition, *found):
    """Fails where the condition is false; the message has what was found."""
    if not condition:
        raise AssertionError(" ".join(repr(value)[:400] for value in found) or "not as expected")


def expect_error(kind, function):
    """The error of that kind that a function raises."""
    try:
        found = function()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} expected, answered {found!r:.400}")


def place_of(error):
    """The line of the program where an error began, for its reader."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename
    ]
    own = [frame for frame in frames if not frame.filename.endswith("check.py")]
    return f"line {(own or frames)[-1].lineno}"


def run(client):
    """Runs every check of the program, whichever fail before, and ends it."""
    parser = argparse.ArgumentParser(description=f"Checks of {client}")
    parser.add_argument("base_url")
    parser.add_argument("grpc_address")
    parser.add_argument("model")
    parser.add_argument("embedder", metavar="embed_model", help="none: the server has no model that embeds")
    server = Server(**vars(parser.parse_args()))
    failed = 0
    for what, function in CHECKS:
        try:
            function(server)
            print(f"PASS {client}: {what}", flush=True)
        except NoEmbedModel as error:
            print(f"SKIP {client}: {what}: {error}", flush=True)
        except Exception as error:
            failed += 1
            words = " ".join(f"{type(error).__name__}: {error}".split())
            print(f"FAIL {client}: {what} ({place_of(error)}): {words[:600]}", flush=True)
    sys.exit(1 if failed else 0)
