"""`tritonclient`, NVIDIA's client of the KServe v2 protocol, over HTTP and over gRPC."""

import queue

import numpy
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from check import check, expect, expect_error, run
from tritonclient.utils import InferenceServerException

PROMPT = "def add(a, b):\n    return"


def connect(server, protocol):
    if protocol is triton_http:
        return triton_http.InferenceServerClient(server.base_url.removeprefix("http://"), network_timeout=120)
    return triton_grpc.InferenceServerClient(server.grpc_address)


def tensor(protocol, name, values, datatype):
    values = numpy.asarray(values)
    made = protocol.InferInput(name, list(values.shape), datatype)
    made.set_data_from_numpy(values)
    return made


def texts(protocol, name, *values):
    return tensor(protocol, name, numpy.array([value.encode() for value in values], dtype=object), "BYTES")


def on_both(what):
    """Registers a check for each of the two protocols."""

    def register(function):
        for protocol, name in ((triton_http, "HTTP"), (triton_grpc, "gRPC")):
            check(f"{name}: {what}")(lambda server, protocol=protocol: function(server, protocol))
        return function

    return register


@on_both("live, ready, metadata of server and model, repository index")
def metadata(server, protocol):
    client = connect(server, protocol)
    expect(client.is_server_live() and client.is_server_ready(), "not live or not ready")
    expect(client.is_model_ready(server.model) and not client.is_model_ready("missing"), server.model)
    found = client.get_server_metadata()
    name = found["name"] if protocol is triton_http else found.name
    expect(name == "trustformers-serve", found)
    found = client.get_model_metadata(server.model)
    inputs = found["inputs"] if protocol is triton_http else found.inputs
    names = [each["name"] if protocol is triton_http else each.name for each in inputs]
    expect("text_input" in names, names)
    index = client.get_model_repository_index()
    models = index if protocol is triton_http else index.models
    names = [each["name"] if protocol is triton_http else each.name for each in models]
    expect(server.model in names, names)


@on_both("infer: generation")
def generate(server, protocol):
    inputs = [
        texts(protocol, "text_input", PROMPT, "1, 2, 3,"),
        tensor(protocol, "max_tokens", numpy.array([6], dtype=numpy.int32), "INT32"),
        tensor(protocol, "temperature", numpy.array([0], dtype=numpy.float32), "FP32"),
    ]
    found = connect(server, protocol).infer(server.model, inputs, request_id="mine")
    text = found.as_numpy("text_output")
    expect(text.shape == (2,) and b"a + b" in text[0] and b"4" in text[1], text)
    counts = found.as_numpy("completion_tokens")
    expect(counts.shape == (2,) and counts.max() <= 6, counts)
    response = found.get_response()
    identity = response["id"] if protocol is triton_http else response.id
    expect(identity == "mine", response)


@on_both("infer: embeddings, the outputs that are named only")
def embed(server, protocol):
    inputs = [
        texts(protocol, "text", "A cat sits on the mat.", "A kitten rests on the carpet.", "Rates rose.")
    ]
    outputs = [protocol.InferRequestedOutput("embedding")]
    found = connect(server, protocol).infer(server.embed_model, inputs, outputs=outputs)
    rows = found.as_numpy("embedding")
    expect(rows.dtype == numpy.float32 and rows.shape[0] == 3 and rows.shape[1] > 100, rows.shape)
    expect(rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2, rows[0] @ rows[1])
    expect(found.as_numpy("truncated") is None, "an output that was not asked for")


@on_both("infer: errors")
def errors(server, protocol):
    client = connect(server, protocol)
    question = [texts(protocol, "text_input", "a")]
    missing = expect_error(InferenceServerException, lambda: client.infer("missing", question))
    expect("missing" in missing.message(), missing)
    wrong = expect_error(
        InferenceServerException, lambda: client.infer(server.model, [texts(protocol, "nothing", "a")])
    )
    expect("nothing" in wrong.message(), wrong)


@check("HTTP: compressed requests and answers, without binary data")
def compressed(server):
    client = connect(server, triton_http)
    made = triton_http.InferInput("text", [1], "BYTES")
    made.set_data_from_numpy(numpy.array([b"A cat sits on the mat."], dtype=object), binary_data=False)
    outputs = [triton_http.InferRequestedOutput("embedding", binary_data=False)]
    plain = client.infer(server.embed_model, [made], outputs=outputs).as_numpy("embedding")
    for algorithm in ("gzip", "deflate"):
        found = client.infer(
            server.embed_model,
            [made],
            outputs=outputs,
            request_compression_algorithm=algorithm,
            response_compression_algorithm=algorithm,
        )
        expect(numpy.allclose(found.as_numpy("embedding"), plain, atol=1e-5), algorithm)


@check("gRPC: stream of inferences")
def stream(server):
    client = connect(server, triton_grpc)
    answers = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    inputs = [
        texts(triton_grpc, "text_input", PROMPT),
        tensor(triton_grpc, "max_tokens", numpy.array([6], dtype=numpy.int32), "INT32"),
        tensor(triton_grpc, "temperature", numpy.array([0], dtype=numpy.float32), "FP32"),
        tensor(triton_grpc, "stream", numpy.array([True]), "BOOL"),
    ]
    client.async_stream_infer(server.model, inputs, request_id="s", enable_empty_final_response=True)
    text = b""
    while True:
        result, error = answers.get(timeout=60)
        expect(error is None, error)
        response = result.get_response()
        piece = result.as_numpy("text_output")
        text += b"" if piece is None or piece.size == 0 else piece[0]
        if response.parameters["triton_final_response"].bool_param:
            break
    client.async_stream_infer("missing", inputs)
    _, error = answers.get(timeout=60)
    expect(error is not None and "missing" in error.message(), error)
    client.stop_stream()
    expect(b"a + b" in text, text)


run("tritonclient")
