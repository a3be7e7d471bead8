// The server: requests, and answers as they come.

let key = sessionStorage.getItem("ds4jax-key") ?? ""; // until the tab is closed

export function setKey(value) {
  key = value;
  sessionStorage.setItem("ds4jax-key", value);
}
export const getKey = () => key;

/** What the server refused: status (0: there was no answer at all), and its own words as the message. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

/** Call the server; → its response. Throws Refused, or AbortError. */
export async function call(path, {body, signal} = {}) {
  const headers = {...(key && {authorization: `Bearer ${key}`}), ...(body && {"content-type": "application/json"})};
  let response;
  try {
    response = await fetch(path, {method: body ? "POST" : "GET", headers, signal, body: body && JSON.stringify(body)});
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server cannot be reached");
  }
  if (response.ok) return response;
  const text = await response.text().catch(() => "");
  let said = `status ${response.status}${response.statusText ? ` (${response.statusText})` : ""}`;
  try {
    said = JSON.parse(text).error.message;
  } catch {
    /* a proxy's page of HTML, perhaps */
  }
  throw new Refused(response.status, said);
}

/** The chunks of a streamed chat completion. Throws Refused where the stream ends before its last event. */
export async function* chunks(body, signal) {
  const response = await call("v1/chat/completions", {body, signal});
  const type = response.headers.get("content-type") ?? "";
  if (!type.startsWith("text/event-stream"))
    throw new Refused(response.status, `found ${type || "an answer without a type"}, expected a stream of events`);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const {value, done} = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.trimEnd() === "data: [DONE]") return;
        if (!line.startsWith("data: ")) continue;
        const chunk = JSON.parse(line.slice(6));
        if (chunk.error) throw new Refused(Number(chunk.error.status) || 500, chunk.error.message);
        yield chunk;
      }
    }
  } catch (error) {
    if (error.name === "AbortError" || error instanceof Refused) throw error;
    throw new Refused(0, "the connection broke before the answer was complete");
  } finally {
    reader.cancel().catch(() => {});
  }
  throw new Refused(0, "the stream ended before the answer was complete");
}
