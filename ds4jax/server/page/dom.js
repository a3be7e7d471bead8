// Elements of the page. Text becomes text nodes, here and everywhere: nothing that is said is read as HTML.

/** The element with an id. */
export const $ = id => document.getElementById(id);

/** Whether fingers are what points here, and the focus opens a keyboard: see its `matches`. */
export const touch = matchMedia("(pointer: coarse)");

/** A new element. properties: of the element, or attributes where their name has a hyphen. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties))
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  node.append(...children);
  return node;
}

/** A button that does something. */
export const button = (text, action, properties = {}) =>
  element("button", {type: "button", textContent: text, onclick: action, ...properties});

/** Say something below the page for some seconds, perhaps with an action: [its name, what it does]. */
export function toast(text, action, seconds = 8) {
  const node = element("div", {className: "toast"}, text);
  const close = () => node.remove();
  if (action)
    node.append(
      button(action[0], () => {
        close();
        action[1]();
      }),
    );
  $("toasts").replaceChildren(node);
  setTimeout(close, 1000 * seconds);
}

/** Let the browser keep a text as a file. */
export function download(name, text, type) {
  const url = URL.createObjectURL(new Blob([text], {type}));
  element("a", {href: url, download: name}).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}

/** Put a text on the clipboard, and say so on the button that was pressed. */
export async function copy(text, pressed) {
  const before = pressed.textContent;
  try {
    await navigator.clipboard.writeText(text);
    pressed.textContent = "Copied";
  } catch {
    // not allowed here, as on a page without TLS
    const field = element("textarea", {value: text, className: "out-of-sight"});
    document.body.append(field);
    field.select();
    pressed.textContent = document.execCommand("copy") ? "Copied" : "Not allowed";
    field.remove();
    pressed.focus();
  }
  setTimeout(() => {
    pressed.textContent = before;
  }, 1500);
}

/** A number as people write it. */
export const count = n => n.toLocaleString("en");
