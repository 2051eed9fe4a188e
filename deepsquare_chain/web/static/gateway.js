// Client of the gateway: signs in with the wallet (EIP-4361), uploads definitions, and reads the
// output of jobs. The sign-in message is built here, never taken from the gateway.

const KEPT = "gateway-session";
const STATEMENT = "Sign in to the gateway. This moves no credits and costs no gas.";
const ENCRYPTED = "deepsquare-encrypted-log/1"; // what an encrypted log begins with
const MOST = 2_000_000; // characters of output that a page shows; the whole of it can be saved

const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Returns the session of this tab, or null if there is none or it has expired.
export function remembered(gateway) {
  try {
    const found = JSON.parse(sessionStorage.getItem(KEPT) ?? "null");
    return found?.gateway === gateway && found.expires * 1000 > Date.now() + 5_000 ? found : null;
  } catch {
    return null;
  }
}

async function post(url, body) {
  const answer = await fetch(url, { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } });
  const found = await answer.json();
  if (!answer.ok) throw new Error([found.detail, found.hint].filter(Boolean).join(". "));
  return found;
}

// Signs in to the gateway; `sign` returns the wallet's signature of a text.
export async function signIn(grid, sign) {
  const known = remembered(grid.gateway);
  if (known && known.account === grid.account) return known;
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
  sessionStorage.setItem(KEPT, JSON.stringify(session));
  return session;
}

function ask(session, path, options = {}) {
  const headers = { ...(options.headers ?? {}), Authorization: `Bearer ${session.token}` };
  return fetch(`${session.gateway}/v1/${path}`, { ...options, headers, cache: "no-store" });
}

async function refusal(answer) {
  const found = await answer.json().catch(() => ({}));
  return new Error(`The gateway refused: ${found.detail ?? `status ${answer.status}`}`);
}

// Uploads a definition to the gateway, before any payment.
export async function upload(session, digest, text) {
  const answer = await ask(session, `definitions/${digest}`, { method: "PUT", body: new TextEncoder().encode(text) });
  if (!answer.ok) throw await refusal(answer);
}

async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split(/\r?\n/);
    rest = whole.pop();
    yield* whole;
  }
}

// Streams a job's log from a byte offset in chunks; null marks the end.
async function* pieces(session, job, offset) {
  const answer = await ask(session, `jobs/${job}/log/events?offset=${offset}`);
  if (!answer.ok) throw await refusal(answer);
  let kind = "";
  for await (const line of lines(answer.body)) {
    if (line.startsWith("event: ")) kind = line.slice(7);
    if (line.startsWith("data: ") && kind === "log") {
      yield Uint8Array.from(atob(line.slice(6)), (each) => each.charCodeAt(0));
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
  for (let failures = 0, ended = false; !ended; ) {
    try {
      for await (const data of pieces(session, job, offset)) {
        failures = 0;
        ended = data === null;
        if (ended) break;
        if (!offset && new TextDecoder().decode(data.slice(0, ENCRYPTED.length)) === ENCRYPTED) {
          log.textContent = `It is encrypted to its customer's key. In a terminal, \`deepsquare job logs ${job}\` and \`deepsquare job results ${job}\` decrypt it.`;
          return;
        }
        offset += data.length;
        const held = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
        log.textContent = (log.textContent + decoder.decode(data, { stream: true })).slice(-MOST);
        if (held) log.scrollTop = log.scrollHeight;
      }
    } catch (error) {
      failures += 1;
      if (failures > 5 || !remembered(session.gateway)) throw error;
    }
    if (!ended) await pause(Math.min(10_000, 500 * 2 ** failures));
    if (!remembered(session.gateway)) throw new Error("The sign-in has expired. Sign in again to go on.");
  }
  if (!offset) log.textContent = "It printed nothing.";
  await showResults(section, session);
}

async function showResults(section, session) {
  const job = section.dataset.job;
  const note = section.querySelector("[data-note]");
  let answer = null;
  for (let at = 0; at < 30 && !answer?.ok; at += 1) {
    if (at) await pause(1_000);
    answer = await ask(session, `jobs/${job}/results`);
    if (!answer.ok && answer.status !== 404) throw await refusal(answer);
  }
  if (!answer.ok) return;
  const list = section.querySelector("ul");
  const { files } = await answer.json();
  for (const file of files) list.append(await entry(section, session, file));
  note.textContent = `${files.length} ${files.length === 1 ? "file" : "files"} of results`;
}

async function entry(section, session, file) {
  const item = document.createElement("li");
  const name = document.createElement(file.problem ? "span" : "button");
  name.textContent = file.name;
  if (!file.problem) {
    name.type = "button";
    name.addEventListener("click", () => save(section, session, file));
  }
  item.append(name, ` ${file.problem || `${file.size} bytes`}`);
  if (file.name === "output" && !file.problem) item.append(` ${await verdict(section, session, file)}`);
  return item;
}

async function fetched(section, session, file) {
  const path = file.name.split("/").map(encodeURIComponent).join("/");
  const answer = await ask(session, `jobs/${section.dataset.job}/files/${path}`);
  if (!answer.ok) throw await refusal(answer);
  return answer.blob();
}

// Compares the output with the SHA-256 that the provider reported on chain.
async function verdict(section, session, file) {
  for (let at = 0; at < 40 && !section.dataset.result; at += 1) await pause(500);
  if (!section.dataset.result || !crypto.subtle) return "not compared with the chain";
  const data = await (await fetched(section, session, file)).arrayBuffer();
  const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", data));
  const found = [...sum].map((each) => each.toString(16).padStart(2, "0")).join("");
  return section.dataset.result.replace(/^0x/, "") === found ? "as its provider reported on chain" : "NOT what its provider reported on chain";
}

async function save(section, session, file) {
  const url = URL.createObjectURL(await fetched(section, session, file));
  const link = document.createElement("a");
  link.href = url;
  link.download = file.name.split("/").pop();
  link.click();
  setTimeout(() => URL.revokeObjectURL(url), 60_000);
}
