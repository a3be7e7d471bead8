// How answers are asked for: kept with each conversation, and taken over by the next one.

import {$} from "./dom.js";
import {getKey, setKey} from "./stream.js";

const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];
const DEFAULTS = {
  effort: "high",
  temperature: "1",
  top_p: "1",
  top_k: "",
  min_p: "",
  max_tokens: "",
  seed: "",
  system: "",
  tools: "",
  logprobs: false,
};

/** The settings of the last conversation, for a new one. */
export function last() {
  try {
    return known(JSON.parse(localStorage.getItem("ds4jax") ?? "{}"));
  } catch {
    return known({});
  }
}

/** Values of all settings: the default where none of its type is given. */
const known = values =>
  Object.fromEntries(
    Object.entries(DEFAULTS).map(([name, usual]) => {
      const given = values?.[name];
      return [name, typeof given === typeof usual ? given : usual];
    }),
  );

export class Settings {
  /** changed: is called with all values when one is changed. */
  constructor(changed) {
    const form = $("settings");
    this.fields = form.elements;
    form.onsubmit = event => event.preventDefault();
    form.oninput = event => {
      if (event.target.name === "key") return setKey(event.target.value.trim());
      const values = this.values;
      localStorage.setItem("ds4jax", JSON.stringify(values));
      this.check(values);
      changed(values);
    };
  }

  get values() {
    return Object.fromEntries(
      Object.keys(DEFAULTS).map(name => {
        const field = this.fields[name];
        return [name, field.type === "checkbox" ? field.checked : field.value];
      }),
    );
  }

  set(values) {
    for (const [name, value] of Object.entries(known(values)))
      this.fields[name][this.fields[name].type === "checkbox" ? "checked" : "value"] = value;
    this.fields.key.value = getKey();
    this.check(known(values));
  }

  check(values) {
    let problem = "";
    try {
      toolsOf(values);
    } catch (error) {
      problem = error.message;
    }
    this.fields.tools.setAttribute("aria-invalid", String(Boolean(problem)));
    $("tools-problem").textContent = problem;
  }
}

function toolsOf({tools}) {
  if (!tools.trim()) return undefined;
  let value;
  try {
    value = JSON.parse(tools);
  } catch (error) {
    throw new Error(`tools: ${error.message}`);
  }
  if (!Array.isArray(value)) throw new Error("tools: found no list, expected one as for Chat Completions");
  return value;
}

/** The body of a request. messages: of the path. Throws an Error for settings that cannot be read. */
export function body(settings, messages) {
  const values = known(settings),
    {system, effort, logprobs} = values;
  const numbers = NUMBERS.filter(name => values[name] !== "").map(name => [name, Number(values[name])]);
  const sent = messages.map(({role, content, reasoning_content, tool_calls, tool_call_id, prefix}) => ({
    role,
    content,
    reasoning_content,
    tool_calls,
    tool_call_id,
    prefix,
  }));
  return {
    messages: [...(system ? [{role: "system", content: system}] : []), ...sent],
    stream: true,
    stream_options: {include_usage: true},
    return_progress: true,
    reasoning_effort: effort,
    ...Object.fromEntries(numbers),
    tools: toolsOf(values),
    ...(logprobs && {logprobs: true, top_logprobs: 5}),
  };
}
