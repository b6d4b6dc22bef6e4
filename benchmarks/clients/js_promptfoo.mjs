// promptfoo, run as a program on one prompt for each trial.
import { spawnSync } from "node:child_process";
import { readFileSync, writeFileSync } from "node:fs";
import { apiKey, baseURL, check, color, imageURL, model, root, run, trial } from "./trials.mjs";

const program = new URL("node_modules/promptfoo/dist/src/entrypoint.js", import.meta.url).pathname;
const picture = JSON.stringify([
  { role: "user", content: [{ type: "image_url", image_url: { url: imageURL } }, { type: "text", text: color }] },
]);

// Return promptfoo's output for one prompt.
function evaluate(provider, prompt, config = {}) {
  const settings = { apiBaseUrl: baseURL, apiKey, ...config };
  const tests = [{ assert: [{ type: "javascript", value: "output.length > 0" }] }];
  const providers = [{ id: provider, config: settings }];
  writeFileSync("promptfoo.json", JSON.stringify({ prompts: [prompt], providers, tests }));
  const words = [program, "eval", "-c", "promptfoo.json", "-o", "out.json", "--no-cache", "--no-table", "--no-progress-bar"];
  const env = {
    ...process.env,
    PROMPTFOO_DISABLE_TELEMETRY: "1",
    PROMPTFOO_DISABLE_UPDATE: "1",
    PROMPTFOO_DISABLE_SHARING: "1",
  };
  const done = spawnSync(process.execPath, words, { env, encoding: "utf8" });
  if (done.error) throw done.error;
  const [result] = JSON.parse(readFileSync("out.json", "utf8")).results.results;
  if (result.error || !result.response?.output) throw new Error(result.error ?? done.stderr);
  return String(result.response.output);
}

trial("openai:chat", () => check(evaluate(`openai:chat:${model}`, picture).includes("red"), "no red"));
trial("openai:chat, sampling fields", () => {
  const config = { temperature: 0.2, top_p: 0.9, frequency_penalty: 0.1, presence_penalty: 0.1 };
  check(evaluate(`openai:chat:${model}`, picture, config).includes("red"), "no red");
});
trial("openai:image", () => {
  const output = evaluate("openai:image:dall-e-3", "a star");
  check(output.includes(`${root}/images/`), output.slice(0, 200));
});
trial("openai:responses", () => evaluate(`openai:responses:${model}`, "Hello"), { lacks: "/v1/responses" });
trial("openai:completion", () => evaluate(`openai:completion:${model}`, "Hello"), { lacks: "/v1/completions" });

await run();
