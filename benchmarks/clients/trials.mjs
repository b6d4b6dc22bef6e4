// Trials of one client in JavaScript, as trials.py has them for Python.
import { appendFileSync, readFileSync } from "node:fs";

export const root = process.env.JANUS_URL;
export const baseURL = `${root}/v1`;
export const model = "janus-tiny";
export const apiKey = "none";
export const image = readFileSync(process.env.JANUS_IMAGE);
export const imageURL = `data:image/png;base64,${image.toString("base64")}`;
export const color = "What color is the circle?";
const trials = [];

// Add a trial. `lacks`: a feature that the server does not support yet; `theirs`: why the client itself fails.
export function trial(name, run, { lacks = "", theirs = "" } = {}) {
  trials.push({ name, run, lacks, theirs });
}

export function check(condition, value) {
  if (!condition) throw new Error(`unexpected: ${JSON.stringify(value)?.slice(0, 300)}`);
}

export function checkRed(text) {
  check(typeof text === "string" && text.toLowerCase().includes("red"), text);
}

export function checkImage(bytes) {
  check(Buffer.from(bytes).subarray(1, 4).toString() === "PNG", String(bytes).slice(0, 40));
}

function statuses(start) {
  const lines = readFileSync(process.env.JANUS_LOG).subarray(start).toString().split("\n");
  return lines.map((line) => /^(?:GET|POST) \S+ (\d+),/.exec(line)).filter(Boolean).map((found) => Number(found[1]));
}

export async function run() {
  for (const { name, run, lacks, theirs } of trials) {
    const logged = readFileSync(process.env.JANUS_LOG).length;
    let error = null;
    try {
      await run();
    } catch (caught) {
      console.error(caught);
      error = String(caught).replace(/\s+/g, " ").slice(0, 600);
    }
    await new Promise((resolve) => setTimeout(resolve, 50)); // the server logs a request after its reply
    const outcome = { name, lacks, theirs, error, statuses: statuses(logged) };
    appendFileSync(process.env.JANUS_RESULTS, JSON.stringify(outcome) + "\n");
  }
  process.exit(0);
}
