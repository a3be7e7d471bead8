// Markdown as nodes of the document. The parser gives tokens, and these become elements here: there is no HTML on the
// way, and tags in the text stay text. Only the highlighter's HTML is parsed, by the sanitizer, and may have spans with
// a class.

import {Marked} from "./vendor/marked/marked.js";
import {button, copy, element} from "./dom.js";

const LONG_PARAGRAPH = 20_000; // characters; a longer one is shown as it is
const LONG_CODE = 100_000; // a longer block is not coloured
const COLOUR_OPEN = 4_000; // a block that still grows is coloured up to here
const SAFE = /^(https?:|mailto:)/i;
const ENTITIES = {
  amp: "&",
  lt: "<",
  gt: ">",
  quot: '"',
  apos: "'",
  nbsp: "\u00a0",
  mdash: "—",
  ndash: "–",
  hellip: "…",
  times: "×",
  rarr: "→",
  larr: "←",
  copy: "©",
  deg: "°",
  le: "≤",
  ge: "≥",
  ne: "≠",
};

// ---- math, beside the parser's own tokens: $…$, $$…$$, \(…\), \[…\] ----
const mathBlock = {
  name: "mathBlock",
  level: "block",
  start: text => text.match(/(^|\n)\s*(\$\$|\\\[)/)?.index,
  tokenizer(text) {
    const found =
      /^ {0,3}\$\$([\s\S]+?)\$\$[ \t]*(?:\n|$)/.exec(text) ?? /^ {0,3}\\\[([\s\S]+?)\\\][ \t]*(?:\n|$)/.exec(text);
    return found ? {type: "mathBlock", raw: found[0], text: found[1].trim()} : undefined;
  },
};
const mathInline = {
  name: "mathInline",
  level: "inline",
  start: text => text.match(/\$|\\\(|\\\[/)?.index,
  tokenizer(text) {
    // A dollar opens math before something else than a space, and closes it after such and before no digit: not $5, $6.
    const found =
      /^\$\$([^$]+?)\$\$/.exec(text) ??
      /^\$(?![\s$])((?:\\.|[^$\\\n])+?)(?<!\s)\$(?!\d)/.exec(text) ??
      /^\\\(([\s\S]+?)\\\)/.exec(text) ??
      /^\\\[([\s\S]+?)\\\]/.exec(text);
    return found
      ? {type: "mathInline", raw: found[0], text: found[1].trim(), display: /^(\$\$|\\\[)/.test(found[0])}
      : undefined;
  },
};
const parser = new Marked({gfm: true});
parser.use({extensions: [mathBlock, mathInline], tokenizer: {html() {}, tag() {}}}); // tags are text

/** A growing text, shown in an element. Blocks that are complete are parsed once, and their nodes stay. */
export class Markdown {
  constructor(node) {
    this.node = node;
    this.blocks = []; // {raw, type, node}
    this.settled = 0; // how many of them do not change any more
    this.offset = 0; // where the text of the others begins
  }

  /** Show a text, of which the one before was the beginning. complete: it does not grow any more. */
  update(text, complete = false) {
    if (text.includes("\r")) text = text.replace(/\r\n?/g, "\n");
    if (complete) this.settled = this.offset = 0;
    const tokens = parser.lexer(text.slice(this.offset));
    tokens.forEach((token, i) => this.block(this.settled + i, token, complete || i < tokens.length - 1));
    for (const old of this.blocks.splice(this.settled + tokens.length)) old.node?.remove();
    for (const token of tokens.slice(0, -3)) {
      // the next characters may change the last ones
      this.settled += 1;
      this.offset += token.raw.length;
    }
  }

  block(i, token, closed) {
    const old = this.blocks[i];
    if (old?.raw === token.raw && old.closed === closed) return;
    if (old?.node && old.type === "code" && token.type === "code" && old.lang === token.lang) {
      fillCode(old.node, token, closed); // in place: who selects in it goes on doing so
      Object.assign(old, {raw: token.raw, closed});
      return;
    }
    if (old?.raw === token.raw && token.type !== "code") {
      old.closed = closed;
      return;
    }
    const node = blockNode(token, closed);
    if (old?.node) old.node.remove();
    this.blocks[i] = {raw: token.raw, type: token.type, lang: token.lang, closed, node};
    if (node) {
      const next = this.blocks.slice(i + 1).find(block => block.node)?.node ?? null;
      this.node.insertBefore(node, next);
    }
  }
}

// ---- blocks ---------------------------------------------------------------------------------------------------------
function blockNode(token, closed) {
  switch (token.type) {
    case "space":
    case "def":
      return null;
    case "heading":
      return element(`h${Math.min(6, token.depth + 2)}`, {dir: "auto"}, ...inline(token.tokens));
    case "code":
      return codeBlock(token, closed);
    case "mathBlock":
      return math(token, true);
    case "blockquote":
      return element("blockquote", {dir: "auto"}, ...blocks(token.tokens));
    case "hr":
      return element("hr");
    case "list":
      return list(token);
    case "table":
      return table(token);
    case "paragraph":
      if (token.raw.length > LONG_PARAGRAPH) return element("p", {dir: "auto", className: "plain"}, token.raw);
      return element("p", {dir: "auto"}, ...inline(token.tokens));
    case "text":
      return element("p", {dir: "auto"}, ...inline(token.tokens ?? [token]));
    default:
      return element("p", {dir: "auto"}, token.raw);
  }
}

const blocks = tokens => tokens.map(token => blockNode(token, true)).filter(Boolean);

function list(token) {
  const node = element(token.ordered ? "ol" : "ul", {dir: "auto"});
  if (token.ordered && token.start !== 1 && token.start !== "") node.start = token.start;
  for (const item of token.items) {
    const parts = item.tokens.flatMap(part => {
      if (part.type === "checkbox") return [checkbox(part.checked)];
      if (part.type === "text" || (part.type === "paragraph" && !item.loose)) return inline(part.tokens ?? [part]);
      return blocks([part]);
    });
    if (item.task && !item.tokens.some(part => holdsCheckbox(part))) parts.unshift(checkbox(item.checked));
    node.append(element("li", {dir: "auto", className: item.task ? "task" : ""}, ...parts));
  }
  return node;
}

const holdsCheckbox = part => part.type === "checkbox" || part.tokens?.some(holdsCheckbox);
const checkbox = checked =>
  element("input", {type: "checkbox", checked, disabled: true, "aria-label": checked ? "done" : "to do"});

function table(token) {
  const cell = (tag, {tokens, align}) => {
    const node = element(tag, {dir: "auto"}, ...inline(tokens));
    if (align) node.style.textAlign = align;
    return node;
  };
  const head = element("tr", {}, ...token.header.map(one => cell("th", one)));
  const rows = token.rows.map(row => element("tr", {}, ...row.map(one => cell("td", one))));
  const node = element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows));
  return element("div", {className: "table", tabIndex: 0, role: "region", "aria-label": "Table"}, node);
}

// ---- inline ---------------------------------------------------------------------------------------------------------
const inline = tokens => tokens.flatMap(inlineNodes);

function inlineNodes(token) {
  switch (token.type) {
    case "strong":
    case "em":
    case "del":
      return [element(token.type, {}, ...inline(token.tokens))];
    case "codespan":
      return [element("code", {dir: "ltr"}, token.text)];
    case "br":
      return [element("br")];
    case "escape":
      return [decoded(token.text)];
    case "mathInline":
      return [math(token, token.display)];
    case "checkbox":
      return [checkbox(token.checked)];
    case "link":
      return link(token.href, inline(token.tokens), token.title);
    case "image":
      return link(token.href, [token.text || token.href], token.title); // nothing is loaded from elsewhere
    case "text":
      return token.tokens ? inline(token.tokens) : broken(token.text);
    default:
      return [token.raw];
  }
}

function link(href, content, title) {
  if (!SAFE.test(href)) return content;
  return [element("a", {href, title: title ?? "", target: "_blank", rel: "noopener noreferrer"}, ...content)];
}

/** Text, in which the one tag that models use within tables, <br>, breaks the line. */
const broken = text =>
  text.split(/<br\s*\/?>/i).flatMap((part, i) => (i ? [element("br"), decoded(part)] : [decoded(part)]));

const decoded = text =>
  text.includes("&")
    ? text.replace(/&(?:#(\d{1,7})|#x([\da-f]{1,6})|(\w+));/gi, (all, ten, hex, name) => {
        if (name) return ENTITIES[name] ?? all;
        const code = ten ? Number(ten) : parseInt(hex, 16);
        return code > 0 && code <= 0x10ffff ? String.fromCodePoint(code) : all;
      })
    : text;

// ---- code -----------------------------------------------------------------------------------------------------------
const languageOf = token => (token.lang ?? "").trim().split(/\s/)[0];

function codeBlock(token, closed) {
  const code = element("code", {});
  const press = button("Copy", () => copy(code.textContent, press), {
    className: "small",
    "aria-label": "Copy the code",
  });
  const language = languageOf(token);
  const pre = element(
    "pre",
    {tabIndex: 0, dir: "ltr", role: "region", "aria-label": `Code${language && ` in ${language}`}`},
    code,
  );
  const node = element(
    "div",
    {className: "code"},
    element("div", {className: "code-head"}, element("span", {}, language || "text"), press),
    pre,
  );
  fillCode(node, token, closed);
  return node;
}

function fillCode(node, token, closed) {
  const code = node.querySelector("code"),
    text = token.text,
    shown = code.textContent;
  if (code.childNodes.length === 1 && code.firstChild.nodeType === Node.TEXT_NODE && text.startsWith(shown))
    code.firstChild.appendData(text.slice(shown.length));
  else if (text !== shown) code.textContent = text;
  const language = languageOf(token).toLowerCase();
  if (language && text.length < (closed ? LONG_CODE : COLOUR_OPEN)) colour(code, text, language);
}

let highlighter = null;
async function colour(code, text, language) {
  highlighter ??= Promise.all([import("./vendor/highlight/highlight.js"), import("./vendor/dompurify/purify.js")]);
  const [{default: hljs}] = await highlighter;
  if (code.textContent !== text || !hljs.getLanguage(language)) return; // it has grown meanwhile
  const {value} = hljs.highlight(text, {language, ignoreIllegals: true});
  code.replaceChildren(
    globalThis.DOMPurify.sanitize(value, {RETURN_DOM_FRAGMENT: true, ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"]}),
  );
}

// ---- math -----------------------------------------------------------------------------------------------------------
let typesetter = null;
const typeset = new Map(); // formulas that were set, by their text

function loadTypesetter() {
  document.head.append(
    element("link", {rel: "stylesheet", href: new URL("./vendor/katex/katex.css", import.meta.url).href}),
  );
  return import("./vendor/katex/katex.js").then(() => globalThis.katex);
}

function math({text, raw}, display) {
  const node = element("span", {className: display ? "math display" : "math", dir: "ltr"}),
    key = `${display} ${text}`;
  if (typeset.has(key)) {
    node.append(typeset.get(key).cloneNode(true));
    return node;
  }
  node.textContent = raw.trim();
  (typesetter ??= loadTypesetter())
    .then(katex => {
      const options = {displayMode: display, trust: false, maxExpand: 200, maxSize: 50, strict: "ignore"};
      const tree = katex.__renderToDomTree(text, options);
      withoutStyle(tree);
      if (typeset.size > 500) typeset.clear();
      typeset.set(key, tree.toNode());
      node.replaceChildren(typeset.get(key).cloneNode(true));
    })
    .catch(() => {}); // what is no formula stays as it was written
  return node;
}

/** Take out style attributes, which the policy forbids; only the hidden MathML has some. */
function withoutStyle(tree) {
  if (tree.attributes) delete tree.attributes.style;
  for (const child of tree.children ?? []) withoutStyle(child);
}
