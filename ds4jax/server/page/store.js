// Conversations, in the browser's IndexedDB. A conversation is a tree of messages, of which one path is shown.
//
//   {id, title, named, created, updated, settings, draft, files, messages: {id: message}, leaf}
//
// A message is {id, parent, role, content}. An answer may also have reasoning_content, thought (its seconds),
// tool_calls, logprobs, note (the line below it), cut (it did not come to its end) and failed; the result of a tool has
// tool_call_id and name. `leaf` is the id of the last message of the path that is shown. Where the browser keeps
// nothing, conversations last as long as the page.

const NAME = "ds4jax",
  STORE = "conversations";
let database = null; // null: nothing is kept
const waiting = new Map(); // conversations that are to be written, by id

const promised = request =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
const store = mode => database.transaction(STORE, mode).objectStore(STORE);
export const newId = () =>
  crypto.randomUUID?.() ??
  Array.from(crypto.getRandomValues(new Uint32Array(4)), n => n.toString(16).padStart(8, "0")).join("");

/** Open the store; → all conversations, the newest first. */
export async function open() {
  try {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(STORE, {keyPath: "id"});
    database = await promised(request);
    const all = await promised(store("readonly").getAll());
    return all.sort((a, b) => b.updated - a.updated);
  } catch {
    database = null;
    return [];
  }
}

export const isKept = () => database !== null;

export const newConversation = settings => ({
  id: newId(),
  title: "New chat",
  named: false,
  created: Date.now(),
  updated: Date.now(),
  settings,
  draft: "",
  files: [],
  messages: {},
  leaf: null,
});

/** Write a conversation soon; an empty one is deleted. */
export function save(conversation) {
  if (!waiting.size) setTimeout(flush, 300);
  waiting.set(conversation.id, conversation);
}

/** Write what waits to be written. */
export async function flush() {
  const all = [...waiting.values()];
  waiting.clear();
  if (database)
    for (const one of all) {
      const holds = one.leaf || one.draft || one.files.length,
        into = store("readwrite");
      await promised(holds ? into.put(one) : into.delete(one.id)).catch(() => {});
    }
}

export async function remove(conversation) {
  waiting.delete(conversation.id);
  if (database) await promised(store("readwrite").delete(conversation.id));
}

// ---- the tree -------------------------------------------------------------------------------------------------------

/** The messages of the path that is shown, from the first one on. */
export function path(conversation) {
  const found = [],
    {messages, leaf} = conversation;
  for (let message = messages[leaf]; message; message = messages[message.parent])
    found.push(message);
  return found.reverse();
}

/** Append a message after another one (null: as the first), and show the path to it. */
export function add(conversation, parent, message) {
  const added = {id: newId(), parent, ...message};
  conversation.messages[added.id] = added;
  conversation.leaf = added.id;
  conversation.updated = Date.now();
  return added;
}

/** Take out a message, which nothing follows; the path then ends before it. */
export function take(conversation, message) {
  delete conversation.messages[message.id];
  conversation.leaf = message.parent;
}

/** The messages that follow the same one, in the order in which they came. */
export const siblings = (conversation, message) =>
  Object.values(conversation.messages).filter(other => other.parent === message.parent);

/** Show the path through a message, along the newest ones that follow it. */
export function show(conversation, message) {
  for (let next = message; next;) {
    conversation.leaf = next.id;
    next = Object.values(conversation.messages)
      .filter(other => other.parent === conversation.leaf)
      .at(-1);
  }
}

// ---- out and in -----------------------------------------------------------------------------------------------------

export const asJson = conversations => JSON.stringify({format: "ds4jax conversations", conversations}, null, 1);

/** The path that is shown, as a document. */
export function asMarkdown(conversation) {
  const parts = [`# ${conversation.title}`];
  if (conversation.settings.system) parts.push(`> ${conversation.settings.system.replaceAll("\n", "\n> ")}`);
  for (const message of path(conversation)) {
    parts.push(`## ${{user: "You", assistant: "Answer", tool: "Result of a tool"}[message.role]}`);
    if (message.content) parts.push(message.content);
    for (const call of message.tool_calls ?? [])
      parts.push(`\`\`\`json\n${JSON.stringify(call.function, null, 1)}\n\`\`\``);
  }
  return parts.join("\n\n") + "\n";
}

/** The conversations of a file that `asJson` wrote. Throws an Error for another. */
export function fromJson(text) {
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error("found no JSON, expected exported conversations");
  }
  const isText = x => typeof x === "string",
    isRecord = x => x !== null && typeof x === "object" && !Array.isArray(x);
  const found = Array.isArray(value?.conversations) ? value.conversations : null;
  if (!found) throw new Error("found other JSON, expected exported conversations");
  return found.map((one, i) => {
    const wrong = what => new Error(`conversation ${i + 1}: found ${what}, expected an exported one`);
    if (!isRecord(one) || !isRecord(one.messages)) throw wrong("no messages");
    const messages = {};
    for (const [id, message] of Object.entries(one.messages)) {
      if (!isRecord(message) || !["user", "assistant", "tool"].includes(message.role)) throw wrong("another role");
      if (!isText(message.content ?? "")) throw wrong("a message without text");
      messages[id] = {...message, id, content: message.content ?? ""};
    }
    for (const start of Object.values(messages)) {
      // every chain of parents has to end at a first message
      let steps = 0;
      for (let at = start; at.parent !== null; at = messages[at.parent])
        if (!messages[at.parent] || ++steps > 100_000) throw wrong("a message after none");
    }
    const leaf = messages[one.leaf] ? one.leaf : (Object.keys(messages).at(-1) ?? null);
    const settings = isRecord(one.settings) ? one.settings : {};
    return {
      ...newConversation(settings),
      title: isText(one.title) ? one.title : "Imported",
      named: true,
      messages,
      leaf,
    };
  });
}
