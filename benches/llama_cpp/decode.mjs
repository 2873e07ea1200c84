// decode.mjs MODEL.gguf TOKENS.json NEW THREADS: seconds to the first token and tokens a second after it, by llama.cpp
// on the CPU, from the package node-llama-cpp beside this file or in $NODE_MODULES.
import {readFileSync} from "node:fs";
import {pathToFileURL} from "node:url";

const [file, tokens, count, threads] = process.argv.slice(2);
const entry = process.env.NODE_MODULES
  ? pathToFileURL(`${process.env.NODE_MODULES}/node-llama-cpp/dist/index.js`).href : "node-llama-cpp";
const {getLlama} = await import(entry);
const prompt = JSON.parse(readFileSync(tokens, "utf8"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({contextSize: prompt.length + +count + 8, threads: +threads});
const begin = performance.now();
let first = 0, made = 0;
for await (const _ of context.getSequence().evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
  if (made++ === 0) first = performance.now();
  if (made === +count) break;
}
const last = performance.now();
console.log(JSON.stringify({first: (first - begin) / 1e3, rate: (made - 1) / (last - first) * 1e3, made}));
process.exit(0);
