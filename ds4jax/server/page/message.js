// One message as it is shown: who says it, thoughts, text, calls, a line about it, and what can be done with it.

import {button, copy, count, element} from "./dom.js";
import {Markdown} from "./markdown.js";
import {siblings} from "./store.js";

/** Append what is new of a text to the text node of an element. */
function grow(node, text) {
  const shown = node.firstChild;
  if (shown && text.startsWith(shown.data)) {
    if (text.length > shown.length) shown.appendData(text.slice(shown.length));
  } else node.textContent = text;
}

const words = text => text.trim().split(/\s+/).filter(Boolean).length;
const percent = logprob => `${(100 * Math.exp(logprob)).toFixed(1)} %`;

export class MessageView {
  /** actions: what the page does when a button is pressed: edit(view); regenerate, resume or turn(message). */
  constructor(conversation, message, actions, name) {
    Object.assign(this, {conversation, message, actions, parts: {}});
    this.node = element("article", {className: `message ${message.role}`});
    const author = {user: "You", assistant: name, tool: "Result of a tool"}[message.role];
    this.node.append(element("h2", {className: "author"}, author));
    this.node.setAttribute("aria-label", author);
    this.body = element("div", {className: "body"});
    this.node.append(this.body);
    if (message.role === "assistant") {
      this.note = element("div", {className: "note"});
      this.bar = element("div", {className: "actions"});
      this.node.append(this.note, this.bar);
    } else if (message.role === "user") {
      this.bar = element("div", {className: "actions"});
      this.node.append(this.bar);
    }
    this.update();
  }

  /** Show the message as it is now. live: of an answer that is being written, the line about it; else null. */
  update(live = null) {
    const {message} = this;
    if (message.role === "user")
      this.part("text", () => element("div", {className: "text plain", dir: "auto"}), grow, message.content);
    if (message.role === "tool")
      this.part(
        "text",
        () =>
          element(
            "div",
            {className: "call result"},
            element("b", {}, message.name ?? "result"),
            element("code", {dir: "auto"}),
          ),
        (node, text) => {
          node.lastChild.textContent = text;
        },
        message.content,
      );
    if (message.role === "assistant") this.answer(live);
    if (this.bar && this.live !== Boolean(live)) this.actionBar(live);
    this.live = Boolean(live);
  }

  /** Make a part of the message once, and show something in it. */
  part(name, make, show, value) {
    if (!this.parts[name]) this.body.append((this.parts[name] = make()));
    show(this.parts[name], value);
  }

  answer(live) {
    const {message} = this;
    if (message.reasoning_content) this.thoughts(live);
    if (message.content) {
      if (message.logprobs?.length && !this.asMarkdown)
        this.part("tokens", () => tokenList(), showTokens, message.logprobs);
      else
        this.part(
          "text",
          () => element("div", {className: "text"}),
          (node, text) => {
            this.markdown ??= new Markdown(node);
            this.markdown.update(text, !live);
          },
          message.content,
        );
    }
    (message.tool_calls ?? []).forEach(
      (call, i) =>
        call &&
        this.part(
          `call ${i}`,
          () =>
            element("div", {className: "call"}, element("b", {}, call.function.name), element("code", {dir: "ltr"})),
          (node, text) => {
            node.lastChild.textContent = live ? text : pretty(text);
          },
          call.function.arguments,
        ),
    );
    const text = live?.text ?? message.note ?? "";
    if (this.note.textContent !== text) this.note.textContent = text;
    this.note.classList.toggle("error", !live && Boolean(message.failed));
  }

  thoughts(live) {
    const {message} = this,
      thinking = live && !message.content && !message.tool_calls;
    this.part(
      "thoughts",
      () =>
        element(
          "details",
          {className: "thoughts"},
          element(
            "summary",
            {},
            element("span", {className: "label"}),
            element("span", {className: "preview", "aria-hidden": "true"}),
          ),
          element("div", {className: "plain", dir: "auto"}),
        ),
      () => {},
    );
    const fold = this.parts.thoughts,
      text = message.reasoning_content;
    const [label, preview] = fold.firstChild.children;
    const seconds = Math.round(message.thought ?? 0),
      length = `${count(words(text))} words`;
    const said = thinking
      ? `Thinking… ${seconds} s`
      : `Thought ${seconds ? `for ${count(seconds)} s` : "for a moment"} · ${length}`;
    if (label.textContent !== said) label.textContent = said;
    preview.textContent = thinking ? text.slice(-160).replace(/\s+/g, " ") : "";
    grow(fold.lastChild, text);
  }

  actionBar(live) {
    const {message, actions} = this,
      small = {className: "small"};
    this.bar.replaceChildren();
    if (live) return;
    const press = button("Copy", () => copy(message.content, press), {...small, "aria-label": "Copy the message"});
    if (message.content) this.bar.append(press);
    if (message.role === "user") this.bar.append(button("Edit", () => actions.edit(this), small));
    if (message.role === "assistant") {
      const retry = message.failed ? "Retry" : "Regenerate";
      this.bar.append(button(retry, () => actions.regenerate(message), small));
      if (message.cut && !message.tool_calls) this.bar.append(button("Continue", () => actions.resume(message), small));
      if (message.logprobs?.length) {
        const swap = button(
          this.asMarkdown ? "Tokens" : "Formatted",
          () => {
            this.asMarkdown = !this.asMarkdown;
            for (const name of ["tokens", "text"]) {
              this.parts[name]?.remove();
              delete this.parts[name];
            }
            this.markdown = null;
            this.live = undefined;
            this.update();
          },
          small,
        );
        this.bar.append(swap);
      }
    }
    const all = siblings(this.conversation, message),
      at = all.indexOf(message);
    if (all.length > 1)
      this.bar.append(
        element(
          "span",
          {className: "branches", role: "group", "aria-label": "Versions"},
          button("‹", () => actions.turn(all[at - 1]), {...small, disabled: !at, "aria-label": "Version before"}),
          element("span", {}, `${at + 1} / ${all.length}`),
          button("›", () => actions.turn(all[at + 1]), {
            ...small,
            disabled: at === all.length - 1,
            "aria-label": "Next version",
          }),
        ),
      );
  }

  /** Let the user change the message in place; `done` is called with the new text. */
  edit(done) {
    const field = element("textarea", {
      value: this.message.content,
      "aria-label": "Edit the message",
      rows: 3,
      dir: "auto",
    });
    const close = () => {
      form.remove();
      this.body.hidden = this.bar.hidden = false;
    };
    const form = element(
      "form",
      {
        className: "edit",
        onsubmit(event) {
          event.preventDefault();
          close();
          done(field.value);
        },
      },
      field,
      element(
        "div",
        {className: "actions"},
        element("button", {className: "primary"}, "Send"),
        button("Cancel", close),
      ),
    );
    form.onkeydown = event => {
      if (event.key === "Escape") {
        event.stopPropagation();
        close();
      } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    };
    this.body.hidden = this.bar.hidden = true;
    this.node.append(form);
    field.focus();
  }

  /** Ask for the results of the calls; `done` is called with them. */
  askForResults(done) {
    const fields = this.message.tool_calls.map(call =>
      element("textarea", {
        rows: 2,
        dir: "auto",
        placeholder: `Result of ${call.function.name}`,
        "aria-label": `Result of ${call.function.name}`,
      }),
    );
    const form = element(
      "form",
      {
        className: "results",
        onsubmit(event) {
          event.preventDefault();
          form.remove();
          done(fields.map(field => field.value));
        },
      },
      ...fields,
      element("button", {className: "primary"}, "Send results"),
    );
    this.body.append(form);
  }
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json;
  }
}

// ---- log-probabilities: the tokens of the text, each with what else might have stood there ----
const tokenList = () => element("div", {className: "text plain tokens", dir: "auto"});

function showTokens(node, tokens) {
  for (const {token, logprob} of tokens.slice(node.childElementCount)) {
    const span = element("span", {}, token);
    span.style.setProperty("--doubt", (1 - Math.exp(logprob)).toFixed(2));
    node.append(span);
  }
  node.onpointerover = event => {
    const at = [...node.children].indexOf(event.target);
    if (at >= 0) event.target.title = describe(tokens[at]);
  };
}

const describe = ({token, logprob, top_logprobs}) =>
  [
    `${JSON.stringify(token)} ${percent(logprob)}`,
    "",
    ...top_logprobs.map(other => `${percent(other.logprob).padStart(7)}  ${JSON.stringify(other.token)}`),
  ].join("\n");
