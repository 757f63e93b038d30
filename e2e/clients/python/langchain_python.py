"""LangChain's package for servers that speak OpenAI's API (`langchain-openai`)."""

import asyncio
import json

import pydantic
from check import check, expect, run
from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings


class City(pydantic.BaseModel):
    """A city."""

    name: str
    country: str


@tool
def get_weather(city: str) -> str:
    """The present weather of a city."""
    return json.dumps({"city": city, "degrees": 21, "sky": "clear"})


def model(server, **options):
    given = {"temperature": 0, "max_retries": 0, "timeout": 120, "max_completion_tokens": 128} | options
    return ChatOpenAI(base_url=f"{server.base_url}/v1", api_key="none", model=server.model, **given)


@check("chat, stream, batch")
def chat(server):
    question = [SystemMessage("Answer in one word."), HumanMessage("What is the capital of France?")]
    whole = model(server).invoke(question)
    expect("Paris" in whole.content and whole.usage_metadata["total_tokens"] > 0, whole)
    pieces = list(model(server).stream(question))
    expect("".join(piece.content for piece in pieces) == whole.content, pieces)
    both = model(server).batch([question, question])
    expect([answer.content for answer in both] == [whole.content] * 2, both)


@check("stream with usage, asynchronous")
def stream_usage(server):
    async def collect():
        return [piece async for piece in model(server, stream_usage=True).astream("Count from 1 to 5.")]

    pieces = asyncio.run(collect())
    used = [piece.usage_metadata for piece in pieces if piece.usage_metadata]
    expect(len(used) == 1 and used[0]["output_tokens"] > 0, used)


@check("tools: a call, its stream, and the answer with its result")
def tools(server):
    bound = model(server).bind_tools([get_weather], tool_choice="any")
    question = HumanMessage("What is the weather in Paris?")
    answer = bound.invoke([question])
    call = answer.tool_calls[0]
    expect(call["name"] == "get_weather" and call["args"]["city"], answer)
    gathered = None
    for piece in bound.stream([question]):
        gathered = piece if gathered is None else gathered + piece
    expect(gathered.tool_calls[0]["args"] == call["args"], gathered)
    result = ToolMessage(get_weather.invoke(call["args"]), tool_call_id=call["id"])
    tell = HumanMessage("Write one sentence about the weather in Paris, no JSON.")
    final = model(server).bind_tools([get_weather]).invoke([question, answer, result, tell])
    expect("21" in final.content, final)


@check("structured output: by schema, by a call, as JSON")
def structured(server):
    for method in ("json_schema", "function_calling"):
        city = model(server).with_structured_output(City, method=method).invoke("Describe Tokyo.")
        expect(isinstance(city, City) and city.name, method, city)
    words = "Describe Tokyo as JSON with the keys name and country only."
    city = model(server).with_structured_output(City, method="json_mode").invoke(words)
    expect(isinstance(city, City), city)


@check("responses")
def responses(server):
    answer = model(server, use_responses_api=True).invoke(
        "What is the capital of France? Answer in one word."
    )
    expect("Paris" in answer.text, answer)


@check("embeddings")
def embeddings(server):
    # The default sends ids of another model's vocabulary, which can only be refused or be wrong.
    client = OpenAIEmbeddings(
        base_url=f"{server.base_url}/v1",
        api_key="none",
        model=server.embed_model,
        check_embedding_ctx_length=False,
    )
    rows = client.embed_documents(["A cat sits on the mat.", "Interest rates rose again."])
    query = client.embed_query("A cat sits on the mat.")
    expect(len(rows) == 2 and len(rows[0]) == len(query), len(query))
    expect(max(abs(a - b) for a, b in zip(rows[0], query, strict=True)) < 1e-4, query[:4])


run("langchain")
