#!/usr/bin/env node
// Speaks the part of solc's command line that py-solc-x and forge use (--version, --standard-json),
// on top of the npm build of solc. Imports are read below the allowed folders only.
"use strict";
const fs = require("fs");
const path = require("path");
const root = path.resolve(__dirname, "..");
const load = () => require(require.resolve("solc", { paths: [root, process.cwd()] }));

if (process.argv.includes("--version")) {
  console.log("solc, the solidity compiler commandline interface");
  // forge and py-solc-x read "x.y.z+commit.hash.platform". Loading takes half a second, and forge asks at
  // each start: who starts it thousands of times may say what was answered before.
  console.log("Version: " + (process.env.KNOWN_SOLC_VERSION || load().version()));
  process.exit(0);
}

const roots = [root, path.join(root, "node_modules"), process.cwd(), path.join(process.cwd(), "node_modules")];

function read(name) {
  for (const base of roots) {
    const file = path.resolve(base, name);
    if (file !== base && file.startsWith(base + path.sep) && fs.existsSync(file)) {
      return { contents: fs.readFileSync(file, "utf8") };
    }
  }
  return { error: "File not found: " + name };
}

const input = fs.readFileSync(0, "utf8");
process.stdout.write(load().compile(input, { import: read }) + "\n");
