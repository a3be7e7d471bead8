// The list of conversations: search, rename, delete with undo, export and import.

import {$, button, download, element, toast} from "./dom.js";
import * as store from "./store.js";

export class List {
  /**
   * all: the conversations, of which this list is the owner.
   * on: what the page does: open(conversation), changed(), removed(conversation).
   */
  constructor(all, on) {
    Object.assign(this, {all, on, current: null, running: () => false});
    $("search").oninput = () => this.draw();
    document.addEventListener("click", event => {
      // a menu closes when something else is pressed
      for (const menu of document.querySelectorAll(".menu[open]")) if (!menu.contains(event.target)) menu.open = false;
    });
    $("import").onclick = () => $("import-file").click();
    $("import-file").onchange = async () => {
      for (const file of [...$("import-file").files]) await this.take(file);
      $("import-file").value = "";
    };
    $("export").onclick = () =>
      download("ds4jax-conversations.json", store.asJson(this.all.filter(one => one.leaf)), "application/json");
  }

  add(conversation) {
    if (!this.all.includes(conversation)) this.all.unshift(conversation);
    this.draw();
  }

  async take(file) {
    try {
      const found = store.fromJson(await file.text());
      for (const one of found) {
        this.all.unshift(one);
        store.save(one);
      }
      this.draw();
      if (found.length) this.on.open(found[0]);
      toast(`${found.length} conversation${found.length === 1 ? "" : "s"} imported`);
    } catch (error) {
      toast(`${file.name}: ${error.message}`);
    }
  }

  draw() {
    const wanted = $("search").value.trim().toLowerCase();
    const holds = one =>
      !wanted ||
      one.title.toLowerCase().includes(wanted) ||
      Object.values(one.messages).some(message => message.content?.toLowerCase().includes(wanted));
    const shown = this.all
      .filter(one => (one.leaf || one.draft || one === this.current) && holds(one))
      .sort((a, b) => b.updated - a.updated);
    $("conversations").replaceChildren(...shown.map(one => this.row(one)));
    $("no-conversations").hidden = shown.length > 0;
    $("no-conversations").textContent = wanted ? "Nothing found." : "No conversations yet.";
  }

  row(one) {
    const open = button("", () => this.on.open(one), {className: "open", title: one.title});
    open.append(element("span", {}, one.title));
    if (this.running(one))
      open.append(element("span", {className: "running", role: "img", "aria-label": "is being answered"}));
    if (one === this.current) open.setAttribute("aria-current", "true");
    const menu = element(
      "details",
      {className: "menu"},
      element("summary", {"aria-label": `More about ${one.title}`}, "⋯"),
      element(
        "div",
        {},
        button("Rename", () => this.rename(one, row)),
        button("Export as JSON", () => {
          menu.open = false;
          download(`${fileName(one)}.json`, store.asJson([one]), "application/json");
        }),
        button("Export as Markdown", () => {
          menu.open = false;
          download(`${fileName(one)}.md`, store.asMarkdown(one), "text/markdown");
        }),
        button("Delete", () => this.remove(one), {className: "danger"}),
      ),
    );
    menu.onkeydown = event => {
      if (event.key === "Escape") {
        event.stopPropagation();
        menu.open = false;
        menu.firstChild.focus();
      }
    };
    const row = element("li", {}, open, menu);
    return row;
  }

  rename(one, row) {
    const field = element("input", {value: one.title, "aria-label": "Name of the conversation"});
    const done = keep => {
      if (keep && field.value.trim()) {
        Object.assign(one, {title: field.value.trim(), named: true});
        store.save(one);
        this.on.changed();
      }
      this.draw();
    };
    row.replaceChildren(field);
    field.onkeydown = event => {
      event.stopPropagation();
      if (event.key === "Enter" || event.key === "Escape") {
        field.onblur = null;
        done(event.key === "Enter");
      }
    };
    field.onblur = () => done(true);
    field.select();
  }

  remove(one) {
    const at = this.all.indexOf(one);
    this.all.splice(at, 1);
    this.on.removed(one);
    store.remove(one);
    this.draw();
    toast(`“${one.title}” deleted`, [
      "Undo",
      () => {
        this.all.splice(at, 0, one);
        store.save(one);
        this.on.open(one);
        this.draw();
      },
    ]);
  }
}

const fileName = one =>
  one.title
    .replace(/[^\p{L}\p{N}]+/gu, "-")
    .replace(/^-|-$/g, "")
    .slice(0, 60) || "conversation";
