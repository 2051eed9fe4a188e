// The customer's wallet (EIP-1193, discovered by EIP-6963). The server encodes calls and describes
// their effects; the wallet displays them again and signs. Keys never leave the wallet.

import { remembered, showOutput, signIn, upload } from "./gateway.js";

const wallets = new Map();
let provider = null;
let account = "";
let grid = null;

addEventListener("eip6963:announceProvider", (event) => {
  const { info, provider: found } = event.detail ?? {};
  if (typeof info?.uuid === "string" && typeof found?.request === "function") {
    wallets.set(info.uuid, { name: String(info.name ?? "a wallet").slice(0, 60), provider: found });
  }
});

// An error whose message is shown to the user unchanged.
class Plain extends Error {}

export function element(tag, text = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const short = (text) => `${text.slice(0, 6)}…${text.slice(-4)}`;
const hex = (number) => `0x${BigInt(number).toString(16)}`;
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Opens a dialog; returns the value of the pressed button ("" if it was closed) and the form.
function ask(title, parts, choices) {
  const id = "dialog-title";
  const dialog = element("dialog", "", { "aria-labelledby": id });
  const form = element("form", "", { method: "dialog" });
  const actions = element("div", "", { class: "actions" });
  for (const [value, label, primary] of choices) {
    const leaves = value === "" ? { formnovalidate: "" } : {};
    actions.append(element("button", label, { value, ...leaves, ...(primary ? { class: "primary" } : {}) }));
  }
  form.append(element("h2", title, { id }), ...parts, actions);
  dialog.append(form);
  document.body.append(dialog);
  const before = document.activeElement;
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      before?.focus?.();
      resolve({ value: dialog.returnValue, form });
    });
    dialog.showModal();
    (form.querySelector("input") ?? actions.lastElementChild).focus();
  });
}

const tell = (title, text) => ask(title, [element("p", text)], [["", "Close", true]]);

export async function api(path, body) {
  const post = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let answer = null;
  let found = null;
  try {
    answer = await fetch(path, body === undefined ? {} : post);
    found = await answer.json();
  } catch {
    throw new Plain("The explorer does not answer. Nothing was sent.");
  }
  if (!answer.ok) throw new Plain([found.detail || found.title, found.hint].filter(Boolean).map(sentence).join(" "));
  return found;
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

async function choose() {
  dispatchEvent(new Event("eip6963:requestProvider"));
  await pause(150);
  const found = [...wallets.values()];
  if (!found.length && typeof window.ethereum?.request === "function") {
    found.push({ name: "Browser wallet", provider: window.ethereum });
  }
  if (!found.length) {
    throw new Plain("No wallet was found in this browser. Install one that follows EIP-1193 and read this page again.");
  }
  if (found.length === 1) return found[0].provider;
  const { value } = await ask("Which wallet?", [], [...found.map((each, at) => [String(at), each.name]), ["", "None"]]);
  if (value === "") throw new Plain("No wallet was chosen.");
  return found[Number(value)].provider;
}

const chainOf = async () => BigInt(await provider.request({ method: "eth_chainId" }));

// Makes sure that the wallet is on the grid's chain before anything is signed.
async function onTheGrid() {
  grid ??= await api("/wallet/grid");
  const wanted = BigInt(grid.chain_id);
  const found = await chainOf();
  if (found === wanted) return;
  const text = `The wallet is on chain ${found}; this grid lives on chain ${wanted}. Nothing is signed on another.`;
  const { value } = await ask("Wrong network", [element("p", text)], [["", "Leave it"], ["switch", "Switch the wallet", true]]);
  if (value === "switch") {
    await provider.request({ method: "wallet_switchEthereumChain", params: [{ chainId: hex(wanted) }] });
  }
  if ((await chainOf()) !== wanted) throw new Plain(`The wallet is not on chain ${wanted}; nothing was sent.`);
}

async function connected() {
  if (!provider) {
    provider = await choose();
    provider.on?.("accountsChanged", (accounts) => show(String(accounts?.[0] ?? "")));
  }
  const accounts = await provider.request({ method: "eth_requestAccounts" });
  if (!accounts?.length) throw new Plain("The wallet gave no account.");
  show(String(accounts[0]));
  await onTheGrid();
}

function show(address) {
  account = address;
  const button = document.getElementById("wallet");
  button.textContent = address ? short(address) : "Connect wallet";
  button.title = address;
}

// Shows the effects of a plan, and asks for confirmation before anything is signed.
async function confirm(plan) {
  const list = element("ul", "", { class: "effects" });
  for (const effect of plan.effects) list.append(element("li", effect));
  const note = element("p", "Your wallet shows it once more before it signs.", { class: "dim" });
  const { value } = await ask(plan.title, [list, note], [["", "Back"], ["go", plan.action, true]]);
  if (value !== "go") throw new Plain("You left it. Nothing was sent.");
}

async function send(call) {
  await onTheGrid();
  const { to, data, value, chainId } = call;
  return provider.request({
    method: "eth_sendTransaction",
    params: [{ from: account, to, data, value: hex(value), chainId }],
  });
}

// Polls the explorer until a transaction is in a block.
async function mined(hash, report, wait = 600) {
  for (let at = 0; at < wait; at += 1) {
    const found = await api(`/wallet/outcome/${hash}?account=${account}`);
    if (found.state === "refused") throw new Plain(`The contract refused it: ${found.reason || hash} Only gas was paid.`);
    if (found.state === "done") return found;
    if (at === 3) report(`Sent as ${short(hash)}; waits for its block …`);
    await pause(500);
  }
  throw new Plain(`Transaction ${hash} is not in a block yet. Check it later.`);
}

async function indexed(hash) {
  for (let at = 0; at < 20; at += 1) {
    const found = await api(`/wallet/outcome/${hash}`);
    if (found.indexed) return;
    await pause(300);
  }
}

// Returns the gateway session of the connected account; the wallet signs in if there is none.
async function signedIn() {
  const known = await api(`/wallet/grid?account=${encodeURIComponent(account)}`);
  try {
    return await signIn(known, async (message) => {
      const text = [...new TextEncoder().encode(message)].map((each) => each.toString(16).padStart(2, "0")).join("");
      return provider.request({ method: "personal_sign", params: [`0x${text}`, account] });
    });
  } catch (error) {
    if (error?.code !== undefined) throw error;
    throw new Plain(`The sign-in to the gateway failed: ${String(error?.message ?? error).slice(0, 300)}`);
  }
}

// Uploads a definition to the gateway, where providers read it, before any payment.
async function keep(plan, report) {
  if (!plan.definition) return;
  report("Sign in to the gateway with your wallet …");
  const session = await signedIn();
  report("Uploading the definition …");
  try {
    await upload(session, plan.digest, plan.definition);
  } catch (error) {
    throw new Plain(`The definition was not uploaded, and nothing was paid. ${String(error?.message ?? error).slice(0, 300)}`);
  }
}

async function onOutput(section) {
  const button = section.querySelector("button[data-output]");
  const { gateway } = section.dataset;
  let session = remembered(gateway);
  if (!session) {
    await connected();
    session = await signedIn();
  }
  button.hidden = true;
  try {
    await showOutput(section, session);
  } catch (error) {
    section.querySelector("[data-note]").textContent = String(error?.message ?? error).slice(0, 300);
    button.hidden = false;
  }
}

async function signTyped(data) {
  await onTheGrid();
  return provider.request({ method: "eth_signTypedData_v4", params: [account, JSON.stringify(data)] });
}

// Signs a request, sends it to the relay, and waits until a transaction has executed it.
async function relayed(request, report) {
  report("Sign the request in your wallet …");
  const signature = await signTyped(request);
  report("The relay has it …");
  const { digest } = await api("/wallet/relay", { message: request.message, signature });
  for (let at = 0; at < 600; at += 1) {
    const found = await api(`/wallet/relay/${digest}`);
    if (found.state === "executed") return found.transaction;
    if (found.state === "failed") throw new Plain(`The contract refused it: ${found.reason || digest}. Nothing was paid.`);
    if (found.state === "dropped") throw new Plain(`The relay did not carry it out: ${found.reason || digest}. Nothing was paid.`);
    await pause(500);
  }
  throw new Plain("The relay has not executed it yet. Check your jobs later; the request is valid for a few minutes.");
}

// Signs the permit or sends the approval that a plan needs, then sends the call or the request.
async function carryOut(kind, body, report) {
  await connected();
  const asked = { ...body, account };
  let plan = await api(`/wallet/${kind}`, asked);
  await confirm(plan);
  await keep(plan, report);
  if (plan.permit) {
    report("Sign the permit in your wallet …");
    const signature = await signTyped(plan.permit);
    const { value, deadline } = plan.permit.message;
    plan = await api(`/wallet/${kind}`, { ...asked, permit: { value, deadline, signature } });
  } else if (plan.approval) {
    report("Confirm the approval in your wallet …");
    await mined(await send(plan.approval), report);
    plan = await api(`/wallet/${kind}`, asked);
  }
  if (!plan.call && !plan.request) throw new Plain("The explorer asked for something else than before; nothing more was sent.");
  if (plan.call) report("Confirm the transaction in your wallet …");
  const hash = plan.request ? await relayed(plan.request, report) : await send(plan.call);
  report(`Sent as ${short(hash)} …`);
  const found = await mined(hash, report);
  report("Done.");
  await indexed(hash);
  return { hash, jobs: found.jobs };
}

function wordsOf(error) {
  if (error?.code === 4001) return "You refused it in the wallet. Nothing more was sent.";
  if (error instanceof Plain) return error.message;
  return `The wallet failed: ${String(error?.message ?? error).slice(0, 300)}`;
}

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    await tell("Not done", wordsOf(error));
  }
}

async function onJob(button) {
  const { act, job } = button.dataset;
  const body = { job: Number(job) };
  if (act === "topup") {
    const field = element("label", "Credits to add");
    field.append(element("input", "", { name: "credits", inputmode: "decimal", required: "", autocomplete: "off" }));
    const { value, form } = await ask(`Top up job ${job}`, [field], [["", "Back"], ["go", "Continue", true]]);
    if (value !== "go") return;
    body.credits = new FormData(form).get("credits");
    body.way = "permit";
  }
  const label = button.textContent;
  button.disabled = true;
  try {
    await carryOut(act, body, (text) => (button.textContent = text));
    location.reload();
  } finally {
    button.disabled = false;
    button.textContent = label;
  }
}

// Submits the job of the form, and opens its page.
export async function submitJob(body, report) {
  try {
    const { hash, jobs } = await carryOut("submit", body, report);
    location.assign(jobs.length === 1 ? `/jobs/${jobs[0]}` : `/transactions/${hash}`);
  } catch (error) {
    report(wordsOf(error), true);
  }
}

export function connectWallet() {
  const output = document.getElementById("output");
  if (output && remembered(output.dataset.gateway)) guarded(() => onOutput(output));
  dispatchEvent(new Event("eip6963:requestProvider"));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.hasAttribute("data-wallet")) {
      guarded(async () => {
        const known = account !== "";
        await connected();
        if (known) location.assign(`/accounts/${account}`);
      });
    }
    if (button?.dataset.act) guarded(() => onJob(button));
    if (button?.hasAttribute("data-output")) guarded(() => onOutput(button.closest("section")));
  });
}
