// Client of the gateway: signs in with the wallet (EIP-4361), uploads definitions, and reads the
// output of jobs. The sign-in message is built here, never taken from the gateway.

const SESSION_KEY = "gateway-session";
const STATEMENT = "Sign in to the gateway. This moves no credits and costs no gas.";
const ENCRYPTED_MARKER = "deepsquare-encrypted-log/1"; // first characters of an encrypted log
const MAX_SHOWN = 2_000_000; // characters of output that a page shows; the whole of it can be saved

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Returns the session of this tab, or null if there is none or it has expired.
export function storedSession(gateway) {
  try {
    const session = JSON.parse(sessionStorage.getItem(SESSION_KEY) ?? "null");
    return session?.gateway === gateway && session.expires * 1000 > Date.now() + 5_000 ? session : null;
  } catch {
    return null;
  }
}

async function post(url, body) {
  const response = await fetch(url, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  const content = await response.json();
  if (!response.ok) throw new Error([content.detail, content.hint].filter(Boolean).join(". "));
  return content;
}

// Signs in to the gateway; `sign` returns the wallet's signature of a text.
export async function signIn(grid, sign) {
  const stored = storedSession(grid.gateway);
  if (stored && stored.account === grid.account) return stored;
  const challenge = await post(`${grid.gateway}/v1/sign-in/nonce`, {});
  const plain = (text) => String(text).replace(/[^A-Za-z0-9:.+-]/g, "");
  const message = [
    `${location.host} wants you to sign in with your Ethereum account:`,
    grid.account,
    "",
    STATEMENT,
    "",
    `URI: ${grid.gateway}/v1/sign-in`,
    "Version: 1",
    `Chain ID: ${grid.chain_id}`,
    `Nonce: ${plain(challenge.nonce)}`,
    `Issued At: ${plain(challenge.issued_at)}`,
    `Expiration Time: ${plain(challenge.expiration_time)}`,
    "Resources:",
    `- eip155:${grid.chain_id}:${grid.contract}`,
    `- ${grid.gateway}/v1/jobs`,
  ].join("\n");
  const { token, expires } = await post(`${grid.gateway}/v1/sign-in`, { message, signature: await sign(message) });
  const session = { gateway: grid.gateway, account: grid.account, token, expires };
  sessionStorage.setItem(SESSION_KEY, JSON.stringify(session));
  return session;
}

function request(session, path, options = {}) {
  const headers = { ...(options.headers ?? {}), Authorization: `Bearer ${session.token}` };
  return fetch(`${session.gateway}/v1/${path}`, { ...options, headers, cache: "no-store" });
}

async function refusalOf(response) {
  const problem = await response.json().catch(() => ({}));
  return new Error(`The gateway refused: ${problem.detail ?? `status ${response.status}`}`);
}

// Uploads a definition to the gateway, before any payment.
export async function upload(session, digest, text) {
  const response = await request(session, `definitions/${digest}`, { method: "PUT", body: new TextEncoder().encode(text) });
  if (!response.ok) throw await refusalOf(response);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let partial = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const complete = (partial + value).split(/\r?\n/);
    partial = complete.pop();
    yield* complete;
  }
}

// Streams a job's log from a byte offset in chunks; null marks the end.
async function* logChunks(session, job, offset) {
  const response = await request(session, `jobs/${job}/log/events?offset=${offset}`);
  if (!response.ok) throw await refusalOf(response);
  let kind = "";
  for await (const line of lines(response.body)) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    if (line.startsWith("data: ") && kind === "log") {
      yield Uint8Array.from(atob(line.slice(6)), (char) => char.charCodeAt(0));
    }
    if (line === "" && kind === "end") {
      yield null;
      return;
    }
    if (line === "") kind = "";
  }
}

// Shows a job's output in a section of the page until its end; reconnects after lost connections.
export async function showOutput(section, session) {
  const job = section.dataset.job;
  const log = section.querySelector("pre");
  const decoder = new TextDecoder();
  log.hidden = false;
  let offset = 0;
  let start = []; // First bytes of the log, kept until they show whether it is encrypted; then null.
  for (let failures = 0, ended = false; !ended; ) {
    try {
      for await (const chunk of logChunks(session, job, offset)) {
        failures = 0;
        ended = chunk === null;
        let data = chunk ?? new Uint8Array();
        offset += data.length;
        if (start) data = Uint8Array.from((start = [...start, ...data]));
        const text = start ? new TextDecoder().decode(data) : "";
        if (start && text.startsWith(ENCRYPTED_MARKER)) {
          log.textContent = `It is encrypted to its customer's key. In a terminal, \`deepsquare job logs ${job}\` and \`deepsquare job results ${job}\` decrypt it.`;
          return;
        }
        if (start && !ended && ENCRYPTED_MARKER.startsWith(text)) continue;
        start = null;
        const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        log.textContent = (log.textContent + decoder.decode(data, { stream: true })).slice(-MAX_SHOWN);
        if (atEnd) log.scrollTop = log.scrollHeight;
        if (ended) break;
      }
    } catch (error) {
      failures += 1;
      if (failures > 5 || !storedSession(session.gateway)) throw error;
    }
    if (!ended) await pause(Math.min(10_000, 500 * 2 ** failures));
    if (!storedSession(session.gateway)) throw new Error("The sign-in has expired. Sign in again to go on.");
  }
  if (!offset) log.textContent = "It printed nothing.";
  await showResults(section, session);
}

async function showResults(section, session) {
  const job = section.dataset.job;
  const note = section.querySelector("[data-note]");
  let response = null;
  for (let attempt = 0; attempt < 30 && !response?.ok; attempt += 1) {
    if (attempt) await pause(1_000);
    response = await request(session, `jobs/${job}/results`);
    if (!response.ok && response.status !== 404) throw await refusalOf(response);
  }
  if (!response.ok) return;
  const list = section.querySelector("ul");
  const { files } = await response.json();
  for (const file of files) list.append(await resultItem(section, session, file));
  note.textContent = `${files.length} ${files.length === 1 ? "file" : "files"} of results`;
}

async function resultItem(section, session, file) {
  const item = document.createElement("li");
  const name = document.createElement(file.problem ? "span" : "button");
  name.textContent = file.name;
  if (!file.problem) {
    name.type = "button";
    name.addEventListener("click", () => saveFile(section, session, file));
  }
  item.append(name, ` ${file.problem || `${file.size} bytes`}`);
  if (file.name === "output" && !file.problem) item.append(` ${await compareWithChain(section, session, file)}`);
  return item;
}

async function fetchFile(section, session, file) {
  const path = file.name.split("/").map(encodeURIComponent).join("/");
  const response = await request(session, `jobs/${section.dataset.job}/files/${path}`);
  if (!response.ok) throw await refusalOf(response);
  return response.blob();
}

// Compares the output with the SHA-256 that the provider reported on chain.
async function compareWithChain(section, session, file) {
  for (let attempt = 0; attempt < 40 && !section.dataset.result; attempt += 1) await pause(500);
  if (!section.dataset.result || !crypto.subtle) return "not compared with the chain";
  const data = await (await fetchFile(section, session, file)).arrayBuffer();
  const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const digest = [...sum].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return section.dataset.result.replace(/^0x/, "") === digest ? "as its provider reported on chain" : "NOT what its provider reported on chain";
}

async function saveFile(section, session, file) {
  const url = URL.createObjectURL(await fetchFile(section, session, file));
  const link = document.createElement("a");
  link.href = url;
  link.download = file.name.split("/").pop();
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
