"""The `openai` package for Python: chat, tools, structured output, responses, embeddings, models, errors."""

import json

import numpy
import openai
import pydantic
from check import check, expect, expect_error, run

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
COUNT = [{"role": "user", "content": "Count from 1 to 5, separated by commas."}]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The present weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time", "description": "The time of a city"}}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
DEGREES = '{"degrees": 21, "sky": "clear"}'
# Small models go on with JSON after a call, unless they are told not to.
TELL = {"role": "user", "content": "Write one sentence about the weather in Paris, no JSON."}

# What the package and its wrappers send although it changes nothing here.
ACCEPTED = {
    "user": "user-1",
    "metadata": {"purpose": "test"},
    "store": False,
    "service_tier": "auto",
    "safety_identifier": "hash",
    "prompt_cache_key": "key",
}


class City(pydantic.BaseModel):
    """A city."""

    name: str
    country: str
    inhabitants_millions: int = pydantic.Field(ge=0, le=99)


def connect(server):
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=120)


def chat(server, messages, **options):
    given = {"model": server.model, "messages": messages, "temperature": 0, "max_tokens": 64} | options
    return connect(server).chat.completions.create(**given)


@check("models: list and one")
def models(server):
    client = connect(server)
    names = [model.id for model in client.models.list()]
    expect(server.model in names and server.embed_model in names, names)
    one = client.models.retrieve(server.model)
    expect(
        (one.id, one.object, one.owned_by) == (server.model, "model", "trustformers") and one.created > 0, one
    )


@check("chat")
def chat_whole(server):
    answer = chat(server, CAPITAL)
    choice = answer.choices[0]
    expect("Paris" in choice.message.content, choice)
    expect((answer.object, choice.index, choice.finish_reason) == ("chat.completion", 0, "stop"), answer)
    expect(choice.message.role == "assistant" and not choice.message.tool_calls, choice)
    usage = answer.usage
    expect(usage.prompt_tokens > 0 and usage.completion_tokens > 0, usage)
    expect(usage.total_tokens == usage.prompt_tokens + usage.completion_tokens, usage)


@check("chat: content parts, system and developer messages, fields that change nothing")
def chat_parts(server):
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    messages = [{"role": "developer", "content": "Answer in one word."}, {"role": "user", "content": parts}]
    answer = chat(server, messages, **ACCEPTED)
    expect("Paris" in answer.choices[0].message.content, answer)


@check("chat: max_tokens, max_completion_tokens, stop, seed")
def chat_limits(server):
    for limit in ({"max_tokens": 3}, {"max_tokens": None, "max_completion_tokens": 3}):
        answer = chat(server, COUNT, **limit)
        expect((answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3), answer)
    stopped = chat(server, COUNT, stop=["4"]).choices[0]
    expect(stopped.finish_reason == "stop" and "3" in stopped.message.content, stopped)
    expect("4" not in stopped.message.content, stopped)
    drawn = [chat(server, CAPITAL, temperature=1.5, seed=7).choices[0].message.content for _ in range(2)]
    expect(drawn[0] == drawn[1], drawn)


@check("chat: stream equals the whole answer, without usage")
def chat_stream(server):
    whole = chat(server, COUNT).choices[0].message.content
    chunks = list(chat(server, COUNT, stream=True))
    first, last = chunks[0].choices[0], chunks[-1].choices[0]
    expect(first.delta.role == "assistant", chunks[0])
    expect(all("role" not in chunk.choices[0].delta.model_fields_set for chunk in chunks[1:]), chunks[1])
    expect(last.finish_reason == "stop" and not last.delta.model_fields_set, chunks[-1])
    expect(all(chunk.choices[0].finish_reason is None for chunk in chunks[:-1]), chunks)
    expect("".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole, whole)
    heads = {(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}
    expect(len(heads) == 1 and chunks[0].object == "chat.completion.chunk", heads)
    expect(all(chunk.usage is None for chunk in chunks), chunks[-1])


@check("chat: stream with usage")
def chat_stream_usage(server):
    whole = chat(server, COUNT)
    chunks = list(chat(server, COUNT, stream=True, stream_options={"include_usage": True}))
    expect(chunks[-1].choices == [] and chunks[-1].usage.total_tokens == whole.usage.total_tokens, chunks[-1])
    expect(all(chunk.usage is None for chunk in chunks[:-1]), chunks)
    expect(chunks[-2].choices[0].finish_reason == "stop", chunks[-2])


@check("chat: the package's own stream of events")
def chat_stream_events(server):
    client = connect(server)
    given = {"model": server.model, "messages": COUNT, "temperature": 0, "max_tokens": 64}
    with client.chat.completions.stream(**given, stream_options={"include_usage": True}) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    expect("content.delta" in kinds and kinds.count("content.done") == 1, kinds[-3:])
    expect(final.choices[0].message.content == chat(server, COUNT).choices[0].message.content, final)
    expect(final.usage.completion_tokens > 0, final)


def one_call(choice, name="get_weather"):
    calls = choice.message.tool_calls
    expect(calls and len(calls) == 1 and calls[0].function.name == name, choice)
    expect(calls[0].type == "function" and calls[0].id.startswith("call_"), calls)
    arguments = json.loads(calls[0].function.arguments)
    expect(set(arguments) == {"city", "unit"} and arguments["unit"] in ("celsius", "fahrenheit"), arguments)
    return calls[0]


@check("tools: the model calls by itself, and answers with the result")
def tools_auto(server):
    choice = chat(server, ASK_WEATHER, tools=[WEATHER]).choices[0]
    expect(choice.finish_reason == "tool_calls", choice)
    call = one_call(choice)
    expect("<tool_call>" not in (choice.message.content or ""), choice)
    result = {"role": "tool", "tool_call_id": call.id, "content": DEGREES}
    turn = [*ASK_WEATHER, choice.message.model_dump(exclude_none=True), result, TELL]
    answer = chat(server, turn, tools=[WEATHER])
    expect("21" in answer.choices[0].message.content, answer)


@check("tools: tool_choice required, named, none")
def tools_choice(server):
    greeting = [{"role": "user", "content": "Hello! How are you?"}]
    limits = {"max_tokens": 128, "parallel_tool_calls": False}
    choice = chat(server, greeting, tools=[WEATHER], tool_choice="required", **limits).choices[0]
    expect(choice.finish_reason == "tool_calls", choice)
    one_call(choice)
    named = {"type": "function", "function": {"name": "get_weather"}}
    choice = chat(server, greeting, tools=[CLOCK, WEATHER], tool_choice=named, **limits).choices[0]
    expect(choice.finish_reason == "stop", choice)
    one_call(choice)
    choice = chat(server, ASK_WEATHER, tools=[WEATHER], tool_choice="none").choices[0]
    expect(choice.finish_reason in ("stop", "length") and not choice.message.tool_calls, choice)


@check("tools: stream of a call")
def tools_stream(server):
    given = {
        "tools": [CLOCK, WEATHER],
        "tool_choice": {"type": "function", "function": {"name": "get_weather"}},
    }
    whole = one_call(chat(server, ASK_WEATHER, **given).choices[0])
    deltas = [chunk.choices[0].delta for chunk in chat(server, ASK_WEATHER, stream=True, **given)]
    calls = [call for delta in deltas for call in delta.tool_calls or []]
    expect(all(len(delta.tool_calls or []) <= 1 for delta in deltas), deltas)
    expect(
        (calls[0].index, calls[0].function.name, calls[0].type) == (0, "get_weather", "function"), calls[0]
    )
    expect(calls[0].id and calls[0].function.arguments == "", calls[0])
    expect(all(call.id is None and call.function.name is None for call in calls[1:]), calls)
    joined = "".join(call.function.arguments for call in calls)
    expect(json.loads(joined) == json.loads(whole.function.arguments), joined)
    expect(not any(delta.content for delta in deltas), deltas)


@check("tools: refusals of a choice that cannot be")
def tools_refused(server):
    missing = {"type": "function", "function": {"name": "missing"}}
    for given in (
        {"tools": [WEATHER], "tool_choice": missing},
        {"tool_choice": "required"},
        {"tools": [WEATHER], "tool_choice": {}},
        {"tools": [WEATHER, WEATHER]},
    ):
        error = expect_error(openai.BadRequestError, lambda given=given: chat(server, ASK_WEATHER, **given))
        expect((error.param or "").startswith("tool"), error, error.param)


@check("structured output: parse of a class, JSON object, refused schema")
def structured(server):
    client = connect(server)
    question = [{"role": "user", "content": "Describe Tokyo as JSON."}]
    given = {"model": server.model, "messages": question, "temperature": 0, "max_tokens": 128}
    parsed = client.chat.completions.parse(**given, response_format=City).choices[0].message.parsed
    expect(isinstance(parsed, City) and parsed.name, parsed)
    with client.chat.completions.stream(**given, response_format=City) as stream:
        for _ in stream:
            pass
        expect(stream.get_final_completion().choices[0].message.parsed == parsed, parsed)
    anything = chat(server, question, response_format={"type": "json_object"}, max_tokens=256).choices[0]
    expect(
        anything.finish_reason != "stop" or isinstance(json.loads(anything.message.content), dict), anything
    )
    for refused in (
        {"type": "json_schema", "json_schema": {"name": "bad", "schema": {"type": "strin"}}},
        {"type": "yaml"},
    ):
        error = expect_error(
            openai.BadRequestError, lambda refused=refused: chat(server, question, response_format=refused)
        )
        expect((error.param or "").startswith("response_format"), error, error.param)


@check("n: whole and as a stream")
def several(server):
    given = {"n": 3, "temperature": 1.2, "seed": 3, "max_tokens": 12}
    answer = chat(server, CAPITAL, **given)
    expect([choice.index for choice in answer.choices] == [0, 1, 2], answer)
    chunks = list(chat(server, CAPITAL, stream=True, **given))
    for index, choice in enumerate(answer.choices):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        expect(own[0].delta.role == "assistant" and own[-1].finish_reason == choice.finish_reason, own)
        expect("".join(part.delta.content or "" for part in own) == choice.message.content, own)
    roles = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    expect(roles == [0, 1, 2], roles)
    error = expect_error(openai.BadRequestError, lambda: chat(server, CAPITAL, n=0))
    expect(error.param == "n", error)


@check("logprobs: whole and as a stream")
def logprobs(server):
    given = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    choice = chat(server, COUNT, **given).choices[0]
    tokens = choice.logprobs.content
    expect(b"".join(bytes(token.bytes) for token in tokens).decode() == choice.message.content, tokens)
    expect(all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens), tokens)
    expect(tokens[0].top_logprobs[0].token == tokens[0].token, tokens[0])
    chunks = list(chat(server, COUNT, stream=True, **given))
    streamed = [
        token for chunk in chunks if chunk.choices[0].logprobs for token in chunk.choices[0].logprobs.content
    ]
    expect([token.token for token in streamed] == [token.token for token in tokens], streamed)


@check("completions: text, tokens, echo, logprobs, several prompts, stream")
def completions(server):
    client = connect(server)
    given = {"model": server.model, "temperature": 0, "max_tokens": 8}
    answer = client.completions.create(prompt="def add(a, b):\n    return", **given)
    expect(answer.object == "text_completion" and "a + b" in answer.choices[0].text, answer)
    chunks = list(client.completions.create(prompt="def add(a, b):\n    return", stream=True, **given))
    expect("".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text, chunks)
    expect(chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason, chunks[-1])
    echoed = client.completions.create(prompt="def add(a, b):", echo=True, **given).choices[0].text
    expect(echoed.startswith("def add(a, b):"), echoed)
    two = client.completions.create(prompt=["1, 2, 3,", "a, b, c,"], **given)
    expect([choice.index for choice in two.choices] == [0, 1], two)
    scored = client.completions.create(prompt="1, 2, 3,", logprobs=1, **given).choices[0].logprobs
    expect(len(scored.tokens) == len(scored.token_logprobs) == 8, scored)
    ids = client.completions.create(prompt=[16, 11, 220, 17, 11], **given)
    expect(ids.usage.prompt_tokens == 5 and ids.choices[0].text, ids)


@check("responses: whole, instructions, history")
def responses(server):
    client = connect(server)
    given = {"model": server.model, "temperature": 0, "max_output_tokens": 64, "store": False}
    answer = client.responses.create(input="What is the capital of France? Answer in one word.", **given)
    expect(
        (answer.object, answer.status) == ("response", "completed") and "Paris" in answer.output_text, answer
    )
    expect(answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens, answer.usage)
    history = [{"role": "user", "content": "Remember the word cobalt."}, *answer.output]
    history.append({"role": "user", "content": "Which word did I ask you to remember?"})
    again = client.responses.create(input=history, instructions="Answer in one word.", **given)
    expect("cobalt" in again.output_text.lower(), again.output_text)
    cut = client.responses.create(
        input="Write the numbers from 1 to 100.", **{**given, "max_output_tokens": 16}
    )
    expect((cut.status, cut.incomplete_details.reason) == ("incomplete", "max_output_tokens"), cut)


@check("responses: stream")
def responses_stream(server):
    client = connect(server)
    given = {"model": server.model, "temperature": 0, "max_output_tokens": 64}
    events = list(client.responses.create(input="Count from 1 to 5.", stream=True, **given))
    kinds = [event.type for event in events]
    expect(kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds)
    expect([event.sequence_number for event in events] == list(range(len(events))), kinds)
    for kind in (
        "output_item.added",
        "content_part.added",
        "output_text.done",
        "content_part.done",
        "output_item.done",
    ):
        expect(kinds.count(f"response.{kind}") == 1, kind, kinds)
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    expect(text and text == events[-1].response.output_text, text)
    with client.responses.stream(input="Count from 1 to 5.", **given) as stream:
        for _ in stream:
            pass
        expect(stream.get_final_response().output_text == text, text)


@check("responses: tools, parse, refusals")
def responses_tools(server):
    client = connect(server)
    given = {"model": server.model, "temperature": 0, "max_output_tokens": 128}
    tool = {"type": "function"} | WEATHER["function"]
    question = "What is the weather in Paris, in celsius?"
    answer = client.responses.create(input=question, tools=[tool], tool_choice="required", **given)
    calls = [item for item in answer.output if item.type == "function_call"]
    expect(calls and calls[0].name == "get_weather" and json.loads(calls[0].arguments)["city"], answer.output)
    events = list(
        client.responses.create(input=question, tools=[tool], tool_choice="required", stream=True, **given)
    )
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    expect(json.loads(done[0].arguments)["city"], done)
    result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": DEGREES}
    turn = [{"role": "user", "content": question}, *answer.output, result, TELL]
    expect("21" in client.responses.create(input=turn, tools=[tool], **given).output_text, turn)
    parsed = client.responses.parse(input="Describe Tokyo as JSON.", text_format=City, **given).output_parsed
    expect(isinstance(parsed, City), parsed)
    error = expect_error(
        openai.BadRequestError,
        lambda: client.responses.create(input="a", previous_response_id="resp_1", **given),
    )
    expect(error.param == "previous_response_id", error)


@check("embeddings: both encodings, lists, token ids, meaning")
def embeddings(server):
    client = connect(server)
    texts = ["A cat sits on the mat.", "A kitten rests on the carpet.", "Interest rates rose again."]
    packed = client.embeddings.create(model=server.embed_model, input=texts)
    floats = client.embeddings.create(model=server.embed_model, input=texts, encoding_format="float")
    rows = numpy.array([item.embedding for item in packed.data])
    expect(rows.shape[0] == 3 and rows.shape[1] > 100, rows.shape)
    expect(numpy.allclose(rows, [item.embedding for item in floats.data], atol=1e-6), rows[0][:4])
    expect([item.index for item in packed.data] == [0, 1, 2] and packed.object == "list", packed)
    near, far = rows[0] @ rows[1], rows[0] @ rows[2]
    expect(near > far + 0.2, near, far)
    one = client.embeddings.create(model=server.embed_model, input=texts[0], encoding_format="float")
    expect(numpy.allclose(one.data[0].embedding, rows[0], atol=1e-4), one.data[0].embedding[:4])
    expect(one.usage.prompt_tokens == one.usage.total_tokens > 0, one.usage)
    ids = client.embeddings.create(model=server.embed_model, input=[[101, 1037, 4937, 102], [101, 102]])
    expect(len(ids.data) == 2, ids)
    error = expect_error(
        openai.BadRequestError,
        lambda: client.embeddings.create(model=server.embed_model, input="a", dimensions=7),
    )
    expect(error.param == "dimensions", error)
    error = expect_error(
        openai.BadRequestError,
        lambda: client.embeddings.create(model=server.embed_model, input=[100_000_000]),
    )
    expect("check_embedding_ctx_length" in error.message, error)


@check("errors: status, type, param, code, id of the request, no retry")
def errors(server):
    cases = [
        (openai.BadRequestError, {"temperature": -1}, "temperature", "invalid_request"),
        (openai.BadRequestError, {"extra_body": {"temprature": 1}}, "temprature", "invalid_request"),
        (openai.BadRequestError, {"messages": []}, "messages", "invalid_request"),
        (openai.BadRequestError, {"model": server.embed_model}, "model", "wrong_task"),
        (openai.NotFoundError, {"model": "missing"}, "model", "model_not_found"),
    ]
    for kind, given, param, code in cases:
        error = expect_error(kind, lambda given=given: chat(server, **({"messages": CAPITAL} | given)))
        expect((error.param, error.code) == (param, code), given, error.param, error.code)
        expect(error.type == "invalid_request_error" and error.body["message"], error.body)
        expect(
            error.request_id and error.response.headers["x-should-retry"] == "false", error.response.headers
        )
    error = expect_error(openai.NotFoundError, lambda: connect(server).models.retrieve("missing"))
    expect(error.code == "model_not_found", error)
    error = expect_error(openai.NotFoundError, lambda: connect(server).post("/nothing", cast_to=object))
    expect(error.body["message"], error.body)


@check("headers: id of the request, digest of the model")
def headers(server):
    raw = connect(server).with_raw_response.models.list()
    expect(raw.headers["x-request-id"], raw.headers)
    client = connect(server)
    raw = client.chat.completions.with_raw_response.create(
        model=server.model, messages=CAPITAL, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    expect(raw.headers["x-request-id"] == "mine-1", raw.headers)
    expect(len(raw.headers["x-trustformers-digest"]) == 64, raw.headers)
    expect(raw.headers["content-type"] == "application/json", raw.headers)


run("openai-python")
