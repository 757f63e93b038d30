"""A plugin of pytest that runs llama.cpp's tests of its server against another one.

The tests speak to a translator on their port, which passes requests on: llama.cpp serves routes without
`/v1`, takes any name of a model and answers for one model alone. Texts of llama.cpp's own small model are not
looked at. What differs for another reason is listed here with the reason; a test that is listed and passes
fails the suite, so that the list stays right.
"""

import http.client
import json
import os
import sys
import threading
import types
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

# Only downloads of models need it, and there is no wheel of it.
sys.modules.setdefault("wget", types.ModuleType("wget"))

ROUTES_WITHOUT_V1 = ("/chat/completions", "/completions", "/embeddings", "/models", "/responses")

OWN_MODEL = "compares texts, counts or limits of llama.cpp's test model"
OWN_FIELD = "a field or a route of llama.cpp's own, which is refused by name here"
OWN_TEMPLATE = "needs the server started with another chat template"
FINGERPRINT = "system_fingerprint is the beginning of the model's digest here, not llama.cpp's build"
ROLE_CHUNK = "the first chunk has the role alone: clients fail on null in a delta"
NO_SCHEMA = "a schema stands under json_schema, as OpenAI has it"
PICTURES = "the models here read text only: 400 that names the block, where llama.cpp answers 500"

# What may differ, by the test and a part of its parameters: the model draws its answer, and may call a
# function that it is offered and need not call. Without functions, and where none may be called, a call is a
# fault.
DRAWN = {("test_completion_without_tool_call_fast", "-tools1-None-"): "the model decides whether it calls"}

# What differs: tests, or tests with their parameters, each with the reason.
DIFFERENT = {
    # test_chat_completion.py
    "test_chat_completion": OWN_MODEL,
    "test_chat_completion_cached_tokens": OWN_MODEL,
    "test_chat_completion_stream": ROLE_CHUNK,
    "test_chat_completion_with_openai_library": FINGERPRINT,
    "test_chat_template": OWN_TEMPLATE,
    "test_chat_template_assistant_prefill": OWN_TEMPLATE,
    "test_chat_template_continue_final_message_vllm_compat": OWN_TEMPLATE,
    "test_apply_chat_template": OWN_FIELD,
    'test_completion_with_response_format[response_format0-6-"42"]': NO_SCHEMA,
    "test_completion_with_response_format[response_format1-10-[ -3000 ]]": NO_SCHEMA,
    "test_completion_with_json_schema": NO_SCHEMA,
    "test_completion_with_grammar": "a grammar stands under response_format, in Lark",
    "test_invalid_chat_completion_req[messages7]": "the template decides whether two answers in a row fit",
    "test_chat_completion_with_timings_per_token": OWN_FIELD,
    "test_logit_bias": OWN_FIELD,
    "test_context_size_exceeded": OWN_MODEL,
    "test_context_size_exceeded_stream": OWN_MODEL,
    "test_return_progress": OWN_FIELD,
    "test_chat_completions_multiple_choices": OWN_FIELD,
    "test_chat_completions_token_count": OWN_FIELD,
    "test_verbose_debug": OWN_FIELD,
    # test_compat_anthropic.py
    "test_anthropic_tool_result_with_image": PICTURES,
    "test_anthropic_vision_format_accepted": PICTURES,
    "test_anthropic_vision_base64_with_multimodal_model": PICTURES,
    "test_anthropic_empty_messages": "an empty list of messages is refused, as by Anthropic",
    "test_anthropic_thinking_history_in_count_tokens": OWN_TEMPLATE,
    "test_anthropic_thinking_history_in_template": OWN_TEMPLATE,
    # test_compat_oai_responses.py
    "test_responses_stream_with_llama_telemetry": OWN_FIELD,
    # test_embedding.py
    "test_embedding_mixed_input[input3-False]": "a list is of token ids or of texts",
    "test_embedding_mixed_input[input7-True]": "a list is of token ids or of texts",
    "test_embedding_mixed_input[input8-False]": OWN_FIELD,
    "test_embedding_mixed_input[input9-False]": OWN_FIELD,
    "test_embedding_mixed_input[input10-True]": OWN_FIELD,
    "test_embedding_content_text_same_as_string": OWN_FIELD,
    "test_embedding_pooling_none": OWN_FIELD,
    "test_embedding_pooling_none_oai": "the pooling is the model's own",
    "test_embedding_error_prompt_too_long": "texts that are too long are cut, unless truncate is false",
    # test_completion.py
    "test_completion_with_openai_library": FINGERPRINT,
}

# Of the tests for large models, which llama.cpp downloads, one family is run with the server's own model.
LARGE_MODELS_RUN = ("test_completion_with_required_tool_real_model[", "Qwen2.5-Coder-3B")


def translated(path, body):
    """The path and the body as this server takes them."""
    if path in ROUTES_WITHOUT_V1:
        path = f"/v1{path}"
    try:
        fields = json.loads(body)
    except ValueError:
        return path, body
    if not isinstance(fields, dict):
        return path, body
    embeds = path.endswith("/embeddings")
    fields["model"] = os.environ["TRUSTFORMERS_EMBED_MODEL" if embeds else "TRUSTFORMERS_MODEL"]
    return path, json.dumps(fields).encode()


class Translator(BaseHTTPRequestHandler):
    """Passes each request on and its answer back, as it comes."""

    def do_GET(self):
        self.relay(b"")

    def do_POST(self):
        self.relay(self.rfile.read(int(self.headers.get("content-length") or 0)))

    def relay(self, body):
        server = urllib.parse.urlsplit(os.environ["TRUSTFORMERS_URL"])
        path, body = translated(self.path, body)
        connection = http.client.HTTPConnection(server.hostname, server.port, timeout=120)
        headers = {"content-type": "application/json"} | {
            name: value
            for name, value in self.headers.items()
            if name.lower().startswith(("x-", "anthropic"))
        }
        connection.request(self.command, path, body, headers)
        answer = connection.getresponse()
        self.send_response(answer.status)
        self.send_header("content-type", answer.headers.get("content-type", ""))
        self.end_headers()
        while piece := answer.read1(65536):
            self.wfile.write(piece)
            self.wfile.flush()

    def log_message(self, *arguments):
        """Nothing: pytest shows what a failed test received."""


def pytest_configure(config):
    """Starts the translator."""
    listener = ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Translator)
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    import utils

    # Texts of llama.cpp's test model are not those of another one.
    utils.match_regex = lambda regex, text: True


def pytest_collection_modifyitems(config, items):
    """Leaves out tests of other models, and marks what differs. A listed test that passes is an error."""
    large = [item for item in items if item.get_closest_marker("slow")]
    left_out = [item for item in large if not all(text in item.nodeid for text in LARGE_MODELS_RUN)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    unknown = set(DIFFERENT)
    for item in items:
        for name in {item.originalname, item.name} & set(DIFFERENT):
            unknown.discard(name)
            item.add_marker(pytest.mark.xfail(reason=DIFFERENT[name], strict=True))
        for (name, parameters), reason in DRAWN.items():
            if item.originalname == name and parameters in item.name:
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False))
    if unknown:
        raise pytest.UsageError(f"llama_cpp_suite.py lists tests that are not there: {sorted(unknown)}")
