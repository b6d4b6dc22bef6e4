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
  for await (const _ of textStream) {
    abort.abort();
    break;  // an aborted stream whose rest has already arrived may never end
  }
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

trial("generateObject", () => generateObject({ model: janus(model), messages, schema, maxRetries: 0 }));
// With store: false the SDK sends earlier items themselves. Its default sends references to them, which are refused.
const providerOptions = { openai: { store: false } };

trial("OpenAI's provider, default: answer about an image, stream, second turn", async () => {
  const { text, response } = await ask({ model: openai(model) });
  checkRed(text);
  checkRed(await streamText({ model: openai(model), messages, maxRetries: 0 }).text);
  const question = { role: "user", content: "How many shapes are there?" };
  const conversation = [...messages, ...response.messages, question];
  check((await ask({ model: openai(model), messages: conversation, providerOptions })).text.length > 0);
});

trial("OpenAI's provider, default: imageGeneration", async () => {
  const { staticToolResults } = await ask({
    model: openai(model),
    messages: [{ role: "user", content: "a red circle" }],
    tools: { image_generation: openai.tools.imageGeneration({}) },
    toolChoice: { type: "tool", toolName: "image_generation" },
  });
  checkImage(Buffer.from(staticToolResults[0].output.result, "base64"));
});

trial("completionModel", async () => {
  const fields = { prompt: "The picture shows", maxRetries: 0 };
  const { text, usage } = await generateText({ model: janus.completionModel(model), ...fields });
  // The SDK makes a conversation of the prompt, which Janus-Tiny ends at once.
  check(typeof text === "string" && usage.inputTokens > 0, usage);
});

await run();
