// The page: which conversation is shown, how answers come into it, and what the buttons do.

import {$, count, toast, touch} from "./dom.js";
import {Composer} from "./composer.js";
import {List} from "./list.js";
import {MessageView} from "./message.js";
import * as plots from "./plots.js";
import {body, last, Settings} from "./settings.js";
import * as store from "./store.js";
import {call, chunks} from "./stream.js";

const WELCOME = "What would you like to know?";
const runs = new Map(); // conversation → the answer that is being written in it
const problems = new Map(); // conversation → how its last message failed, until it is shown and dealt with
let current = null,
  views = new Map();
let model = {name: "ds4jax", context: 0},
  drafting = false;

// ---- what is shown --------------------------------------------------------------------------------------------------
const main = $("main");
let following = true; // whether the end of the conversation is kept in sight

/** Show a conversation; null: a new one. */
function open(conversation) {
  current = list.current = conversation ?? store.newConversation(last());
  localStorage.setItem("ds4jax-current", current.id);
  settings.set(current.settings);
  composer.set(current.draft, current.files);
  following = true;
  drawChat();
  list.draw();
  showProblem();
  toggleStatus(false);
  toggleList(false);
  if (!touch.matches) composer.input.focus();
}

function drawChat() {
  const messages = store.path(current),
    run = runs.get(current);
  views = new Map();
  for (const message of messages) views.set(message.id, new MessageView(current, message, actions, model.name));
  $("chat").replaceChildren(...[...views.values()].map(view => view.node));
  $("welcome").hidden = messages.length > 0;
  $("title").textContent = current.title;
  document.title = messages.length ? `${current.title} · ds4jax` : "ds4jax";
  composer.setBusy(Boolean(run));
  if (run) views.get(run.message.id)?.update(live(run));
  const end = messages.at(-1);
  if (!run && end?.tool_calls) askForResults(end);
  stick();
}

const offerTheEnd = () => ($("to-end").hidden = following || $("chat").hidden);
function stick() {
  if (following) main.scrollTop = main.scrollHeight;
  offerTheEnd();
}
main.addEventListener(
  "scroll",
  () => {
    following = main.scrollHeight - main.scrollTop - main.clientHeight < 60;
    offerTheEnd();
  },
  {passive: true},
);
$("to-end").onclick = () => {
  following = true;
  stick();
  composer.input.focus();
};

function showProblem() {
  const problem = problems.get(current);
  if (!problem) return composer.quiet();
  problems.delete(current);
  const {error, retry} = problem;
  if (error.status === 401) composer.askForKey(error.message, retry);
  else composer.say(error.message, retry);
}

// ---- for screen readers: new text, once a second at most ------------------------------------------------------------
let unheard = "",
  speaking = 0;
function announce(text) {
  unheard += text;
  if (speaking) return;
  speaking = setTimeout(() => {
    speaking = 0;
    $("live").textContent = unheard.slice(-500);
    unheard = "";
  }, 1000);
}

// ---- answers --------------------------------------------------------------------------------------------------------
function send(text) {
  const conversation = current,
    {draft, files} = conversation;
  const sent = store.add(conversation, conversation.leaf, {role: "user", content: text});
  if (!conversation.named && !sent.parent) conversation.title = (text.trim().split("\n")[0] || "New chat").slice(0, 60);
  Object.assign(conversation, {draft: "", files: []});
  composer.set("");
  following = true;
  list.add(conversation);
  if (!touch.matches) composer.input.focus();
  answer(conversation, null, error => {
    // the message goes back into the box, before what was typed there since
    store.take(conversation, sent);
    const later = conversation.draft;
    Object.assign(conversation, {
      draft: later ? `${draft}\n${later}` : draft,
      files: [...files, ...conversation.files],
    });
    if (conversation === current) composer.set(conversation.draft, conversation.files);
    return error && (() => composer.send());
  });
}

/**
 * Get an answer to the path of a conversation. resumed: an answer that is to go on, or null.
 * undo: called where nothing at all was said; takes the error (null: stopped), gives what Retry does.
 */
async function answer(conversation, resumed, undo) {
  const asked = store.path(conversation);
  const message = resumed ?? store.add(conversation, conversation.leaf, {role: "assistant", content: ""});
  const before = resumed ? {...resumed} : null;
  if (resumed) asked[asked.length - 1] = {...resumed, prefix: true};
  const run = {
    conversation,
    message,
    controller: new AbortController(),
    started: performance.now(),
    first: 0,
    pieces: 0,
    read: null,
    usage: null,
    finish: null,
    heard: false,
  };
  Object.assign(message, {cut: true, failed: false, note: "interrupted when the page was left"});
  runs.set(conversation, run);
  if (conversation === current) {
    problems.delete(conversation);
    composer.quiet();
    drawChat();
  }
  list.draw();
  let error = null;
  try {
    for await (const chunk of chunks(body(conversation.settings, asked), run.controller.signal)) {
      take(run, chunk);
      redraw(run);
      keep(conversation);
    }
  } catch (caught) {
    error = caught;
  }
  runs.delete(conversation);
  if (run.finish !== "tool_calls") delete message.tool_calls; // calls that did not come to their end
  const stopped = error?.name === "AbortError",
    silent = !run.pieces;
  if (error && silent) {
    if (resumed) Object.assign(message, before);
    else store.take(conversation, message);
    const retry = undo(stopped ? null : error);
    if (!stopped) problems.set(conversation, {error, retry});
  } else {
    Object.assign(message, {
      failed: Boolean(error) && !stopped,
      cut: Boolean(error) || run.finish === "length",
      note: error ? (stopped ? "stopped" : error.message) : await measured(run),
    });
    announce(stopped ? " Stopped." : error ? ` ${error.message}` : " The answer is complete.");
  }
  conversation.updated = Date.now();
  keep(conversation);
  store.flush();
  if (conversation === current) {
    if (error && silent) {
      drawChat();
      showProblem();
    } else {
      views.get(message.id)?.update();
      composer.setBusy(false);
      if (message.tool_calls) askForResults(message);
      stick();
    }
  }
  list.draw();
}

/** Write a conversation, unless it was deleted. */
function keep(conversation) {
  if (list.all.includes(conversation)) store.save(conversation);
}

/** Take what a chunk says into the message. */
function take(run, chunk) {
  const {message} = run,
    choice = chunk.choices[0];
  run.read = chunk.prompt_progress ?? run.read;
  run.usage = chunk.usage ?? run.usage;
  if (!choice) return;
  run.finish = choice.finish_reason ?? run.finish;
  const {reasoning_content, content, tool_calls} = choice.delta;
  if (!(reasoning_content || content || tool_calls)) return;
  const now = performance.now();
  run.first ||= now;
  run.pieces += 1;
  if (reasoning_content) {
    message.reasoning_content = (message.reasoning_content ?? "") + reasoning_content;
    message.thought = (now - run.first) / 1000;
    if (!run.heard) {
      run.heard = true;
      announce("Thinking.");
    }
  }
  if (content) {
    message.content += content;
    announce(content);
  }
  if (choice.logprobs?.content) (message.logprobs ??= []).push(...choice.logprobs.content);
  for (const part of tool_calls ?? []) {
    message.tool_calls ??= [];
    if (part.id) message.tool_calls[part.index] = {id: part.id, type: "function", function: {...part.function}};
    else message.tool_calls[part.index].function.arguments += part.function.arguments;
  }
}

const rate = (tokens, since) => {
  const seconds = (performance.now() - since) / 1000;
  return tokens > 1 && seconds > 0.2 ? `${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
};

/** The line about an answer that is being written. */
function live(run) {
  if (!run.first) {
    const {read} = run,
      seconds = (performance.now() - run.started) / 1000;
    if (read?.processed) return {text: `reading ${count(read.processed)} of ${count(read.total)} tokens`};
    return {text: seconds < 1 ? "…" : `waiting for the model, ${seconds.toFixed(0)} s`};
  }
  if (!run.message.content) run.message.thought = (performance.now() - run.first) / 1000;
  return {text: [rate(run.pieces, run.first), `${count(run.pieces)} tokens`].filter(Boolean).join(" · ")};
}

/** The line about an answer that is complete. */
async function measured({usage, first, started, finish}) {
  if (!usage) return "";
  const used = usage.prompt_tokens + usage.completion_tokens;
  const parts = [
    rate(usage.completion_tokens, first),
    `${count(usage.completion_tokens)} tokens`,
    `prompt ${count(usage.prompt_tokens)}, of it reused ${count(usage.prompt_tokens_details.cached_tokens)}`,
    first ? `first token after ${((first - started) / 1000).toFixed(2)} s` : "",
    model.context ? `${count(used)} of ${count(model.context)} tokens used` : "",
    finish === "length" ? "cut off by the limit" : "",
  ];
  if (drafting) {
    const found = await call("history?since=0&last=1")
      .then(response => response.json())
      .catch(() => null);
    const accepted = found?.samples.at(-1)?.accepted;
    if (Number.isFinite(accepted)) parts.push(`drafts accepted ${accepted.toFixed(0)} %`);
  }
  return parts.filter(Boolean).join(" · ");
}

// ---- drawing: once a frame at most, and never more than a fifth of the time -----------------------------------------
let scheduled = false,
  notBefore = 0;
function redraw(run) {
  run.changed = true;
  if (!scheduled) {
    scheduled = true;
    requestAnimationFrame(frame);
  }
}
function frame() {
  const began = performance.now();
  if (began < notBefore) return requestAnimationFrame(frame);
  scheduled = false;
  const run = runs.get(current);
  if (!run?.changed) return;
  run.changed = false;
  views.get(run.message.id)?.update(live(run));
  stick();
  const now = performance.now();
  notBefore = now + 4 * (now - began);
}
setInterval(() => {
  if (runs.has(current)) redraw(runs.get(current));
}, 500); // also where no text comes: the line counts seconds

// ---- what the buttons of messages do --------------------------------------------------------------------------------
const actions = {
  edit(view) {
    const conversation = current,
      {message} = view;
    view.edit(text => {
      if (!text.trim() || runs.has(conversation)) return;
      const shown = conversation.leaf;
      conversation.leaf = message.parent;
      const sent = store.add(conversation, message.parent, {role: "user", content: text});
      following = true;
      answer(conversation, null, error => {
        store.take(conversation, sent);
        conversation.leaf = shown;
        Object.assign(conversation, {draft: text, files: []});
        if (conversation === current) composer.set(text);
        return (
          error &&
          (() => {
            conversation.leaf = message.parent;
            composer.send();
          })
        );
      });
    });
  },
  regenerate(message) {
    const conversation = current,
      shown = conversation.leaf;
    if (runs.has(conversation)) return;
    conversation.leaf = message.parent;
    following = true;
    answer(conversation, null, error => {
      conversation.leaf = shown;
      return error && (() => actions.regenerate(message));
    });
  },
  resume(message) {
    const conversation = current;
    if (runs.has(conversation)) return;
    conversation.leaf = message.id;
    answer(conversation, message, error => error && (() => actions.resume(message)));
  },
  turn(message) {
    if (runs.has(current)) return;
    store.show(current, message);
    store.save(current);
    following = false;
    drawChat();
    views.get(message.id)?.node.scrollIntoView({block: "nearest"});
  },
};

function askForResults(message) {
  const conversation = current;
  views.get(message.id)?.askForResults(values => {
    const added = message.tool_calls.map((one, i) =>
      store.add(conversation, conversation.leaf, {
        role: "tool",
        tool_call_id: one.id,
        name: one.function.name,
        content: values[i],
      }),
    );
    answer(conversation, null, error => {
      for (const one of added.reverse()) store.take(conversation, one);
      return error && (() => drawChat());
    });
  });
}

// ---- the panels -----------------------------------------------------------------------------------------------------
function toggleSettings(on) {
  $("settings").hidden = !on;
  $("show-settings").ariaPressed = String(on);
}
function toggleStatus(on) {
  $("status").hidden = !on;
  $("chat").hidden = $("composer").hidden = on;
  $("welcome").hidden = on || Boolean(current?.leaf);
  $("show-status").ariaPressed = String(on);
  if (on) plots.show();
  stick();
}
function toggleList(on) {
  document.body.classList.toggle("list-open", on);
  $("show-list").ariaExpanded = String(on);
  if (on) $("search").focus();
}
$("show-settings").onclick = () => toggleSettings($("settings").hidden);
$("close-settings").onclick = () => {
  toggleSettings(false);
  $("show-settings").focus();
};
$("show-status").onclick = () => toggleStatus($("status").hidden);
$("show-list").onclick = () => toggleList(!document.body.classList.contains("list-open"));
$("shade").onclick = () => toggleList(false);
$("fresh").onclick = () => open(null);
document.addEventListener("keydown", event => {
  if (event.key !== "Escape" || event.isComposing) return;
  if (document.body.classList.contains("list-open")) toggleList(false);
  else if (runs.has(current)) runs.get(current).controller.abort();
  else if (!$("settings").hidden) toggleSettings(false);
});

// ---- start ----------------------------------------------------------------------------------------------------------
const composer = new Composer({
  send,
  stop: () => {
    runs.get(current)?.controller.abort();
    composer.input.focus();
  },
  changed(text, files) {
    Object.assign(current, {draft: text, files});
    if (!list.all.includes(current)) list.add(current);
    store.save(current);
  },
});
const settings = new Settings(values => {
  current.settings = values;
  keep(current);
});
const list = new List(await store.open(), {
  open,
  changed: () => {
    $("title").textContent = current.title;
  },
  removed(conversation) {
    runs.get(conversation)?.controller.abort();
    if (conversation === current) open(null);
  },
});
list.running = conversation => runs.has(conversation);
addEventListener("pagehide", () => store.flush());
$("welcome").firstElementChild.textContent = WELCOME;
open(list.all.find(one => one.id === localStorage.getItem("ds4jax-current")) ?? null);
if (!store.isKept()) toast("This browser keeps no conversations here; they last as long as the page.");

async function meet() {
  try {
    const found = (await (await call("v1/models")).json()).data[0];
    model = {name: found.id, context: found.context_length};
    $("model").textContent = `${model.name} · ${count(model.context)} tokens`;
    if (!runs.has(current)) drawChat();
    const {samples} = await (await call("history?since=0&last=1")).json();
    drafting = samples.some(one => "accepted" in one);
  } catch (error) {
    if (error.status === 401) composer.askForKey("This server wants an API key.", meet);
    else $("model").textContent = error.message;
  }
}
await meet();
