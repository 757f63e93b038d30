"""`grpcio` with the code that it makes of our .proto: unary calls, streams, sessions, health, errors."""

import queue

import grpc
from check import check, expect, expect_error, run
from stubs import pb, services

PROMPT = "def add(a, b):\n    return"


def channel(server):
    return grpc.insecure_channel(server.grpc_address)


def inference(server):
    return services.InferenceServiceStub(channel(server))


@check("Generate, with the model's digest in the metadata")
def generate(server):
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=8, model=server.model)
    answer, call = inference(server).Generate.with_call(request, timeout=60)
    expect("a + b" in answer.text and len(answer.tokens) == answer.usage.completion_tokens, answer)
    expect(answer.finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH), answer)
    heads = dict(call.initial_metadata())
    expect(heads["x-trustformers-digest"] == answer.model_digest, heads)


@check("GenerateStream, and a stream that is cancelled")
def stream(server):
    request = pb.GenerateRequest(prompt=PROMPT, max_tokens=8, model=server.model)
    whole = inference(server).Generate(request, timeout=60)
    pieces = list(inference(server).GenerateStream(request, timeout=60))
    expect("".join(piece.text for piece in pieces) == whole.text, pieces)
    expect(pieces[-1].finish_reason == whole.finish_reason and pieces[-1].usage == whole.usage, pieces[-1])
    long = inference(server).GenerateStream(
        pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, model=server.model)
    )
    next(iter(long))
    long.cancel()
    expect(inference(server).Generate(request, timeout=60).text == whole.text, "after a cancelled stream")


@check("Embed")
def embed(server):
    texts = ["A cat sits on the mat.", "A kitten rests on the carpet."]
    answer = inference(server).Embed(pb.EmbedRequest(input=texts, model=server.embed_model), timeout=60)
    expect(len(answer.data) == 2 and len(answer.data[0].values) > 100, answer.usage)


@check("Session: several requests on one call, one of them cancelled")
def session(server):
    generation = pb.GenerateRequest(prompt=PROMPT, max_tokens=8, model=server.model)
    long = pb.GenerateRequest(prompt=PROMPT, max_tokens=2000, model=server.model)
    missing = pb.GenerateRequest(prompt=PROMPT, model="missing")
    whole = inference(server).Generate(generation, timeout=60)
    requests = queue.SimpleQueue()
    for name, generate in (("a", generation), ("b", generation), ("long", long), ("wrong", missing)):
        requests.put(pb.SessionRequest(request_id=name, generate=generate))
    answers = []
    for answer in inference(server).Session(iter(requests.get, None), timeout=60):
        if answer.request_id == "long" and not any(found.request_id == "long" for found in answers):
            requests.put(pb.SessionRequest(request_id="long", cancel=pb.SessionRequest.Cancel()))
            # The end of the requests: the call ends with the last answer.
            requests.put(None)
        answers.append(answer)
    ends = {}
    for name in ("a", "b", "long", "wrong"):
        own = [found for found in answers if found.request_id == name]
        ends[name] = own[-1]
        if name in ("a", "b"):
            expect("".join(found.answer.text for found in own) == whole.text, own)
            expect(own[-1].answer.finish_reason == whole.finish_reason, own[-1])
    expect(ends["long"].answer.finish_reason == pb.FINISH_REASON_CANCELLED, ends["long"])
    expect(ends["wrong"].error.code == grpc.StatusCode.NOT_FOUND.value[0], ends["wrong"])
    expect(ends["wrong"].error.kind == "unknown_model", ends["wrong"])


@check("ModelService: the list, and a watch that begins with it")
def models(server):
    stub = services.ModelServiceStub(channel(server))
    names = [model.name for model in stub.ListModels(pb.ListModelsRequest(), timeout=60).models]
    expect(server.model in names and server.embed_model in names, names)
    watch = stub.WatchModels(pb.WatchModelsRequest())
    first = next(iter(watch))
    watch.cancel()
    expect([model.name for model in first.models] == names, first)


@check("HealthService")
def health(server):
    answer = services.HealthServiceStub(channel(server)).Check(pb.HealthCheckRequest(), timeout=60)
    expect(answer.status == pb.HealthCheckResponse.SERVING_STATUS_SERVING, answer)


@check("errors: code, kind, message")
def errors(server):
    cases = [
        (pb.GenerateRequest(prompt="a", model="missing"), grpc.StatusCode.NOT_FOUND, "unknown_model"),
        (pb.GenerateRequest(model=server.model), grpc.StatusCode.INVALID_ARGUMENT, "invalid_request"),
        (
            pb.GenerateRequest(prompt="a", model=server.embed_model),
            grpc.StatusCode.INVALID_ARGUMENT,
            "wrong_task",
        ),
    ]
    for request, code, kind in cases:
        error = expect_error(
            grpc.RpcError, lambda request=request: inference(server).Generate(request, timeout=60)
        )
        expect(error.code() == code and error.details(), error)
        expect(dict(error.trailing_metadata())["trustformers-error"] == kind, error.trailing_metadata())


@check("many requests at once over one connection")
def many(server):
    stub = inference(server)
    calls = [
        stub.Generate.future(
            pb.GenerateRequest(prompt=f"{number} + 1 =", max_tokens=4, model=server.model), timeout=120
        )
        for number in range(16)
    ]
    expect(all(call.result().usage.completion_tokens > 0 for call in calls), "an empty answer")


run("grpcio")
