// A text field for YAML with line numbers, highlighted lines, and completion of the keys and values
// that a JSON schema allows at the cursor.

const INDENT = 2;
const MOST = 12;

// Returns the schema of a value, with references and nullable types resolved.
function plain(schema, root) {
  let found = schema;
  for (let step = 0; found && step < 9; step += 1) {
    if (found.$ref) found = { ...root.$defs[found.$ref.split("/").pop()], ...(found.description ? { description: found.description } : {}) };
    else if (found.anyOf) found = { ...found, ...(found.anyOf.find((each) => each.type !== "null") ?? {}), anyOf: undefined };
    else break;
  }
  return found ?? {};
}

// Returns the key path of a line, outermost key first; it includes the line's own key, if any.
function pathAt(lines, at) {
  const path = [];
  let limit = Infinity;
  for (let number = at; number >= 0; number -= 1) {
    const found = /^( *)((?:- +)*)(?:([\w.-]+) *:)?/.exec(lines[number]);
    const [, space, dashes, key] = found;
    const indent = space.length + dashes.length;
    if (!lines[number].trim() || lines[number].trim().startsWith("#")) {
      if (number === at) limit = space.length + 1;
      continue;
    }
    if (number === at) {
      limit = indent;
      if (key) path.unshift(key);
      if (dashes) [path.unshift("-"), (limit = space.length + 0.5)];
    } else if (key && indent < limit) {
      path.unshift(key);
      limit = indent;
      if (dashes) [path.unshift("-"), (limit = space.length + 0.5)];
    }
  }
  return path;
}

function schemaAt(path, root) {
  let found = plain(root, root);
  for (const part of path) {
    const inner = part === "-" ? found.items : (found.properties?.[part] ?? found.additionalProperties);
    if (!inner || typeof inner !== "object") return null;
    found = plain(inner, root);
  }
  return found;
}

function kind(schema) {
  if (schema.enum) return schema.enum.join(", ");
  const range = schema.minimum !== undefined && schema.maximum !== undefined ? ` ${schema.minimum} to ${schema.maximum}` : "";
  return `${[schema.type ?? "value"].flat().join(" or ")}${range}`;
}

const entries = (schema, root) =>
  Object.entries(schema?.properties ?? {}).map(([key, each]) => {
    const found = plain(each, root);
    return { text: key, note: found.description ?? "", insert: `${key}:${found.type === "object" || found.type === "array" ? "" : " "}` };
  });

export function attachEditor(field, schema) {
  const gutter = field.parentElement.querySelector(".gutter");
  const list = field.parentElement.querySelector("[role=listbox]");
  const help = field.closest(".editor").querySelector("[data-help]");
  const intro = help.textContent;
  let offered = [];
  let chosen = 0;
  let marked = new Set();

  const place = () => {
    const before = field.value.slice(0, field.selectionStart);
    const lines = field.value.split("\n");
    const at = before.split("\n").length - 1;
    return { lines, at, line: lines[at], typed: before.slice(before.lastIndexOf("\n") + 1) };
  };

  function draw() {
    const total = field.value.split("\n").length;
    gutter.replaceChildren(
      ...Array.from({ length: total }, (_, at) => {
        const number = document.createElement("span");
        number.textContent = `${at + 1}\n`;
        number.classList.toggle("bad", marked.has(at + 1));
        return number;
      }),
    );
    gutter.scrollTop = field.scrollTop;
  }

  // Returns the completions at the cursor, and the prefix that is already typed.
  function candidates() {
    const { lines, at, line, typed } = place();
    const value = /^( *(?:- +)*)([\w.-]+): +(\S*)$/.exec(typed);
    if (value) {
      const found = schemaAt(pathAt(lines, at), schema);
      const texts = found?.enum ?? (found?.type === "boolean" ? [true, false] : []);
      return { part: value[3], items: texts.map((each) => ({ text: String(each), note: "", insert: String(each) })) };
    }
    const key = /^( *(?:- +)*)([\w.-]*)$/.exec(typed);
    if (!key || line.slice(typed.length).trim()) return { part: "", items: [] };
    const bare = [...lines];
    bare[at] = `${key[1]}x:`;
    const path = pathAt(bare, at).slice(0, -1);
    return { part: key[2], items: entries(schemaAt(path, schema), schema) };
  }

  function offer(all) {
    const { part, items } = candidates();
    offered = items.filter((each) => each.text !== part && each.text.toLowerCase().startsWith(part.toLowerCase()));
    if ((!part && !all) || !offered.length) return close();
    chosen = 0;
    offered = offered.slice(0, MOST).map((each) => ({ ...each, part }));
    list.replaceChildren(
      ...offered.map((each, at) => {
        const item = document.createElement("li");
        item.id = `key-${at}`;
        item.setAttribute("role", "option");
        const note = document.createElement("small");
        note.textContent = each.note;
        item.append(each.text, note);
        item.addEventListener("mousedown", (event) => {
          event.preventDefault();
          take(at);
        });
        return item;
      }),
    );
    const style = getComputedStyle(field);
    const { at, typed } = place();
    const height = parseFloat(style.lineHeight);
    list.style.top = `${parseFloat(style.paddingTop) + (at + 1) * height - field.scrollTop}px`;
    list.style.left = `${Math.min(field.offsetLeft + (typed.length - part.length) * 7.7 - field.scrollLeft, field.clientWidth / 2)}px`;
    list.hidden = false;
    point(0);
  }

  function point(at) {
    chosen = (at + offered.length) % offered.length;
    [...list.children].forEach((each, number) => each.setAttribute("aria-selected", String(number === chosen)));
    list.children[chosen].scrollIntoView({ block: "nearest" });
    field.setAttribute("aria-activedescendant", `key-${chosen}`);
    help.textContent = offered[chosen].note || intro;
  }

  function close() {
    list.hidden = true;
    offered = [];
    field.removeAttribute("aria-activedescendant");
    explain();
  }

  function explain() {
    const { lines, at, line } = place();
    const path = /^[ -]*[\w.-]+ *:/.test(line) ? pathAt(lines, at) : [];
    const found = path.length ? schemaAt(path, schema) : null;
    const name = path.filter((each) => each !== "-").join(".");
    help.textContent = found ? `${name}: ${kind(found)}. ${found.description ?? ""}` : path.length ? `${name} is not a key of a job file.` : intro;
  }

  function write(text, over = 0) {
    const end = field.selectionStart;
    field.setRangeText(text, end - over, field.selectionEnd, "end");
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function take(at) {
    const { insert, part } = offered[at];
    close();
    field.focus();
    write(insert, part.length);
    close();
  }

  field.addEventListener("keydown", (event) => {
    if (event.key === " " && event.ctrlKey) {
      event.preventDefault();
      offer(true);
    } else if (!list.hidden && ["ArrowDown", "ArrowUp"].includes(event.key)) {
      event.preventDefault();
      point(chosen + (event.key === "ArrowDown" ? 1 : -1));
    } else if (!list.hidden && ["Enter", "Tab"].includes(event.key)) {
      event.preventDefault();
      take(chosen);
    } else if (!list.hidden && event.key === "Escape") {
      event.preventDefault();
      close();
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      const { typed } = place();
      const deeper = /[:|>] *$/.test(typed) ? INDENT : 0;
      const dash = /^ *- +\S/.test(typed) && !deeper ? INDENT : 0;
      write(`\n${" ".repeat(/^ */.exec(typed)[0].length + deeper + dash)}`);
    }
  });
  field.addEventListener("input", () => {
    draw();
    offer(false);
  });
  field.addEventListener("scroll", () => (gutter.scrollTop = field.scrollTop));
  field.addEventListener("blur", close);
  for (const kind of ["click", "keyup"]) field.addEventListener(kind, () => list.hidden && explain());
  draw();
  return {
    draw,
    mark(lines) {
      marked = new Set(lines);
      draw();
    },
    go(line) {
      const start = field.value.split("\n").slice(0, line - 1).join("\n").length + (line > 1 ? 1 : 0);
      const end = field.value.indexOf("\n", start);
      field.focus();
      field.setSelectionRange(start, end < 0 ? field.value.length : end);
      explain();
    },
  };
}
