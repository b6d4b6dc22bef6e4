// OpenAI's package for JavaScript.
import OpenAI from "openai";
import { apiKey, baseURL, check, checkImage, checkRed, color, imageURL, model, run, trial } from "./trials.mjs";

const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const question = {
  role: "user",
  content: [{ type: "image_url", image_url: { url: imageURL } }, { type: "text", text: color }],
};
const ask = (fields = {}) => client.chat.completions.create({ model, messages: [question], ...fields });
const draw = (fields = {}) => client.images.generate({ model, prompt: "a star", ...fields });
const bytes = (image) => Buffer.from(image.b64_json, "base64");

trial("models", async () => {
  const models = [];
  for await (const found of client.models.list()) models.push(found.id);
  check(models.length === 1 && models[0] === model, models);
});

trial("answer about an image, stream with usage", async () => {
  checkRed((await ask()).choices[0].message.content);
  let text = "", usage = null;
  for await (const chunk of await ask({ stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  checkRed(text);
  check(usage.completion_tokens > 0, usage);
});

trial("stream helper, runTools, abort", async () => {
  checkRed(await client.chat.completions.stream({ model, messages: [question] }).finalContent());
  const weather = { name: "weather", parameters: {}, function: () => "sunny" };
  const tools = [{ type: "function", function: weather }];
  checkRed(await client.chat.completions.runTools({ model, messages: [question], tools }).finalContent());
  const stream = await ask({ stream: true, n: 8, temperature: 100 });
  for await (const _ of stream) stream.controller.abort();
});

trial("context_length_exceeded", async () => {
  const error = await ask({ messages: [{ role: "user", content: "red circle ".repeat(2000) }] }).catch((error) => error);
  check(error instanceof OpenAI.BadRequestError && error.code === "context_length_exceeded", error);
});

trial("sampling fields", async () => {
  const answer = await ask({ top_p: 0, frequency_penalty: 0.1, logprobs: true, top_logprobs: 2 });
  check(answer.choices[0].logprobs.content.length > 0, answer);
});

trial("images, DALL-E's requests, stream", async () => {
  for (const image of (await draw({ n: 2 })).data) checkImage(bytes(image));
  const drawn = await draw({ model: "dall-e-3", size: "1024x1024" });
  checkImage(await (await fetch(drawn.data[0].url)).arrayBuffer());
  const kinds = [];
  for await (const event of await draw({ stream: true, partial_images: 2 })) {
    kinds.push(event.type);
    checkImage(bytes(event));
  }
  check(kinds.length === 3, kinds);
});

trial("parse", () => ask({ response_format: { type: "json_object" } }));
trial("responses, stream", async () => {
  check((await client.responses.create({ model, input: "Hello" })).output_text.length > 0);
  const kinds = [];
  for await (const event of await client.responses.create({ model, input: "Hello", stream: true })) kinds.push(event.type);
  check(kinds[0] === "response.created" && kinds.at(-1) === "response.completed", kinds);
});
trial("completions", async () => check((await client.completions.create({ model, prompt: "The picture shows" })).choices[0].text));

await run();
