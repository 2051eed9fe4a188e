// A text field for YAML with line numbers, highlighted lines, and completion of the keys and values
// that a JSON schema allows at the cursor.

const INDENT = 2;
const MAX_COMPLETIONS = 12;

// Returns the schema of a value, with references and nullable types resolved.
function resolveSchema(schema, root) {
  let resolved = schema;
  for (let step = 0; resolved && step < 9; step += 1) {
    if (resolved.$ref) resolved = { ...root.$defs[resolved.$ref.split("/").pop()], ...(resolved.description ? { description: resolved.description } : {}) };
    else if (resolved.anyOf) resolved = { ...resolved, ...(resolved.anyOf.find((option) => option.type !== "null") ?? {}), anyOf: undefined };
    else break;
  }
  return resolved ?? {};
}

// Returns the key path of a line, outermost key first; it includes the line's own key, if any.
function pathAt(lines, at) {
  const path = [];
  let limit = Infinity;
  for (let number = at; number >= 0; number -= 1) {
    const [, space, dashes, key] = /^( *)((?:- +)*)(?:([\w.-]+) *:)?/.exec(lines[number]);
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
  let current = resolveSchema(root, root);
  for (const part of path) {
    const inner = part === "-" ? current.items : (current.properties?.[part] ?? current.additionalProperties);
    if (!inner || typeof inner !== "object") return null;
    current = resolveSchema(inner, root);
  }
  return current;
}

function typeText(schema) {
  if (schema.enum) return schema.enum.join(", ");
  const range = schema.minimum !== undefined && schema.maximum !== undefined ? ` ${schema.minimum} to ${schema.maximum}` : "";
  return `${[schema.type ?? "value"].flat().join(" or ")}${range}`;
}

const entries = (schema, root) =>
  Object.entries(schema?.properties ?? {}).map(([key, property]) => {
    const resolved = resolveSchema(property, root);
    return { text: key, note: resolved.description ?? "", insert: `${key}:${resolved.type === "object" || resolved.type === "array" ? "" : " "}` };
  });

export function attachEditor(field, schema) {
  const gutter = field.parentElement.querySelector(".gutter");
  const list = field.parentElement.querySelector("[role=listbox]");
  const help = field.closest(".editor").querySelector("[data-help]");
  const intro = help.textContent;
  let completions = [];
  let selected = 0;
  let marked = new Set();

  const cursor = () => {
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
    const { lines, at, line, typed } = cursor();
    const value = /^( *(?:- +)*)([\w.-]+): +(\S*)$/.exec(typed);
    if (value) {
      const valueSchema = schemaAt(pathAt(lines, at), schema);
      const options = valueSchema?.enum ?? (valueSchema?.type === "boolean" ? [true, false] : []);
      return { part: value[3], items: options.map((option) => ({ text: String(option), note: "", insert: String(option) })) };
    }
    const key = /^( *(?:- +)*)([\w.-]*)$/.exec(typed);
    if (!key || line.slice(typed.length).trim()) return { part: "", items: [] };
    const bare = [...lines];
    bare[at] = `${key[1]}x:`;
    const path = pathAt(bare, at).slice(0, -1);
    return { part: key[2], items: entries(schemaAt(path, schema), schema) };
  }

  function showCompletions(all) {
    const { part, items } = candidates();
    completions = items.filter((item) => item.text !== part && item.text.toLowerCase().startsWith(part.toLowerCase()));
    if ((!part && !all) || !completions.length) return close();
    selected = 0;
    completions = completions.slice(0, MAX_COMPLETIONS).map((item) => ({ ...item, part }));
    list.replaceChildren(
      ...completions.map((completion, at) => {
        const item = document.createElement("li");
        item.id = `key-${at}`;
        item.setAttribute("role", "option");
        const note = document.createElement("small");
        note.textContent = completion.note;
        item.append(completion.text, note);
        item.addEventListener("mousedown", (event) => {
          event.preventDefault();
          accept(at);
        });
        return item;
      }),
    );
    const style = getComputedStyle(field);
    const { at, typed } = cursor();
    const height = parseFloat(style.lineHeight);
    list.style.top = `${parseFloat(style.paddingTop) + (at + 1) * height - field.scrollTop}px`;
    list.style.left = `${Math.min(field.offsetLeft + (typed.length - part.length) * 7.7 - field.scrollLeft, field.clientWidth / 2)}px`;
    list.hidden = false;
    highlight(0);
  }

  function highlight(at) {
    selected = (at + completions.length) % completions.length;
    [...list.children].forEach((item, number) => item.setAttribute("aria-selected", String(number === selected)));
    list.children[selected].scrollIntoView({ block: "nearest" });
    field.setAttribute("aria-activedescendant", `key-${selected}`);
    help.textContent = completions[selected].note || intro;
  }

  function close() {
    list.hidden = true;
    completions = [];
    field.removeAttribute("aria-activedescendant");
    explain();
  }

  function explain() {
    const { lines, at, line } = cursor();
    const path = /^[ -]*[\w.-]+ *:/.test(line) ? pathAt(lines, at) : [];
    const keySchema = path.length ? schemaAt(path, schema) : null;
    const name = path.filter((part) => part !== "-").join(".");
    help.textContent = keySchema ? `${name}: ${typeText(keySchema)}. ${keySchema.description ?? ""}` : path.length ? `${name} is not a key of a job file.` : intro;
  }

  function write(text, over = 0) {
    const end = field.selectionStart;
    field.setRangeText(text, end - over, field.selectionEnd, "end");
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  function accept(at) {
    const { insert, part } = completions[at];
    close();
    field.focus();
    write(insert, part.length);
    close();
  }

  field.addEventListener("keydown", (event) => {
    if (event.key === " " && event.ctrlKey) {
      event.preventDefault();
      showCompletions(true);
    } else if (!list.hidden && ["ArrowDown", "ArrowUp"].includes(event.key)) {
      event.preventDefault();
      highlight(selected + (event.key === "ArrowDown" ? 1 : -1));
    } else if (!list.hidden && ["Enter", "Tab"].includes(event.key)) {
      event.preventDefault();
      accept(selected);
    } else if (!list.hidden && event.key === "Escape") {
      event.preventDefault();
      close();
    } else if (event.key === "Enter" && !event.shiftKey) {
      event.preventDefault();
      const { typed } = cursor();
      const deeper = /[:|>] *$/.test(typed) ? INDENT : 0;
      const dash = /^ *- +\S/.test(typed) && !deeper ? INDENT : 0;
      write(`\n${" ".repeat(/^ */.exec(typed)[0].length + deeper + dash)}`);
    }
  });
  field.addEventListener("input", () => {
    draw();
    showCompletions(false);
  });
  field.addEventListener("scroll", () => (gutter.scrollTop = field.scrollTop));
  field.addEventListener("blur", close);
  for (const name of ["click", "keyup"]) field.addEventListener(name, () => list.hidden && explain());
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
