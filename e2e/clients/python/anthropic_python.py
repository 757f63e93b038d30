"""The `anthropic` package for Python: messages, streams, tools, structured output, token counts, errors."""

import anthropic
import pydantic
from check import check, expect, expect_error, run

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
COUNT = [{"role": "user", "content": "Count from 1 to 5, separated by commas."}]
# The package has no parameter for it any more; servers have.
GREEDY = {"temperature": 0}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Paris, in celsius?"}]
WEATHER = {
    "name": "get_weather",
    "description": "The present weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "unit": {"enum": ["celsius", "fahrenheit"]}},
        "required": ["city", "unit"],
        "additionalProperties": False,
    },
}


class City(pydantic.BaseModel):
    """A city."""

    name: str
    country: str


def connect(server, **options):
    given = {"base_url": server.base_url, "api_key": "none", "max_retries": 0, "timeout": 120} | options
    return anthropic.Anthropic(**given)


def ask(server, messages, **options):
    given = {"model": server.model, "messages": messages, "max_tokens": 64, "extra_body": GREEDY} | options
    return connect(server).messages.create(**given)


@check("messages")
def messages(server):
    answer = ask(server, CAPITAL)
    expect((answer.type, answer.role, answer.stop_reason) == ("message", "assistant", "end_turn"), answer)
    expect([block.type for block in answer.content] == ["text"] and "Paris" in answer.content[0].text, answer)
    expect(answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0, answer.usage)


@check("messages: system, blocks, stop_sequences, max_tokens, a beginning of the answer")
def messages_fields(server):
    system = [{"type": "text", "text": "Answer in one word.", "cache_control": {"type": "ephemeral"}}]
    blocks = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    answer = ask(server, blocks, system=system, metadata={"user_id": "user-1"})
    expect("Paris" in answer.content[0].text, answer)
    stopped = ask(server, COUNT, stop_sequences=["4"])
    expect((stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "4"), stopped)
    expect("4" not in stopped.content[0].text, stopped)
    cut = ask(server, COUNT, max_tokens=3)
    expect((cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3), cut)
    begun = ask(server, [*COUNT, {"role": "assistant", "content": "1, 2, 3"}])
    expect("4" in begun.content[0].text and "1" not in begun.content[0].text, begun)


@check("messages: stream of events")
def stream(server):
    whole = ask(server, COUNT)
    events = list(ask(server, COUNT, stream=True))
    kinds = [event.type for event in events if event.type != "ping"]
    expect(kinds[:2] == ["message_start", "content_block_start"], kinds)
    expect(kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"], kinds)
    expect(set(kinds[2:-3]) == {"content_block_delta"}, kinds)
    start, delta = events[0].message, events[-2]
    expect((start.content, start.stop_reason) == ([], None) and start.usage.input_tokens > 0, start)
    expect(delta.delta.stop_reason == "end_turn", delta)
    expect(delta.usage.output_tokens == whole.usage.output_tokens, delta.usage, whole.usage)
    text = "".join(event.delta.text for event in events if event.type == "content_block_delta")
    expect(text == whole.content[0].text, text)


@check("messages: the package's own stream")
def stream_helper(server):
    given = {"model": server.model, "messages": COUNT, "max_tokens": 64, "extra_body": GREEDY}
    with connect(server).messages.stream(**given) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    expect(final.content[0].text == text and final.stop_reason == "end_turn", final)


@check("tools: a call, its stream, and the answer with its result")
def tools(server):
    given = {
        "tools": [WEATHER],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
        "max_tokens": 128,
    }
    answer = ask(server, ASK_WEATHER, **given)
    calls = [block for block in answer.content if block.type == "tool_use"]
    expect(answer.stop_reason == "tool_use" and len(calls) == 1, answer)
    expect(calls[0].name == "get_weather" and set(calls[0].input) == {"city", "unit"}, calls)
    settings = {"model": server.model, "messages": ASK_WEATHER, "extra_body": GREEDY} | given
    with connect(server).messages.stream(**settings) as stream:
        final = stream.get_final_message()
    streamed = [block for block in final.content if block.type == "tool_use"]
    expect(streamed[0].input == calls[0].input and final.stop_reason == "tool_use", final)
    result = {
        "type": "tool_result",
        "tool_use_id": calls[0].id,
        "content": [{"type": "text", "text": '{"degrees": 21, "sky": "clear"}'}],
    }
    words = {"type": "text", "text": "Write one sentence about the weather in Paris, no JSON."}
    turn = [
        *ASK_WEATHER,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [result, words]},
    ]
    expect("21" in ask(server, turn, tools=[WEATHER]).content[0].text, turn)


@check("tools: auto, named, none, refusals")
def tool_choice(server):
    named = {"type": "tool", "name": "get_weather"}
    answer = ask(server, CAPITAL, tools=[WEATHER], tool_choice=named, max_tokens=128)
    expect([block.type for block in answer.content] == ["tool_use"], answer)
    answer = ask(server, ASK_WEATHER, tools=[WEATHER], tool_choice={"type": "none"})
    expect(all(block.type == "text" for block in answer.content), answer)
    answer = ask(server, ASK_WEATHER, tools=[WEATHER], tool_choice={"type": "auto"})
    expect(answer.stop_reason == "tool_use", answer)
    for choice in ({"type": "tool", "name": "missing"}, {"type": "sometimes"}):
        expect_error(
            anthropic.BadRequestError,
            lambda choice=choice: ask(server, CAPITAL, tools=[WEATHER], tool_choice=choice),
        )


@check("structured output")
def structured(server):
    given = {"model": server.model, "max_tokens": 128, "extra_body": GREEDY}
    question = [{"role": "user", "content": "Describe Tokyo as JSON."}]
    parsed = connect(server).messages.parse(messages=question, output_format=City, **given).parsed_output
    expect(isinstance(parsed, City) and parsed.name, parsed)


@check("count_tokens")
def count_tokens(server):
    client = connect(server)
    counted = client.messages.count_tokens(model=server.model, messages=CAPITAL)
    expect(counted.input_tokens == ask(server, CAPITAL, max_tokens=1).usage.input_tokens, counted)
    more = client.messages.count_tokens(
        model=server.model, messages=CAPITAL, system="Be brief.", tools=[WEATHER]
    )
    expect(more.input_tokens > counted.input_tokens, more)


@check("errors: status, type, id of the request, no retry")
def errors(server):
    cases = [
        (anthropic.BadRequestError, {"extra_body": {"temperature": -1}}, "invalid_request_error"),
        (anthropic.BadRequestError, {"messages": []}, "invalid_request_error"),
        (anthropic.BadRequestError, {"extra_body": {"temprature": 1}}, "invalid_request_error"),
        (anthropic.NotFoundError, {"model": "missing"}, "not_found_error"),
    ]
    for kind, given, type_ in cases:
        error = expect_error(kind, lambda given=given: ask(server, **({"messages": CAPITAL} | given)))
        expect((error.body["type"], error.body["error"]["type"]) == ("error", type_), error.body)
        expect(error.body["error"]["message"] and error.request_id, error.body, error.request_id)
        expect(error.body["request_id"] == error.request_id, error.body)
        expect(error.response.headers["x-should-retry"] == "false", error.response.headers)


@check("Bearer tokens and ?beta=true are taken")
def beta(server):
    client = connect(server, api_key=None, auth_token="token")
    answer = client.beta.messages.create(
        model=server.model, messages=CAPITAL, max_tokens=16, extra_body=GREEDY
    )
    expect("Paris" in answer.content[0].text, answer)


run("anthropic-python")
