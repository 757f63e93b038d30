"""The operator's route feed with one table: every model is served by one server. It runs until it is ended.

routing_feed.py FEED_ADDRESS HTTP_URL GRPC_ADDRESS NAME=TASK...
"""

import concurrent.futures
import sys
import threading
import urllib.parse

import grpc
from stubs import generate

pb, services = generate("trustformers/control/v1/control.proto", ("control_pb2", "control_pb2_grpc"))


def table(http_url, grpc_address, models):
    """A table in which every model has one endpoint, the server's."""
    http = urllib.parse.urlsplit(http_url)
    endpoint = pb.Endpoint(
        pod_name="server",
        pod_uid="00000000-0000-4000-8000-000000000000",
        address=http.hostname,
        http_port=http.port,
        grpc_port=int(grpc_address.rsplit(":", 1)[1]),
    )
    routes = []
    for name, task in models:
        backend = pb.Backend(revision="r1", digest="0" * 64, weight=100, endpoints=[endpoint])
        routes.append(pb.Route(name=f"default/{name}", aliases=[name], backends=[backend], task=task))
    return pb.RouteTable(version=pb.TableVersion(term=1, counter=1), routes=routes)


class Feed(services.RouteServiceServicer):
    """Sends the table to each gateway, and keeps its call open."""

    def __init__(self, routes):
        self.routes = routes

    def Watch(self, reports, context):
        ended = threading.Event()
        context.add_callback(ended.set)
        yield self.routes
        ended.wait()


def main():
    """Serves the table that the arguments describe."""
    feed_address, http_url, grpc_address, *models = sys.argv[1:]
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(max_workers=4))
    routes = table(http_url, grpc_address, [model.split("=") for model in models])
    services.add_RouteServiceServicer_to_server(Feed(routes), server)
    server.add_insecure_port(feed_address)
    server.start()
    server.wait_for_termination()


main()
