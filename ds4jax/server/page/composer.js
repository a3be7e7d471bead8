// Where messages are written: it grows with the text, takes text files, keeps drafts, and says what went wrong.

import {$, button, element, touch} from "./dom.js";
import {setKey} from "./stream.js";

const MOST = 2 ** 20; // bytes of a file

export class Composer {
  /** on: what the page does: send(text), stop(), changed(text, files). */
  constructor(on) {
    this.on = on;
    this.files = [];
    this.input = $("input");
    this.input.oninput = () => this.changed();
    this.input.onkeydown = event => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch.matches) {
        event.preventDefault();
        this.send();
      }
    };
    $("composer").onsubmit = event => {
      event.preventDefault();
      this.send();
    };
    $("stop").onclick = () => on.stop();
    $("attach").onclick = () => $("file").click();
    $("file").onchange = () => {
      this.attach([...$("file").files]);
      $("file").value = "";
    };
    this.input.onpaste = event => {
      if (!event.clipboardData.files.length || event.clipboardData.types.includes("text/plain")) return;
      event.preventDefault();
      this.attach([...event.clipboardData.files]);
    };
    addEventListener("dragover", event => event.dataTransfer.types.includes("Files") && event.preventDefault());
    addEventListener("drop", event => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.attach([...event.dataTransfer.files]);
    });
  }

  get text() {
    return this.input.value;
  }

  /** What is sent: the files, each in a block of its own, and the text. */
  get message() {
    const fence = text => "`".repeat(Math.max(3, ...(text.match(/`+/g) ?? []).map(ticks => ticks.length + 1)));
    const blocks = this.files.map(({name, text}) => `${name}:\n${fence(text)}\n${text.trimEnd()}\n${fence(text)}`);
    return [...blocks, this.text.trim()].filter(Boolean).join("\n\n");
  }

  set(text, files = []) {
    this.input.value = text;
    this.files = [...files];
    this.draw();
  }

  send() {
    if (this.message && !this.busy) this.on.send(this.message);
  }

  changed() {
    this.draw();
    this.on.changed(this.text, this.files);
  }

  draw() {
    const {style} = this.input;
    if (!CSS.supports("field-sizing", "content")) {
      style.height = "auto";
      style.height = `${this.input.scrollHeight + 2}px`;
    }
    $("files").replaceChildren(
      ...this.files.map(file =>
        element(
          "span",
          {className: "file"},
          file.name,
          button(
            "×",
            () => {
              this.files = this.files.filter(other => other !== file);
              this.changed();
              this.input.focus();
            },
            {"aria-label": `Remove ${file.name}`},
          ),
        ),
      ),
    );
    $("files").hidden = !this.files.length;
  }

  async attach(list) {
    for (const file of list) {
      const text = file.size > MOST ? null : await file.text();
      if (text === null) this.say(`${file.name}: found ${file.size} bytes, expected at most ${MOST}`);
      else if (text.includes("\0") || text.includes("\ufffd"))
        this.say(`${file.name}: found bytes, expected a text file in UTF-8`);
      else this.files.push({name: file.name, text});
    }
    this.changed();
    this.input.focus();
  }

  /** Whether an answer is being written. */
  setBusy(on) {
    this.busy = on;
    $("send").hidden = on;
    $("stop").hidden = !on;
  }

  /** Say what went wrong, above the input. retry: what the button of this name does. */
  say(text, retry) {
    const close = button("×", () => this.quiet(), {"aria-label": "Dismiss"});
    $("banner").replaceChildren(
      element("span", {className: "error"}, text),
      ...(retry
        ? [
            button(
              "Retry",
              () => {
                this.quiet();
                retry();
              },
              {className: "primary"},
            ),
          ]
        : []),
      close,
    );
    $("banner").hidden = false;
  }

  /** Ask for the API key; then go on. */
  askForKey(text, then) {
    const field = element("input", {
      type: "password",
      name: "key",
      autocomplete: "off",
      placeholder: "API key",
      "aria-label": "API key",
    });
    const form = element(
      "form",
      {
        className: "key",
        onsubmit: event => {
          event.preventDefault();
          setKey(field.value.trim());
          this.quiet();
          then();
        },
      },
      element("span", {className: "error"}, text),
      field,
      element("button", {className: "primary"}, "Use this key"),
    );
    $("banner").replaceChildren(form);
    $("banner").hidden = false;
    field.focus();
  }

  quiet() {
    if ($("banner").hidden) return;
    $("banner").hidden = true;
    $("banner").replaceChildren();
    this.input.focus();
  }
}
