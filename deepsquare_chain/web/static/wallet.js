// The customer's wallet (EIP-1193, discovered by EIP-6963). The server encodes calls and describes
// their effects; the wallet displays them again and signs. Keys never leave the wallet.

import { storedSession, showOutput, signIn, upload } from "./gateway.js";

const wallets = new Map();
let provider = null;
let account = "";
let grid = null;

addEventListener("eip6963:announceProvider", (event) => {
  const { info, provider: announced } = event.detail ?? {};
  if (typeof info?.uuid === "string" && typeof announced?.request === "function") {
    wallets.set(info.uuid, { name: String(info.name ?? "a wallet").slice(0, 60), provider: announced });
  }
});

// An error whose message is shown to the user unchanged.
class UserError extends Error {}

export function element(tag, text = "", attributes = {}) {
  const node = document.createElement(tag);
  node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

const shortHex = (text) => `${text.slice(0, 6)}…${text.slice(-4)}`;
const hex = (number) => `0x${BigInt(number).toString(16)}`;
const pause = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

// Opens a dialog; returns the value of the pressed button ("" if it was closed) and the form.
function openDialog(title, parts, choices) {
  const id = "dialog-title";
  const dialog = element("dialog", "", { "aria-labelledby": id });
  const form = element("form", "", { method: "dialog" });
  const actions = element("div", "", { class: "actions" });
  for (const [value, label, primary] of choices) {
    const closing = value === "" ? { formnovalidate: "" } : {};
    actions.append(element("button", label, { value, ...closing, ...(primary ? { class: "primary" } : {}) }));
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

const showMessage = (title, text) => openDialog(title, [element("p", text)], [["", "Close", true]]);

export async function api(path, body) {
  const post = { method: "POST", body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let response = null;
  let content = null;
  try {
    response = await fetch(path, body === undefined ? {} : post);
    content = await response.json();
  } catch {
    throw new UserError("The explorer does not answer. Nothing was sent.");
  }
  if (!response.ok) throw new UserError([content.detail || content.title, content.hint].filter(Boolean).map(sentence).join(" "));
  return content;
}

const sentence = (text) => (/[.!?]$/.test(text) ? text : `${text}.`);

async function chooseWallet() {
  dispatchEvent(new Event("eip6963:requestProvider"));
  await pause(150);
  const available = [...wallets.values()];
  if (!available.length && typeof window.ethereum?.request === "function") {
    available.push({ name: "Browser wallet", provider: window.ethereum });
  }
  if (!available.length) {
    throw new UserError("No wallet was found in this browser. Install one that follows EIP-1193 and reload this page.");
  }
  if (available.length === 1) return available[0].provider;
  const { value } = await openDialog("Which wallet?", [], [...available.map((wallet, index) => [String(index), wallet.name]), ["", "None"]]);
  if (value === "") throw new UserError("No wallet was chosen.");
  return available[Number(value)].provider;
}

const chainOf = async () => BigInt(await provider.request({ method: "eth_chainId" }));

// Makes sure that the wallet is on the grid's chain before anything is signed.
async function ensureChain() {
  grid ??= await api("/wallet/grid");
  const expected = BigInt(grid.chain_id);
  const actual = await chainOf();
  if (actual === expected) return;
  const text = `The wallet is on chain ${actual}; this grid is on chain ${expected}. Nothing is signed on another chain.`;
  const { value } = await openDialog("Wrong network", [element("p", text)], [["", "Cancel"], ["switch", "Switch the wallet", true]]);
  if (value === "switch") {
    await provider.request({ method: "wallet_switchEthereumChain", params: [{ chainId: hex(expected) }] });
  }
  if ((await chainOf()) !== expected) throw new UserError(`The wallet is not on chain ${expected}; nothing was sent.`);
}

async function connect() {
  if (!provider) {
    provider = await chooseWallet();
    provider.on?.("accountsChanged", (accounts) => showAccount(String(accounts?.[0] ?? "")));
  }
  const accounts = await provider.request({ method: "eth_requestAccounts" });
  if (!accounts?.length) throw new UserError("The wallet returned no account.");
  showAccount(String(accounts[0]));
  await ensureChain();
}

function showAccount(address) {
  account = address;
  const button = document.getElementById("wallet");
  button.textContent = address ? shortHex(address) : "Connect wallet";
  button.title = address;
}

// Shows the effects of a plan, and asks for confirmation before anything is signed.
async function confirmPlan(plan) {
  const list = element("ul", "", { class: "effects" });
  for (const effect of plan.effects) list.append(element("li", effect));
  const note = element("p", "Your wallet shows it again before it signs.", { class: "dim" });
  const { value } = await openDialog(plan.title, [list, note], [["", "Back"], ["go", plan.action, true]]);
  if (value !== "go") throw new UserError("Cancelled. Nothing was sent.");
}

async function send(call) {
  await ensureChain();
  const { to, data, value, chainId } = call;
  return provider.request({
    method: "eth_sendTransaction",
    params: [{ from: account, to, data, value: hex(value), chainId }],
  });
}

// Polls the explorer until a transaction is in a block.
async function waitMined(hash, report, attempts = 600) {
  for (let attempt = 0; attempt < attempts; attempt += 1) {
    const outcome = await api(`/wallet/outcome/${hash}?account=${account}`);
    if (outcome.state === "refused") throw new UserError(`The contract refused it: ${outcome.reason || hash} Only gas was paid.`);
    if (outcome.state === "done") return outcome;
    if (attempt === 3) report(`Sent as ${shortHex(hash)}; waits for its block …`);
    await pause(500);
  }
  throw new UserError(`Transaction ${hash} is not in a block yet. Check it later.`);
}

async function waitIndexed(hash) {
  for (let attempt = 0; attempt < 20; attempt += 1) {
    const outcome = await api(`/wallet/outcome/${hash}`);
    if (outcome.indexed) return;
    await pause(300);
  }
}

// Returns the gateway session of the connected account; the wallet signs in if there is none.
async function gatewaySession() {
  const accountGrid = await api(`/wallet/grid?account=${encodeURIComponent(account)}`);
  try {
    return await signIn(accountGrid, async (message) => {
      const text = [...new TextEncoder().encode(message)].map((byte) => byte.toString(16).padStart(2, "0")).join("");
      return provider.request({ method: "personal_sign", params: [`0x${text}`, account] });
    });
  } catch (error) {
    if (error?.code !== undefined) throw error;
    throw new UserError(`The sign-in to the gateway failed: ${String(error?.message ?? error).slice(0, 300)}`);
  }
}

// Uploads a definition to the gateway, where providers read it, before any payment.
async function uploadDefinition(plan, report) {
  if (!plan.definition) return;
  report("Sign in to the gateway with your wallet …");
  const session = await gatewaySession();
  report("Uploading the definition …");
  try {
    await upload(session, plan.digest, plan.definition);
  } catch (error) {
    throw new UserError(`The definition was not uploaded, and nothing was paid. ${String(error?.message ?? error).slice(0, 300)}`);
  }
}

async function openOutput(section) {
  const button = section.querySelector("button[data-output]");
  const { gateway } = section.dataset;
  let session = storedSession(gateway);
  if (!session) {
    await connect();
    session = await gatewaySession();
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
  await ensureChain();
  return provider.request({ method: "eth_signTypedData_v4", params: [account, JSON.stringify(data)] });
}

// Signs a request, sends it to the relay, and waits until a transaction has executed it.
async function relay(request, report) {
  report("Sign the request in your wallet …");
  const signature = await signTyped(request);
  report("Waiting for the relay …");
  const { digest } = await api("/wallet/relay", { message: request.message, signature });
  for (let attempt = 0; attempt < 600; attempt += 1) {
    const status = await api(`/wallet/relay/${digest}`);
    if (status.state === "executed") return status.transaction;
    if (status.state === "failed") throw new UserError(`The contract refused it: ${status.reason || digest}. Nothing was paid.`);
    if (status.state === "dropped") throw new UserError(`The relay did not execute it: ${status.reason || digest}. Nothing was paid.`);
    await pause(500);
  }
  throw new UserError("The relay has not executed it yet. Check your jobs later; the request is valid for a few minutes.");
}

// Signs the permit or sends the approval that a plan needs, then sends the call or the request.
async function execute(kind, body, report) {
  await connect();
  const payload = { ...body, account };
  let plan = await api(`/wallet/${kind}`, payload);
  await confirmPlan(plan);
  await uploadDefinition(plan, report);
  if (plan.permit) {
    report("Sign the permit in your wallet …");
    const signature = await signTyped(plan.permit);
    const { value, deadline } = plan.permit.message;
    plan = await api(`/wallet/${kind}`, { ...payload, permit: { value, deadline, signature } });
  } else if (plan.approval) {
    report("Confirm the approval in your wallet …");
    await waitMined(await send(plan.approval), report);
    plan = await api(`/wallet/${kind}`, payload);
  }
  if (!plan.call && !plan.request) throw new UserError("The explorer returned another plan than expected; nothing more was sent.");
  if (plan.call) report("Confirm the transaction in your wallet …");
  const hash = plan.request ? await relay(plan.request, report) : await send(plan.call);
  report(`Sent as ${shortHex(hash)} …`);
  const outcome = await waitMined(hash, report);
  report("Done.");
  await waitIndexed(hash);
  return { hash, jobs: outcome.jobs };
}

function errorText(error) {
  if (error?.code === 4001) return "You refused it in the wallet. Nothing more was sent.";
  if (error instanceof UserError) return error.message;
  return `The wallet failed: ${String(error?.message ?? error).slice(0, 300)}`;
}

async function reportErrors(action) {
  try {
    await action();
  } catch (error) {
    await showMessage("Not done", errorText(error));
  }
}

async function onJobAction(button) {
  const { act, job } = button.dataset;
  const body = { job: Number(job) };
  if (act === "topup") {
    const field = element("label", "Credits to add");
    field.append(element("input", "", { name: "credits", inputmode: "decimal", required: "", autocomplete: "off" }));
    const { value, form } = await openDialog(`Top up job ${job}`, [field], [["", "Back"], ["go", "Continue", true]]);
    if (value !== "go") return;
    body.credits = new FormData(form).get("credits");
    body.payment = "permit";
  }
  const label = button.textContent;
  button.disabled = true;
  try {
    await execute(act, body, (text) => (button.textContent = text));
    location.reload();
  } finally {
    button.disabled = false;
    button.textContent = label;
  }
}

// Submits the job of the form, and opens its page.
export async function submitJob(body, report) {
  try {
    const { hash, jobs } = await execute("submit", body, report);
    location.assign(jobs.length === 1 ? `/jobs/${jobs[0]}` : `/transactions/${hash}`);
  } catch (error) {
    report(errorText(error), true);
  }
}

export function connectWallet() {
  const output = document.getElementById("output");
  if (output && storedSession(output.dataset.gateway)) reportErrors(() => openOutput(output));
  dispatchEvent(new Event("eip6963:requestProvider"));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.hasAttribute("data-wallet")) {
      reportErrors(async () => {
        const wasConnected = account !== "";
        await connect();
        if (wasConnected) location.assign(`/accounts/${account}`);
      });
    }
    if (button?.dataset.act) reportErrors(() => onJobAction(button));
    if (button?.hasAttribute("data-output")) reportErrors(() => openOutput(button.closest("section")));
  });
}
