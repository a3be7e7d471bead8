"""The tools of the tiny model's dialogues: schemas in several spellings, requests in many wordings, and results.

Some tools have names and parameters made up on the spot, so that reading the schema is worth more than knowing it.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Sequence
from typing import Any

from tiny_facts import CAPITALS

Values = Callable[[random.Random], Any]

NAMES = """Alice Bob Carol David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paula Quentin Rosa Sam Tina
Ursula Victor Wendy Xavier Yara Zoe Anna Ben Clara Daniel Elena Felix""".split()
NOUNS = """apple bread candle door engine flower garden hammer island jacket kettle ladder mirror needle orange pencil
quilt river spoon table umbrella violin window yarn zebra anchor basket camera dragon eagle feather guitar hat iron
jewel key lamp mountain notebook ocean piano queen rocket ship train vase wagon bottle cloud desk envelope fountain
glove house ink jar kite lion""".split()
PLACES = "kitchen bedroom bathroom office garage hallway cellar attic garden library".split()
LANGUAGES = "French German Italian Spanish Polish Swedish Dutch Greek Turkish Japanese Russian Portuguese".split()
CURRENCIES = "EUR USD GBP JPY CHF SEK NOK PLN INR CNY BRL CAD AUD".split()
VERBS = "start stop check update count print open close send copy move build test clean load save".split()
ADJECTIVES = "red blue green small big old new quiet bright dark soft cold warm long short round".split()
TASKS = """buy milk, call the dentist, water the plants, feed the cat, pay the rent, wash the car, write the report,
clean the kitchen, book a flight, return the books, fix the bike, bake a cake""".replace("\n", " ").split(", ")
PHRASES = """good morning, see you tomorrow, I will be late, happy birthday, thank you for the gift, where are you,
the meeting is at noon, dinner is ready, good luck, I am on my way, please call me back, the train has left""".replace(
    "\n", " "
).split(", ")  # fmt: skip


def _one_of(values: Sequence[str]) -> Values:
    return lambda rng: rng.choice(values)


def _number(low: int, high: int) -> Values:
    return lambda rng: rng.randint(low, high)


def _time(rng: random.Random) -> str:
    return f"{rng.randint(0, 23):02}:{rng.choice((0, 5, 10, 15, 20, 30, 40, 45, 50)):02}"


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2020, 2030)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _path(rng: random.Random) -> str:
    return f"{rng.choice(NOUNS)}s/{rng.choice(NOUNS)}.{rng.choice(('txt', 'md', 'py', 'csv', 'json'))}"


def _expression(rng: random.Random) -> str:
    return f"{rng.randint(2, 999)} {rng.choice('+-*/')} {rng.randint(2, 999)}"


def _title(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES).capitalize()} {rng.choice(NOUNS).capitalize()}"


def _symbol(rng: random.Random) -> str:
    return "".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=rng.randint(3, 4)))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of tool. names, and per parameter: spellings, JSON type, description, values. requests use {0}, {1}, ….

    result: what the tool may return, given the arguments; reply: what the assistant then says, of both.
    """

    names: tuple[str, ...]
    description: str
    parameters: tuple[tuple[tuple[str, ...], str, str, Values], ...]
    requests: tuple[str, ...]
    result: Callable[[random.Random, list], dict[str, Any]]
    reply: str


def _kind(names: str, description: str, parameters: list[tuple], requests: str, result, reply: str) -> Kind:
    spelled = tuple((tuple(spellings.split()), *rest) for spellings, *rest in parameters)
    lines = tuple(line.strip() for line in requests.strip().splitlines())
    return Kind(tuple(names.split()), description, spelled, lines, result, reply)


def _done(rng: random.Random, values: list) -> dict[str, Any]:
    return {"status": "ok"}


_CITY = ("city location place", "string", "Name of the city", _one_of(CAPITALS))

KINDS = (
    _kind(
        "get_weather weather current_weather", "Get the current weather in a city.", [_CITY],
        """What is the weather in {0}?
        How is the weather in {0} today?
        Is it raining in {0}?
        Tell me the weather in {0}.
        What's the weather like in {0} right now?
        I am going to {0}. How is the weather there?
        Check the weather in {0}, please.
        Do I need an umbrella in {0}?
        How warm is it in {0}?
        Weather in {0}?""",
        lambda rng, v: {"temperature": rng.randint(-10, 35), "sky": rng.choice(("sunny", "cloudy", "rainy", "clear"))},
        "In {0} it is {sky} and {temperature} degrees.",
    ),
    _kind(
        "get_time current_time local_time", "Get the local time in a city.", [_CITY],
        """What time is it in {0}?
        Tell me the time in {0}.
        What is the local time in {0}?
        How late is it in {0}?
        Which time is it now in {0}?
        I want to call someone in {0}. What time is it there?
        Time in {0}?""",
        lambda rng, v: {"time": _time(rng)}, "It is {time} in {0}.",
    ),
    _kind(
        "calculate calculator evaluate", "Evaluate an arithmetic expression.",
        [("expression formula", "string", "The expression", _expression)],
        """Calculate {0}.
        What is {0}? Use the calculator.
        Please compute {0} for me.
        I need the exact result of {0}.
        Evaluate {0}.
        Use the calculator: {0}
        How much is {0} exactly?""",
        lambda rng, v: {"result": rng.randint(2, 99999)}, "The result is {result}.",
    ),
    _kind(
        "add sum_numbers add_numbers", "Add two numbers.",
        [("a first x", "integer", "The first number", _number(1, 9999)),
         ("b second y", "integer", "The second number", _number(1, 9999))],
        """Add {0} and {1}.
        What is the sum of {0} and {1}?
        Add up {0} and {1}, please.
        Use the tool to add {0} to {1}.
        Please add the numbers {0} and {1}.""",
        lambda rng, v: {"sum": v[0] + v[1]}, "The sum is {sum}.",
    ),
    _kind(
        "convert_currency exchange", "Convert an amount of money from one currency to another.",
        [("amount value", "integer", "The amount", _number(1, 999)),
         ("from source from_currency", "string", "Code of the currency to convert", _one_of(CURRENCIES)),
         ("to target to_currency", "string", "Code of the wanted currency", _one_of(CURRENCIES))],
        """Convert {0} {1} to {2}.
        How much is {0} {1} in {2}?
        What are {0} {1} worth in {2}?
        Change {0} {1} into {2}.
        I have {0} {1}. How much is that in {2}?""",
        lambda rng, v: {"converted": rng.randint(1, 9999)}, "{0} {1} are {converted} {2}.",
    ),
    _kind(
        "set_timer start_timer timer", "Start a timer.",
        [("minutes duration", "integer", "Length in minutes", _number(1, 180))],
        """Set a timer for {0} minutes.
        Start a timer of {0} minutes.
        Remind me in {0} minutes.
        I need a timer for {0} minutes.
        Timer, {0} minutes, please.
        Wake me up in {0} minutes.""",
        _done, "The timer is set for {0} minutes.",
    ),
    _kind(
        "set_alarm alarm create_alarm", "Set an alarm clock.", [("time at", "string", "Time as HH:MM", _time)],
        """Set an alarm for {0}.
        Wake me up at {0}.
        I have to get up at {0}. Set an alarm.
        Please set the alarm to {0}.
        Alarm at {0}, please.""",
        _done, "The alarm is set for {0}.",
    ),
    _kind(
        "send_message message text_message", "Send a text message to a person.",
        [("to recipient person", "string", "Who gets the message", _one_of(NAMES)),
         ("text message body", "string", "The message", _one_of(PHRASES))],
        """Send {0} the message "{1}".
        Write to {0}: {1}
        Tell {0} "{1}".
        Text {0} this: {1}
        Send a message to {0} that says "{1}".
        Let {0} know: {1}""",
        _done, "I have sent the message to {0}.",
    ),
    _kind(
        "translate translate_text", "Translate a text into another language.",
        [("text phrase", "string", "The text", _one_of(PHRASES)),
         ("language target_language to", "string", "The language", _one_of(LANGUAGES))],
        """Translate "{0}" into {1}.
        How do you say "{0}" in {1}?
        What is "{0}" in {1}?
        Please translate "{0}" to {1}.
        I need "{0}" in {1}.""",
        lambda rng, v: {"translation": " ".join(rng.sample(NOUNS, 3))}, 'In {1} that is "{translation}".',
    ),
    _kind(
        "play_song play_music", "Play a song.",
        [("title song", "string", "Title of the song", _title),
         ("artist singer", "string", "The artist", _one_of(NAMES))],
        """Play {0} by {1}.
        I want to hear {0} by {1}.
        Put on {0} by {1}, please.
        Can you play the song {0} by {1}?
        Start the song {0} of {1}.""",
        _done, "Now playing {0} by {1}.",
    ),
    _kind(
        "create_event add_event schedule", "Put an event into the calendar.",
        [("title name", "string", "Title of the event", _one_of(TASKS)),
         ("date day", "string", "Date as YYYY-MM-DD", _date)],
        """Put "{0}" into my calendar on {1}.
        Add "{0}" to the calendar for {1}.
        Schedule "{0}" for {1}.
        On {1} I have to {0}. Put it into the calendar.
        Create an event "{0}" on {1}.""",
        _done, 'I have put "{0}" into the calendar on {1}.',
    ),
    _kind(
        "get_stock_price stock_price quote", "Get the price of a share.",
        [("symbol ticker", "string", "Symbol of the share", _symbol)],
        """What is the price of {0}?
        How much is one share of {0}?
        Get me the stock price of {0}.
        What does {0} cost at the exchange?
        How is {0} doing today?""",
        lambda rng, v: {"price": rng.randint(1, 999)}, "One share of {0} costs {price}.",
    ),
    _kind(
        "define_word dictionary lookup", "Look a word up in the dictionary.",
        [("word term", "string", "The word", _one_of(NOUNS))],
        """Look up the word {0}.
        What does the word {0} mean?
        Define {0}.
        Look {0} up in the dictionary.
        Give me the definition of {0}.""",
        lambda rng, v: {"definition": f"a {rng.choice(ADJECTIVES)} thing"}, "The dictionary says: {definition}.",
    ),
    _kind(
        "roll_dice throw_dice", "Roll some dice.",
        [("count number", "integer", "How many dice", _number(1, 9)),
         ("sides faces", "integer", "Sides of each", _number(4, 20))],
        """Roll {0} dice with {1} sides.
        Throw {0} dice of {1} sides each.
        I need {0} dice with {1} sides.
        Roll {0} times a die with {1} sides.""",
        lambda rng, v: {"total": rng.randint(v[0], v[0] * v[1])}, "The dice show {total} in all.",
    ),
    _kind(
        "read_file open_file cat", "Read a file.", [("path file filename", "string", "Path of the file", _path)],
        """Read {0}.
        Show me the file {0}.
        What is in {0}?
        Open the file {0}.
        Print the contents of {0}.
        What does {0} say?""",
        lambda rng, v: {"content": rng.choice(PHRASES)}, 'The file {0} says "{content}".',
    ),
    _kind(
        "delete_file remove_file rm", "Delete a file.", [("path file filename", "string", "Path of the file", _path)],
        """Delete {0}.
        Remove the file {0}.
        I do not need {0} any more. Delete it.
        Get rid of {0}.
        Please delete the file {0}.""",
        _done, "I have deleted {0}.",
    ),
    _kind(
        "search_web web_search search", "Search the web.",
        [("query q", "string", "What to search for", lambda rng: f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}s")],
        """Search the web for {0}.
        Look for {0} on the web.
        Find pages about {0}.
        I want to read about {0}. Search for it.
        Search for {0}.""",
        lambda rng, v: {"pages": rng.randint(1, 999)}, "I found {pages} pages about {0}.",
    ),
    _kind(
        "set_light switch_light light", "Switch the light of a room.",
        [("room where", "string", "The room", _one_of(PLACES)),
         ("on state", "boolean", "Whether the light is on", None)],
        """Turn {1} the light in the {0}.
        Switch the light in the {0} {1}.
        Light {1} in the {0}, please.
        Turn the {0} light {1}.""",
        _done, "The light in the {0} is {1}.",
    ),
    _kind(
        "set_temperature heating thermostat", "Set the temperature of a room.",
        [("room where", "string", "The room", _one_of(PLACES)),
         ("degrees temperature", "integer", "Degrees", _number(10, 30))],
        """Set the temperature in the {0} to {1} degrees.
        Make it {1} degrees in the {0}.
        Heat the {0} to {1} degrees.
        I want {1} degrees in the {0}.""",
        _done, "The {0} is set to {1} degrees.",
    ),
    _kind(
        "book_table reserve_table", "Book a table in a restaurant.",
        [("restaurant name", "string", "The restaurant", _title),
         ("people guests", "integer", "How many", _number(2, 12)),
         ("time at", "string", "Time as HH:MM", _time)],
        """Book a table at {0} for {1} people at {2}.
        Reserve a table for {1} at {0} at {2}.
        We are {1} people and want to eat at {0} at {2}. Book a table.
        I need a table for {1} at {2} in the restaurant {0}.""",
        _done, "A table for {1} is booked at {0} at {2}.",
    ),
    _kind(
        "order_item order buy", "Order something from the shop.",
        [("item product", "string", "What to order", _one_of(NOUNS)),
         ("quantity count", "integer", "How many", _number(1, 99))],
        """Order {1} of the item {0}.
        Buy {1} of {0}.
        I need {0}, {1} pieces. Order them.
        Please order the {0}, quantity {1}.""",
        lambda rng, v: {"order": rng.randint(100, 9999)}, "The order number is {order}.",
    ),
    _kind(
        "get_distance distance route", "Get the distance between two cities.",
        [("from origin start", "string", "Where to start", _one_of(CAPITALS)),
         ("to destination end", "string", "Where to go", _one_of(CAPITALS))],
        """How far is it from {0} to {1}?
        What is the distance from {0} to {1}?
        How many kilometres are there between {0} and {1}?
        I travel from {0} to {1}. How far is that?""",
        lambda rng, v: {"kilometres": rng.randint(50, 15000)}, "It is {kilometres} kilometres from {0} to {1}.",
    ),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tool:
    """One declared tool: its schema, as Chat Completions has it, and how to ask for it."""

    schema: dict[str, Any]
    kind: Kind

    @property
    def name(self) -> str:
        return self.schema["function"]["name"]

    def request(self, rng: random.Random) -> tuple[str, list, dict[str, Any]]:
        """A user's request, the values in it, and the arguments of the call that it asks for."""
        values = [v(rng) if v else rng.random() < 0.5 for *_, v in self.kind.parameters]
        text = rng.choice(self.kind.requests).format(*map(_shown, values))
        return text, values, dict(zip(self.schema["function"]["parameters"]["properties"], values, strict=True))


def _shown(value: Any) -> str:
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)


def declare(rng: random.Random, kind: Kind) -> Tool:
    """A kind of tool in one of its spellings."""
    properties = {
        rng.choice(spellings): {"type": type_, "description": text} for spellings, type_, text, _ in kind.parameters
    }
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    function = {"name": rng.choice(kind.names), "description": kind.description, "parameters": parameters}
    return Tool({"type": "function", "function": function}, kind)


def invented(rng: random.Random) -> Kind:
    """A kind that exists only here: its name and parameters have to be read from the schema."""
    verb, noun = rng.choice(VERBS), rng.choice(NOUNS)
    name = rng.choice((f"{verb}_{noun}", f"{noun}_{verb}", f"{verb}_{rng.choice(ADJECTIVES)}_{noun}"))
    parameters = []
    for word in rng.sample(NOUNS, rng.randint(1, 2)):
        number = rng.random() < 0.4
        values = _number(0, 999) if number else _one_of(NOUNS + NAMES)
        parameters.append(((word,), "integer" if number else "string", f"The {word}", values))
    words = [spellings[0] for spellings, *_ in parameters]
    several = " and ".join(f"{word} {{{i}}}" for i, word in enumerate(words))
    equal = ", ".join(f"{word} = {{{i}}}" for i, word in enumerate(words))
    requests = (
        f"{verb.capitalize()} the {noun} with {several}.",
        f"Use {name} with {several}.",
        f"Call {name}: {equal}",
        f"Please {verb} the {noun} with {several}.",
        f"I want you to {verb} the {noun}: {equal}.",
        f"Run {name} with {equal}.",
    )
    return Kind(
        (name,), f"{verb.capitalize()} the {noun}.", tuple(parameters), requests, _done, f"I did {verb} the {noun}."
    )


def toolbox(rng: random.Random, n: int) -> list[Tool]:
    """n different tools."""
    kinds = rng.sample(KINDS, n)
    tools = [declare(rng, invented(rng) if rng.random() < 0.3 else kind) for kind in kinds]
    return tools if len({tool.name for tool in tools}) == n else toolbox(rng, n)


def call(id: str, tool: Tool, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool call as messages have it."""
    return {"id": id, "type": "function", "function": {"name": tool.name, "arguments": json.dumps(arguments)}}


def reply(tool: Tool, values: list, result: dict[str, Any]) -> str:
    """What the assistant says of a result."""
    return tool.kind.reply.format(*map(_shown, values), **result)
