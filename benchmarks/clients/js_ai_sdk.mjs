// The AI SDK, with its provider for compatible servers and with OpenAI's.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { experimental_generateImage as generateImage, generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { apiKey, baseURL, check, checkImage, checkRed, color, image, model, run, trial } from "./trials.mjs";

const janus = createOpenAICompatible({ name: "janus", baseURL, apiKey, includeUsage: true });
const openai = createOpenAI({ baseURL, apiKey });
const messages = [{ role: "user", content: [{ type: "image", image }, { type: "text", text: color }] }];
const schema = jsonSchema({ type: "object", properties: { color: { type: "string" } } });
const ask = (fields = {}) => generateText({ model: janus(model), messages, maxRetries: 0, ...fields });

trial("answer about an image, with a tool", async () => {
  const weather = tool({ description: "weather", inputSchema: schema, execute: () => "sunny" });
  const { text, usage } = await ask({ tools: { weather } });
  checkRed(text);
  check(usage.outputTokens > 0, usage);
});

trial("streamText, abort", async () => {
  checkRed(await streamText({ model: janus(model), messages, maxRetries: 0 }).text);
  const abort = new AbortController();
  const { textStream } = streamText({ model: janus(model), messages, abortSignal: abort.signal });
  for await (const _ of textStream) abort.abort();
});

trial("sampling fields", async () => {
  checkRed((await ask({ topP: 0.9, frequencyPenalty: 0.1, presencePenalty: 0.1, seed: 1 })).text);
  checkRed((await ask({ providerOptions: { janus: { top_k: 5, min_p: 0.1 } } })).text);
});

trial("generateImage, n=12, with a size and without", async () => {
  const drawn = await generateImage({ model: janus.imageModel(model), prompt: "a star", n: 12, maxRetries: 0 });
  check(drawn.images.length === 12, drawn.images.length);
  const sized = await generateImage({ model: janus.imageModel(model), prompt: "a star", size: "1024x1024", maxRetries: 0 });
  for (const found of [...drawn.images, sized.image]) checkImage(found.uint8Array);
});

trial("OpenAI's provider: .chat and .image", async () => {
  checkRed((await ask({ model: openai.chat(model) })).text);
  checkImage((await generateImage({ model: openai.image("gpt-image-1"), prompt: "a star" })).image.uint8Array);
});

trial("generateObject", () => generateObject({ model: janus(model), messages, schema, maxRetries: 0 }), {
  lacks: "structured answers",
});
trial("OpenAI's provider, default", () => ask({ model: openai(model) }), { lacks: "/v1/responses" });
trial("completionModel", () => generateText({ model: janus.completionModel(model), prompt: "Hello", maxRetries: 0 }), {
  lacks: "/v1/completions",
});

await run();
