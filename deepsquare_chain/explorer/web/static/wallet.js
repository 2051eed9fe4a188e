// A customer's own wallet (EIP-1193, found by EIP-6963). The server encodes calls and says what they do; the
// wallet shows them once more and signs. No key is ever seen here.

const wallets = new Map();
let provider = null;
let account = "";
let grid = null;

addEventListener("eip6963:announceProvider", (event) => {
  const { info, provider: found } = event.detail ?? {};
  if (typeof info?.uuid === "string" && found?.request) wallets.set(info.uuid, { name: String(info.name).slice(0, 60), provider: found });
});

class Plain extends Error {}

const element = (tag, text = "", attributes = {}) => {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
};
const short = (text) => `${text.slice(0, 6)}…${text.slice(-4)}`;
const hex = (number) => `0x${BigInt(number).toString(16)}`;

// Ask somebody in a dialog; gives the pressed button's value, or "" when it was left.
function ask(title, parts, choices) {
  const dialog = element("dialog", "", { "aria-label": title });
  const form = element("form", "", { method: "dialog" });
  const actions = element("div", "", { class: "actions" });
  for (const [value, label, primary] of choices) {
    actions.append(element("button", label, { value, ...(primary ? { class: "primary" } : {}) }));
  }
  form.append(element("h2", title), ...parts, actions);
  dialog.append(form);
  document.body.append(dialog);
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve({ value: dialog.returnValue, form });
    });
    dialog.showModal();
  });
}

const tell = (title, text) => ask(title, [element("p", text)], [["ok", "Close", true]]);

async function get(path) {
  const answer = await fetch(path, { headers: { Accept: "application/json" } });
  return read(answer);
}

async function post(path, body) {
  const answer = await fetch(path, {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "application/json" },
    body: JSON.stringify(body),
  });
  return read(answer);
}

async function read(answer) {
  let body = null;
  try {
    body = await answer.json();
  } catch {
    throw new Plain(`The explorer answered with status ${answer.status}.`);
  }
  if (!answer.ok) throw new Plain([body.detail || body.title || `Status ${answer.status}.`, body.hint].filter(Boolean).join(" "));
  return body;
}

async function choose() {
  dispatchEvent(new Event("eip6963:requestProvider"));
  await new Promise((resolve) => setTimeout(resolve, 150));
  const found = [...wallets.values()];
  if (!found.length && window.ethereum?.request) found.push({ name: "Browser wallet", provider: window.ethereum });
  if (!found.length) throw new Plain("No wallet was found in this browser. Install one that follows EIP-1193, and read this page again.");
  if (found.length === 1) return found[0].provider;
  const { value } = await ask("Which wallet?", [], found.map((each, i) => [String(i), each.name]));
  if (value === "") throw new Plain("No wallet was chosen.");
  return found[Number(value)].provider;
}

async function rightNetwork() {
  grid ??= await get("/wallet/grid");
  if (BigInt(await provider.request({ method: "eth_chainId" })) === BigInt(grid.chain_id)) return;
  const { value } = await ask("Wrong network", [element("p", `The wallet is on another chain. This grid lives on chain ${grid.chain_id}; nothing is signed on another.`)], [["", "Leave it"], ["switch", "Switch the wallet", true]]);
  if (value === "switch") await provider.request({ method: "wallet_switchEthereumChain", params: [{ chainId: hex(grid.chain_id) }] });
  if (BigInt(await provider.request({ method: "eth_chainId" })) !== BigInt(grid.chain_id)) {
    throw new Plain(`The wallet is not on chain ${grid.chain_id}; nothing was sent.`);
  }
}

async function connected() {
  if (!provider) {
    provider = await choose();
    provider.on?.("accountsChanged", (accounts) => show(accounts?.[0] ?? ""));
  }
  const accounts = await provider.request({ method: "eth_requestAccounts" });
  if (!accounts?.length) throw new Plain("The wallet gave no account.");
  show(accounts[0]);
  await rightNetwork();
}

function show(address) {
  account = address;
  const button = document.querySelector("[data-wallet]");
  button.textContent = address ? short(address) : "Connect wallet";
  button.title = address;
}

// Show what a call does, and send it once the owner agrees; gives the transaction's hash.
async function confirm(plan) {
  const list = element("ul", "", { class: "effects" });
  for (const effect of plan.effects) list.append(element("li", effect));
  const { value } = await ask(plan.title, [list, element("p", "Your wallet shows it once more before it signs.", { class: "dim" })], [["", "Don't"], ["go", plan.action, true]]);
  if (value !== "go") throw new Plain("Nothing was sent.");
}

async function send(call) {
  return provider.request({ method: "eth_sendTransaction", params: [{ from: account, to: call.to, data: call.data, value: hex(call.value) }] });
}

async function mined(hash) {
  for (let i = 0; i < 240; i += 1) {
    const receipt = await provider.request({ method: "eth_getTransactionReceipt", params: [hash] });
    if (receipt) {
      if (BigInt(receipt.status) !== 1n) throw new Plain(`The contracts refused transaction ${hash}; only its gas was paid.`);
      return receipt;
    }
    await new Promise((resolve) => setTimeout(resolve, 500));
  }
  throw new Plain(`Transaction ${hash} is not in a block yet; look at it later.`);
}

// Allow what is missing (by a permit that is signed, or an approval that is sent), then carry the plan out.
async function carryOut(kind, body, report) {
  await connected();
  let plan = await post(`/wallet/${kind}`, { ...body, account });
  await confirm(plan);
  if (plan.permit) {
    report("Sign the permit in your wallet …");
    const signature = await provider.request({ method: "eth_signTypedData_v4", params: [account, JSON.stringify(plan.permit)] });
    plan = await post(`/wallet/${kind}`, { ...body, account, permit: { value: plan.permit.message.value, deadline: plan.permit.message.deadline, signature } });
  } else if (plan.approval) {
    report("Confirm the approval in your wallet …");
    await mined(await send(plan.approval));
    plan = await post(`/wallet/${kind}`, { ...body, account });
  }
  report("Confirm the transaction in your wallet …");
  const hash = await send(plan.call);
  report(`Sent ${short(hash)}; waiting for its block …`);
  await mined(hash);
  return hash;
}

const wordsOf = (error) => {
  if (error?.code === 4001) return "You refused it in the wallet; nothing was sent.";
  if (error instanceof Plain) return error.message;
  return `The wallet failed: ${String(error?.message ?? error).slice(0, 300)}`;
};

async function guarded(work) {
  try {
    await work();
  } catch (error) {
    await tell("Not done", wordsOf(error));
  }
}

async function onJob(button) {
  const { act, job, customer } = button.dataset;
  const body = { job: Number(job), customer };
  if (act === "topup") {
    const field = element("label", "Credits");
    field.append(element("input", "", { name: "credits", inputmode: "decimal", required: "", autocomplete: "off" }));
    const { value, form } = await ask(`Top up job ${job}`, [field], [["", "Don't"], ["go", "Continue", true]]);
    if (value !== "go") return;
    body.credits = new FormData(form).get("credits");
    body.way = "permit";
  }
  const hash = await carryOut(act, body, () => {});
  location.assign(`/transactions/${hash}?wait=1`);
}

async function onForm(form) {
  const output = form.querySelector("[data-report]");
  const button = form.querySelector("button[type=submit]");
  const body = Object.fromEntries(new FormData(form));
  button.disabled = true;
  output.textContent = "";
  try {
    const hash = await carryOut("submit", body, (text) => (output.textContent = text));
    location.assign(`/transactions/${hash}?wait=1`);
  } catch (error) {
    output.textContent = wordsOf(error);
  } finally {
    button.disabled = false;
  }
}

export function connectWallet() {
  dispatchEvent(new Event("eip6963:requestProvider"));
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.hasAttribute("data-wallet")) {
      guarded(async () => {
        await connected();
        location.assign(`/accounts/${account}`);
      });
    }
    if (button?.dataset.act) guarded(() => onJob(button));
  });
  document.addEventListener("submit", (event) => {
    if (!event.target.matches("form[data-submit-job]")) return;
    event.preventDefault();
    onForm(event.target);
  });
}
