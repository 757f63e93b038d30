// The AI SDK with its provider for servers that speak OpenAI's API (`@ai-sdk/openai-compatible`).

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, embed, embedMany, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import { check, expect, expectError, run, server } from "./check.mjs";

globalThis.AI_SDK_LOG_WARNINGS = false;
const provider = createOpenAICompatible({
  name: "trustformers",
  baseURL: `${server.baseUrl}/v1`,
  includeUsage: true,
  supportsStructuredOutputs: true,
});
const given = { model: provider(server.model), temperature: 0, maxOutputTokens: 128, maxRetries: 0 };
const CAPITAL = "What is the capital of France? Answer in one word.";
const asked = [];
const tools = {
  get_weather: tool({
    description: "The present weather of a city",
    inputSchema: z.object({ city: z.string() }),
    execute: async ({ city }) => {
      asked.push(city);
      return { degrees: 21 };
    },
  }),
};

check("generateText", async () => {
  const { text, finishReason, usage } = await generateText({ ...given, prompt: CAPITAL });
  expect(text.includes("Paris") && finishReason === "stop" && usage.totalTokens > 0, text, finishReason, usage);
});

check("streamText", async () => {
  const whole = await generateText({ ...given, prompt: "Count from 1 to 5." });
  const result = streamText({ ...given, prompt: "Count from 1 to 5." });
  let text = "";
  for await (const piece of result.textStream) text += piece;
  const [finishReason, usage] = [await result.finishReason, await result.usage];
  expect(text === whole.text && finishReason === "stop", text, finishReason);
  expect(usage.totalTokens === whole.usage.totalTokens, usage);
});

check("tools: required", async () => {
  const { toolCalls, finishReason } = await generateText({ ...given, prompt: "What is the weather in Paris?", tools, toolChoice: "required" });
  expect(toolCalls.length === 1 && toolCalls[0].input.city && finishReason === "tool-calls", toolCalls, finishReason);
});

check("tools: run until the answer, as a stream", async () => {
  asked.length = 0;
  // Small models go on with JSON after a call, unless they are told not to.
  const tell = { role: "user", content: "Write one sentence about the weather in Paris, no JSON." };
  const prepareStep = ({ stepNumber, messages }) =>
    stepNumber === 0 ? { toolChoice: "required" } : { toolChoice: "auto", messages: [...messages, tell] };
  const messages = [{ role: "user", content: "What is the weather in Paris?" }];
  const result = streamText({ ...given, messages, tools, prepareStep, stopWhen: isStepCount(3) });
  const text = await result.text;
  expect(asked.length === 1 && text.includes("21"), asked, text);
});

check("structured output", async () => {
  const schema = z.object({ name: z.string(), country: z.string() });
  const { output } = await generateText({ ...given, prompt: "Describe Rome as JSON.", output: Output.object({ schema }) });
  expect(output.name && output.country, output);
});

check("embed and embedMany", async () => {
  const model = provider.embeddingModel(server.embedModel);
  const { embeddings } = await embedMany({ model, values: ["A cat sits on the mat.", "Interest rates rose again."], maxRetries: 0 });
  const { embedding, usage } = await embed({ model, value: "A cat sits on the mat.", maxRetries: 0 });
  expect(embeddings.length === 2 && embedding.length === embeddings[0].length && usage.tokens > 0, usage);
});

check("errors: status and message", async () => {
  const error = await expectError(APICallError, () => generateText({ ...given, model: provider("missing"), prompt: "a" }));
  expect(error.statusCode === 404 && error.message.includes("missing") && !error.isRetryable, error.message);
});

await run("ai-sdk");
