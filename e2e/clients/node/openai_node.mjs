// The `openai` package for Node: chat, tools, structured output, responses, embeddings, models, errors.

import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { check, expect, expectError, run, server } from "./check.mjs";

const client = new OpenAI({ baseURL: `${server.baseUrl}/v1`, apiKey: "none", maxRetries: 0, timeout: 120_000 });
const CAPITAL = [{ role: "user", content: "What is the capital of France? Answer in one word." }];
const COUNT = [{ role: "user", content: "Count from 1 to 5, separated by commas." }];
const ASK_WEATHER = [{ role: "user", content: "What is the weather in Paris?" }];
const given = { model: server.model, temperature: 0, max_tokens: 64 };
const City = z.object({ name: z.string(), country: z.string(), river: z.nullable(z.string()) });
const Weather = z.object({ city: z.string() });

check("models", async () => {
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  expect(names.includes(server.model), names);
  expect((await client.models.retrieve(server.model)).object === "model");
});

check("chat", async () => {
  const answer = await client.chat.completions.create({ ...given, messages: CAPITAL });
  const [choice] = answer.choices;
  expect(choice.message.content.includes("Paris") && choice.finish_reason === "stop", answer);
  expect(answer.usage.total_tokens === answer.usage.prompt_tokens + answer.usage.completion_tokens, answer.usage);
});

check("chat: stream with usage, and the package's own stream", async () => {
  const whole = (await client.chat.completions.create({ ...given, messages: COUNT })).choices[0].message.content;
  let text = "";
  let usage;
  const options = { ...given, messages: COUNT, stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create(options)) {
    text += chunk.choices[0]?.delta.content ?? "";
    usage = chunk.usage ?? usage;
  }
  expect(text === whole && usage.completion_tokens > 0, text, usage);
  const stream = client.chat.completions.stream({ ...given, messages: COUNT, stream_options: { include_usage: true } });
  const final = await stream.finalChatCompletion();
  expect(final.choices[0].message.content === whole && final.choices[0].finish_reason === "stop", final);
});

check("chat: n as a stream", async () => {
  const options = { ...given, messages: CAPITAL, n: 2, temperature: 1, seed: 5, max_tokens: 8 };
  const final = await client.chat.completions.stream(options).finalChatCompletion();
  expect(final.choices.length === 2 && final.choices.every((choice) => choice.message.role === "assistant"), final);
});

check("tools: required, whole and as a stream", async () => {
  const tools = [zodFunction({ name: "get_weather", description: "The present weather of a city", parameters: Weather })];
  const options = { ...given, messages: ASK_WEATHER, tools, tool_choice: "required", parallel_tool_calls: false };
  const answer = await client.chat.completions.parse(options);
  const [call] = answer.choices[0].message.tool_calls;
  expect(answer.choices[0].finish_reason === "tool_calls" && call.function.parsed_arguments.city, answer);
  const final = await client.chat.completions.stream(options).finalChatCompletion();
  expect(final.choices[0].message.tool_calls[0].function.parsed_arguments.city === call.function.parsed_arguments.city, final);
});

check("tools: the package runs them", async () => {
  const asked = [];
  const get_weather = (options) => {
    asked.push(options.city);
    return "21 degrees";
  };
  const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
  const tool = { function: get_weather, name: "get_weather", parse: JSON.parse, description: "The present weather of a city", parameters };
  const options = { ...given, messages: ASK_WEATHER, tools: [{ type: "function", function: tool }], tool_choice: "required" };
  for (const stream of [false, true]) {
    const runner = client.chat.completions.runTools({ ...options, stream }, { maxChatCompletions: 1 });
    const result = await runner.finalFunctionToolCallResult();
    expect(asked.length > 0 && asked[0] && result === "21 degrees", asked, result);
    asked.length = 0;
  }
});

check("structured output: zod", async () => {
  const messages = [{ role: "user", content: "Describe Rome as JSON." }];
  const options = { ...given, max_tokens: 128, messages, response_format: zodResponseFormat(City, "city") };
  const answer = await client.chat.completions.parse(options);
  expect(City.safeParse(answer.choices[0].message.parsed).success, answer);
});

check("responses: whole, stream, parse", async () => {
  const options = { model: server.model, temperature: 0, max_output_tokens: 64 };
  const answer = await client.responses.create({ ...options, input: CAPITAL[0].content });
  expect(answer.output_text.includes("Paris") && answer.status === "completed", answer);
  const kinds = [];
  let text = "";
  for await (const event of await client.responses.create({ ...options, input: CAPITAL[0].content, stream: true })) {
    kinds.push(event.type);
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  expect(kinds[0] === "response.created" && kinds.at(-1) === "response.completed", kinds);
  expect(text === answer.output_text, text);
  const format = { text: { format: zodTextFormat(City, "city") }, max_output_tokens: 128 };
  const parsed = await client.responses.parse({ ...options, ...format, input: "Describe Rome as JSON." });
  expect(City.safeParse(parsed.output_parsed).success, parsed);
});

check("embeddings: both encodings", async () => {
  const input = ["A cat sits on the mat.", "Interest rates rose again."];
  const packed = await client.embeddings.create({ model: server.embedModel, input });
  const floats = await client.embeddings.create({ model: server.embedModel, input, encoding_format: "float" });
  const [a, b] = [packed.data[1].embedding, floats.data[1].embedding];
  expect(a.length === b.length && a.every((value, at) => Math.abs(value - b[at]) < 1e-6), a.length, b.length);
});

check("errors: status, param, code, id of the request", async () => {
  const ask = (options) => () => client.chat.completions.create({ ...given, messages: CAPITAL, ...options });
  const bad = await expectError(OpenAI.BadRequestError, ask({ temperature: -1 }));
  expect(bad.param === "temperature" && bad.code === "invalid_request" && bad.requestID, bad);
  const missing = await expectError(OpenAI.NotFoundError, ask({ model: "missing" }));
  expect(missing.code === "model_not_found" && missing.type === "invalid_request_error", missing);
  const stream = await expectError(OpenAI.BadRequestError, ask({ stream: true, top_p: 2 }));
  expect(stream.param === "top_p", stream);
});

check("a stream that is left ends its work", async () => {
  const stream = await client.chat.completions.create({ ...given, messages: COUNT, stream: true, max_tokens: 2000 });
  for await (const _ of stream) break;
  const answer = await client.chat.completions.create({ ...given, messages: CAPITAL });
  expect(answer.choices[0].message.content.includes("Paris"), answer);
});

await run("openai-node");
