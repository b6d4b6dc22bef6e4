// LangChain for JavaScript.
import { HumanMessage } from "@langchain/core/messages";
import { ChatOpenAI, DallEAPIWrapper, OpenAI } from "@langchain/openai";
import { apiKey, baseURL, check, checkImage, checkRed, color, imageURL, model, run, trial } from "./trials.mjs";

const common = { model, apiKey, maxRetries: 0, configuration: { baseURL } };
const chat = (fields = {}) => new ChatOpenAI({ ...common, ...fields });
const question = new HumanMessage({
  content: [{ type: "image_url", image_url: { url: imageURL } }, { type: "text", text: color }],
});
const schema = { title: "shape", type: "object", properties: { color: { type: "string" } } };

trial("answer about an image, stream", async () => {
  const answer = await chat().invoke([question]);
  checkRed(answer.content);
  check(answer.usage_metadata.output_tokens > 0, answer.usage_metadata);
  let text = "";
  for await (const chunk of await chat().stream([question])) text += chunk.content;
  checkRed(text);
});

trial("sampling fields", async () => {
  checkRed((await chat({ topP: 0.9, frequencyPenalty: 0.1, presencePenalty: 0.1 }).invoke([question])).content);
});

trial("DallEAPIWrapper with its defaults", async () => {
  const wrapper = new DallEAPIWrapper({ apiKey, baseURL, configuration: { baseURL } });
  checkImage(await (await fetch(await wrapper.invoke("a star"))).arrayBuffer());
});

trial("withStructuredOutput", () => chat().withStructuredOutput(schema).invoke([question]));
trial("useResponsesApi", async () => checkRed((await chat({ useResponsesApi: true }).invoke([question])).text));
trial("OpenAI", async () => check((await new OpenAI(common).invoke("The picture shows")).length > 0));

await run();
