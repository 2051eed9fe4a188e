#!/usr/bin/env node
// Compiles one changed source after the other in one process: a line of JSON in, a line of JSON out.
// The codes come without metadata, so that equal codes are equal contracts.
"use strict";
const fs = require("fs");
const path = require("path");
const readline = require("readline");
const root = path.resolve(__dirname, "..");
const solc = require(require.resolve("solc", { paths: [root] }));

const roots = [root, path.join(root, "node_modules")];
const known = new Map();

function read(name) {
  if (!known.has(name)) {
    const file = roots.map((base) => path.resolve(base, name)).find((each) => fs.existsSync(each));
    known.set(name, file ? { contents: fs.readFileSync(file, "utf8") } : { error: "File not found: " + name });
  }
  return known.get(name);
}

function compile({ file, content, targets, optimize, viaIR }) {
  const lookUp = (name) => (name === file ? { contents: content } : read(name));
  const name = (target) => path.basename(target, ".sol");
  const sources = {};
  const outputSelection = {};
  for (const target of targets) {
    sources[target] = { content: lookUp(target).contents };
    outputSelection[target] = { [name(target)]: ["evm.bytecode.object"] };
  }
  const settings = {
    remappings: ["@openzeppelin/=node_modules/@openzeppelin/"],
    evmVersion: "cancun",
    optimizer: { enabled: Boolean(optimize), runs: 800 },
    viaIR: Boolean(viaIR),
    metadata: { bytecodeHash: "none", appendCBOR: false },
    outputSelection,
  };
  const input = JSON.stringify({ language: "Solidity", sources, settings });
  const output = JSON.parse(solc.compile(input, { import: lookUp }));
  const error = (output.errors || []).find((each) => each.severity === "error");
  if (error) return { error: error.formattedMessage };
  const codes = targets.map((each) => output.contracts[each][name(each)].evm.bytecode.object);
  return { codes };
}

readline.createInterface({ input: process.stdin }).on("line", (line) => {
  process.stdout.write(JSON.stringify(compile(JSON.parse(line))) + "\n");
});
