"""The small world of the tiny model: facts, and the many wordings in which one can ask for them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Fact:
    """questions: wordings. thought: what to think first. answer: a sentence. short: what it must contain."""

    questions: tuple[str, ...]
    thought: str
    answer: str
    short: str


def _fill(rows, short: str, answer: str, questions: str, thought: str | None = None) -> Iterator[Fact]:
    """One fact per row {field: text}; questions: one wording a line."""
    for row in rows:
        wordings = tuple(_capital(line.strip().format(**row)) for line in questions.strip().splitlines())
        thinks, says = (_capital(text.format(**row)) for text in (thought or answer, answer))
        yield Fact(wordings, thinks, says, row[short])


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _rows(fields: str, table: str) -> list[dict[str, str]]:
    """ "a b", "1 2, 3 4" → [{a: 1, b: 2}, {a: 3, b: 4}]; values are separated by spaces, `_` is a space in a value."""
    names = fields.split()
    rows = [[value.replace("_", " ") for value in row.split()] for row in table.split(",")]
    return [dict(zip(names, row, strict=True)) for row in rows]


COUNTRIES = _rows(
    "country capital continent",
    """France Paris Europe, Germany Berlin Europe, Italy Rome Europe, Spain Madrid Europe, Portugal Lisbon Europe,
    Austria Vienna Europe, Belgium Brussels Europe, the_Netherlands Amsterdam Europe, Denmark Copenhagen Europe,
    Sweden Stockholm Europe, Norway Oslo Europe, Finland Helsinki Europe, Iceland Reykjavik Europe,
    Ireland Dublin Europe,
    the_United_Kingdom London Europe, Poland Warsaw Europe, Czechia Prague Europe, Slovakia Bratislava Europe,
    Hungary Budapest Europe, Romania Bucharest Europe, Bulgaria Sofia Europe, Greece Athens Europe,
    Croatia Zagreb Europe, Serbia Belgrade Europe, Slovenia Ljubljana Europe, Albania Tirana Europe,
    Estonia Tallinn Europe, Latvia Riga Europe, Lithuania Vilnius Europe, Ukraine Kyiv Europe, Switzerland Bern Europe,
    Luxembourg Luxembourg Europe, Malta Valletta Europe, Cyprus Nicosia Europe, Moldova Chisinau Europe,
    Russia Moscow Europe, Turkey Ankara Asia, Japan Tokyo Asia, China Beijing Asia, India New_Delhi Asia,
    Pakistan Islamabad Asia, Bangladesh Dhaka Asia, Nepal Kathmandu Asia, Thailand Bangkok Asia, Vietnam Hanoi Asia,
    Indonesia Jakarta Asia, Malaysia Kuala_Lumpur Asia, the_Philippines Manila Asia, South_Korea Seoul Asia,
    North_Korea Pyongyang Asia, Mongolia Ulaanbaatar Asia, Iran Tehran Asia, Iraq Baghdad Asia, Syria Damascus Asia,
    Lebanon Beirut Asia, Jordan Amman Asia, Saudi_Arabia Riyadh Asia, Qatar Doha Asia, Oman Muscat Asia,
    Yemen Sanaa Asia,
    Kuwait Kuwait_City Asia, Afghanistan Kabul Asia, Uzbekistan Tashkent Asia, Kazakhstan Astana Asia,
    Georgia Tbilisi Asia, Armenia Yerevan Asia, Azerbaijan Baku Asia, Cambodia Phnom_Penh Asia, Laos Vientiane Asia,
    Bhutan Thimphu Asia, Egypt Cairo Africa, Morocco Rabat Africa, Algeria Algiers Africa, Tunisia Tunis Africa,
    Libya Tripoli Africa, Sudan Khartoum Africa, Ethiopia Addis_Ababa Africa, Kenya Nairobi Africa,
    Uganda Kampala Africa,
    Tanzania Dodoma Africa, Rwanda Kigali Africa, Nigeria Abuja Africa, Ghana Accra Africa, Senegal Dakar Africa,
    Mali Bamako Africa, Zambia Lusaka Africa, Zimbabwe Harare Africa, Angola Luanda Africa, Mozambique Maputo Africa,
    Namibia Windhoek Africa, Botswana Gaborone Africa, Madagascar Antananarivo Africa, Somalia Mogadishu Africa,
    Cameroon Yaounde Africa, the_United_States Washington North_America, Canada Ottawa North_America,
    Mexico Mexico_City North_America, Cuba Havana North_America, Jamaica Kingston North_America,
    Panama Panama_City North_America, Guatemala Guatemala_City North_America, Honduras Tegucigalpa North_America,
    Nicaragua Managua North_America, Costa_Rica San_Jose North_America, Haiti Port-au-Prince North_America,
    Brazil Brasilia South_America, Argentina Buenos_Aires South_America, Chile Santiago South_America,
    Peru Lima South_America, Colombia Bogota South_America, Venezuela Caracas South_America,
    Ecuador Quito South_America,
    Bolivia Sucre South_America, Uruguay Montevideo South_America, Paraguay Asuncion South_America,
    Australia Canberra Oceania, New_Zealand Wellington Oceania, Fiji Suva Oceania""",
)
CAPITALS = [row["capital"] for row in COUNTRIES]

MONEY = _rows(
    "country currency",
    """Japan yen, China yuan, India rupee, Russia ruble, the_United_Kingdom pound, the_United_States dollar,
    Mexico peso,
    Brazil real, Switzerland franc, Sweden krona, Norway krone, Poland zloty, Hungary forint, Turkey lira,
    South_Korea won, Thailand baht, Vietnam dong, Israel shekel, South_Africa rand, France euro, Germany euro,
    Italy euro""",
)
SPEECH = _rows(
    "country language",
    """France French, Germany German, Italy Italian, Spain Spanish, Portugal Portuguese, Brazil Portuguese,
    Japan Japanese,
    China Chinese, Russia Russian, Poland Polish, Sweden Swedish, Norway Norwegian, Denmark Danish, Finland Finnish,
    Greece Greek, Turkey Turkish, Hungary Hungarian, Thailand Thai, Vietnam Vietnamese, Egypt Arabic, Mexico Spanish,
    Argentina Spanish, Austria German, Iceland Icelandic, South_Korea Korean, the_Netherlands Dutch""",
)
COLOURS = _rows(
    "thing colour",
    """the_sky_on_a_clear_day blue, grass green, snow white, coal black, a_ripe_banana yellow, blood red, milk white,
    a_ripe_tomato red, a_carrot orange, the_sun yellow, chocolate brown, a_flamingo pink, a_cucumber green,
    an_elephant gray, a_raven black, a_lemon yellow, a_fire_engine red, a_strawberry red, a_pumpkin orange,
    a_leaf_in_spring green, a_polar_bear white, a_frog green, lavender purple, a_crow black, gold yellow, a_rose red""",
)
MIXES = _rows(
    "a b colour",
    "red blue purple, red yellow orange, blue yellow green, red white pink, black white gray, blue white light_blue",
)
OPPOSITES = _rows(
    "a b",
    """hot cold, big small, tall short, fast slow, old young, happy sad, light dark, day night, up down, left right,
    open closed, full empty, hard soft, rich poor, strong weak, wet dry, early late, high low, near far, thick thin,
    clean dirty, loud quiet, good bad, true false, right wrong, first last, inside outside, above below, before after,
    begin end, buy sell, push pull, win lose, love hate, laugh cry, come go, give take, remember forget, sharp blunt,
    wide narrow, deep shallow, heavy light, cheap expensive, safe dangerous, easy difficult, brave cowardly,
    north south,
    east west, black white, summer winter, always never, everything nothing, friend enemy, question answer""",
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth".split()
WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()  # noqa: E501
ANIMALS = _rows(
    "animal young sound legs",
    """dog puppy barks four, cat kitten meows four, cow calf moos four, horse foal neighs four, sheep lamb bleats four,
    pig piglet grunts four, duck duckling quacks two, lion cub roars four, hen chick clucks two,
    frog tadpole croaks four,
    goat kid bleats four, owl owlet hoots two, wolf pup howls four, goose gosling honks two""",
)
ELEMENTS = _rows(
    "element symbol",
    """gold Au, silver Ag, iron Fe, copper Cu, oxygen O, hydrogen H, carbon C, nitrogen N, helium He, sodium Na,
    potassium K, lead Pb, tin Sn, zinc Zn, mercury Hg, calcium Ca, sulfur S, neon Ne, silicon Si, uranium U""",
)
PLURALS = _rows(
    "one many",
    """mouse mice, child children, foot feet, tooth teeth, man men, woman women, goose geese, person people,
    leaf leaves,
    wolf wolves, knife knives, box boxes, city cities, baby babies, bus buses, ox oxen, fish fish, sheep sheep,
    house houses,
    tree trees, potato potatoes, life lives, shelf shelves, half halves""",
)
PASTS = _rows(
    "verb past",
    """go went, see saw, eat ate, run ran, take took, give gave, come came, write wrote, speak spoke, drink drank,
    sing sang, swim swam, buy bought, bring brought, think thought, teach taught, catch caught, find found, make made,
    know knew, grow grew, fly flew, fall fell, sleep slept, keep kept, lose lost, win won, begin began, break broke""",
)
COMPARATIVES = _rows(
    "word more",
    """good better, bad worse, big bigger, small smaller, fast faster, old older, happy happier, easy easier,
    far farther, hot hotter""",
)
UNITS = _rows(
    "part whole n",
    """minutes an_hour 60, seconds a_minute 60, hours a_day 24, days a_week 7, months a_year 12,
    centimetres a_metre 100,
    metres a_kilometre 1000, grams a_kilogram 1000, years a_century 100, years a_decade 10, millimetres a_centimetre 10,
    weeks a_year 52, bits a_byte 8, letters the_English_alphabet 26, players a_football_team 11, strings a_violin 4,
    legs a_spider 8, legs an_insect 6, sides a_triangle 3, sides a_square 4, sides a_hexagon 6, sides a_pentagon 5,
    sides an_octagon 8, wheels a_bicycle 2, wheels a_car 4, items a_dozen 12""",
)
PLANETS = "Mercury Venus Earth Mars Jupiter Saturn Uranus Neptune".split()
SENSES = _rows(
    "verb organ", "see eyes, hear ears, smell nose, taste tongue, walk legs, write hands, bite teeth, breathe lungs"
)
PYTHON = _rows(
    "what name",
    """keyword_defines_a_function def, keyword_defines_a_class class, keyword_starts_a_loop_over_a_sequence for,
    keyword_imports_a_module import, keyword_returns_a_value_from_a_function return, keyword_leaves_a_loop_early break,
    keyword_raises_an_exception raise, keyword_catches_an_exception except, keyword_makes_a_generator yield,
    keyword_makes_an_anonymous_function lambda, function_gives_the_length_of_a_list len,
    function_prints_a_line print, function_opens_a_file open, function_sorts_a_list_into_a_new_one sorted,
    function_adds_up_a_list_of_numbers sum, function_gives_the_largest_item max, function_gives_the_smallest_item min,
    method_adds_an_item_to_the_end_of_a_list append, value_means_that_there_is_nothing None""",
)


def facts() -> list[Fact]:
    """Everything there is to know, always in the same order."""
    once = [row for row in OPPOSITES if not {"right", "light", "black"} & set(row.values())]  # have two opposites
    reverse = [{"a": row["b"], "b": row["a"]} for row in once]
    out = [
        *_fill(
            COUNTRIES, "capital", "The capital of {country} is {capital}.",
            """What is the capital of {country}?
            What's the capital of {country}?
            Which city is the capital of {country}?
            Name the capital of {country}.
            Tell me the capital of {country}.
            What is the capital city of {country}?
            What is the name of the capital of {country}?
            Can you tell me the capital of {country}?
            {country}: what is its capital?
            Which city is {country}'s capital?
            Do you know the capital of {country}?
            I would like to know the capital of {country}.
            Give me the capital city of {country}.
            The capital of {country} is which city?
            Capital of {country}?""",
        ),
        *_fill(
            [row for row in COUNTRIES if row["capital"] != row["country"]], "country",
            "{capital} is the capital of {country}.",
            """Which country has {capital} as its capital?
            {capital} is the capital of which country?
            What country is {capital} the capital of?
            Of which country is {capital} the capital?
            Whose capital is {capital}?
            In which country is {capital}?
            Where is {capital}?
            Name the country whose capital is {capital}.
            Tell me which country {capital} belongs to.""",
        ),
        *_fill(
            COUNTRIES, "continent", "{country} is in {continent}.",
            """On which continent is {country}?
            Which continent is {country} in?
            Where in the world is {country}?
            What continent does {country} belong to?
            Name the continent of {country}.
            Tell me the continent of {country}.
            To which continent does {country} belong?""",
        ),
        *_fill(
            MONEY, "currency", "The currency of {country} is the {currency}.",
            """What is the currency of {country}?
            Which currency does {country} use?
            What money is used in {country}?
            How do people pay in {country}?
            Name the currency of {country}.
            What do you pay with in {country}?
            Which money do they have in {country}?""",
        ),
        *_fill(
            SPEECH, "language", "People in {country} speak {language}.",
            """Which language is spoken in {country}?
            What language do people speak in {country}?
            What is the language of {country}?
            What do they speak in {country}?
            Name the main language of {country}.
            Tell me the language of {country}.""",
        ),
        *_fill(
            COLOURS, "colour", "The colour of {thing} is {colour}.",
            """What colour is {thing}?
            What color is {thing}?
            Which colour does {thing} have?
            What is the colour of {thing}?
            What is the color of {thing}?
            Name the colour of {thing}.
            Tell me the colour of {thing}.""",
        ),
        *_fill(
            [*MIXES, *({"a": r["b"], "b": r["a"], "colour": r["colour"]} for r in MIXES)], "colour",
            "{a} and {b} make {colour}.",
            """What colour do {a} and {b} make?
            What do you get when you mix {a} and {b}?
            Which colour is a mixture of {a} and {b}?
            If I mix {a} with {b}, what colour do I get?
            What color is {a} plus {b}?
            Mix {a} and {b}. What is the result?""",
        ),
        *_fill(
            OPPOSITES + reverse, "b", 'The opposite of "{a}" is "{b}".',
            """What is the opposite of {a}?
            What's the opposite of {a}?
            Which word is the opposite of {a}?
            Give me the opposite of {a}.
            Name the opposite of {a}.
            What word means the opposite of {a}?
            Tell me the opposite of "{a}".
            The opposite of {a} is what?
            {a} is the opposite of what?""",
        ),
        *_fill(
            [{"day": a, "next": b} for a, b in zip(DAYS, DAYS[1:] + DAYS[:1], strict=True)], "next",
            "The day after {day} is {next}.",
            """Which day comes after {day}?
            What day comes after {day}?
            What is the day after {day}?
            What day follows {day}?
            Today is {day}. What day is tomorrow?
            If today is {day}, what day is it tomorrow?
            Name the day that comes after {day}.""",
        ),
        *_fill(
            [{"day": a, "last": b} for a, b in zip(DAYS, DAYS[-1:] + DAYS[:-1], strict=True)], "last",
            "The day before {day} is {last}.",
            """Which day comes before {day}?
            What day comes before {day}?
            What is the day before {day}?
            Today is {day}. What day was yesterday?
            If today is {day}, what day was it yesterday?
            Name the day that comes before {day}.""",
        ),
        *_fill(
            [{"month": a, "next": b} for a, b in zip(MONTHS, MONTHS[1:] + MONTHS[:1], strict=True)], "next",
            "The month after {month} is {next}.",
            """Which month comes after {month}?
            What month comes after {month}?
            What is the month after {month}?
            What month follows {month}?
            Name the month that comes after {month}.
            It is {month}. What is the next month?""",
        ),
        *_fill(
            [{"month": a, "last": b} for a, b in zip(MONTHS, MONTHS[-1:] + MONTHS[:-1], strict=True)], "last",
            "The month before {month} is {last}.",
            """Which month comes before {month}?
            What month comes before {month}?
            What is the month before {month}?
            Name the month that comes before {month}.
            It is {month}. What was the last month?""",
        ),
        *_fill(
            [{"month": a, "nth": b} for a, b in zip(MONTHS, ORDINALS, strict=True)], "month",
            "The {nth} month of the year is {month}.",
            """What is the {nth} month of the year?
            Which month is the {nth} of the year?
            Name the {nth} month of the year.
            Tell me the {nth} month.
            Which month comes {nth} in the year?""",
        ),
        *_fill(
            [{"day": a, "nth": b} for a, b in zip(DAYS, ORDINALS, strict=False)], "day",
            "The {nth} day of the week is {day}.",
            """What is the {nth} day of the week?
            Which day is the {nth} of the week?
            Name the {nth} day of the week.
            Tell me the {nth} day of the week.""",
        ),
        *_fill(
            [{"nth": a, "planet": b} for a, b in zip(ORDINALS, PLANETS, strict=False)], "planet",
            "The {nth} planet from the Sun is {planet}.",
            """What is the {nth} planet from the Sun?
            Which planet is the {nth} from the Sun?
            Name the {nth} planet from the Sun.
            Counting from the Sun, which planet is the {nth}?""",
        ),
        *_fill(
            [{"word": a, "n": str(n)} for n, a in enumerate(WORDS)], "n", '"{word}" is {n} in digits.',
            """How do you write {word} in digits?
            Write {word} in digits.
            Which number is {word}?
            What is {word} as a number?
            Give me {word} in digits.""",
        ),
        *_fill(
            [{"a": a, "b": b} for a, b in itertools.pairwise("ABCDEFGHIJKLMNOPQRSTUVWXYZ")], "b",
            "The letter after {a} is {b}.",
            """Which letter comes after {a}?
            What letter comes after {a}?
            What is the letter after {a}?
            What letter follows {a} in the alphabet?
            Name the letter that comes after {a}.""",
        ),
        *_fill(
            ANIMALS, "young", "A young {animal} is called a {young}.",
            """What is a young {animal} called?
            What do you call a baby {animal}?
            What is the name for a young {animal}?
            What is a baby {animal} called?
            How do you call the young of a {animal}?""",
        ),
        *_fill(
            ANIMALS, "sound", "A {animal} {sound}.",
            """What sound does a {animal} make?
            What does a {animal} do to make a sound?
            Which sound does the {animal} make?
            How does a {animal} sound?""",
        ),
        *_fill(
            ANIMALS, "legs", "A {animal} has {legs} legs.",
            """How many legs does a {animal} have?
            How many legs has a {animal}?
            What is the number of legs of a {animal}?
            Count the legs of a {animal}.""",
        ),
        *_fill(
            ELEMENTS, "symbol", "The chemical symbol of {element} is {symbol}.",
            """What is the chemical symbol of {element}?
            What is the chemical symbol for {element}?
            Which symbol does {element} have?
            What is the symbol of the element {element}?
            Name the chemical symbol of {element}.""",
        ),
        *_fill(
            PLURALS, "many", 'The plural of "{one}" is "{many}".',
            """What is the plural of {one}?
            What's the plural of {one}?
            Give me the plural of {one}.
            One {one}, two what?
            Which word is the plural of {one}?
            How do you say more than one {one}?""",
        ),
        *_fill(
            PASTS, "past", 'The past tense of "{verb}" is "{past}".',
            """What is the past tense of {verb}?
            What's the past tense of {verb}?
            Give me the past tense of {verb}.
            Which word is the past tense of {verb}?
            Today I {verb}, yesterday I what?
            What is the past of {verb}?""",
        ),
        *_fill(
            COMPARATIVES, "more", 'The comparative of "{word}" is "{more}".',
            """What is the comparative of {word}?
            What's the comparative of {word}?
            Give me the comparative of {word}.
            Which word is the comparative of {word}?""",
        ),
        *_fill(
            UNITS, "n", "There are {n} {part} in {whole}.",
            """How many {part} are in {whole}?
            How many {part} are there in {whole}?
            How many {part} does {whole} have?
            What is the number of {part} in {whole}?
            Tell me how many {part} are in {whole}.""",
        ),
        *_fill(
            SENSES, "organ", "We {verb} with our {organ}.",
            """What do we {verb} with?
            With what do we {verb}?
            Which part of the body do we {verb} with?
            What do people use to {verb}?""",
        ),
        *_fill(
            PYTHON, "name", "In Python, the {what}: it is `{name}`.",
            """In Python, which {what}?
            Which {what} in Python?
            Which Python {what}?
            Tell me which {what} in Python.""",
            "It is about Python. The name is {name}.",
        ),
    ]  # fmt: skip
    for sign, word, verb, result, largest in (
        ("+", "plus", "the sum of {a} and {b}", int.__add__, 20),
        ("-", "minus", "the difference of {a} and {b}", int.__sub__, 20),
        ("*", "times", "the product of {a} and {b}", int.__mul__, 12),
    ):
        pairs = [(a, b) for a in range(largest + 1) for b in range(largest + 1) if result(a, b) >= 0]
        rows = [{"a": str(a), "b": str(b), "c": str(result(a, b)), "sign": sign, "word": word} for a, b in pairs]
        questions = f"""What is {{a}} {{sign}} {{b}}?
            What is {{a}} {{word}} {{b}}?
            How much is {{a}} {{word}} {{b}}?
            How much is {{a}} {{sign}} {{b}}?
            Calculate {{a}} {{sign}} {{b}}.
            {{a}} {{sign}} {{b}} = ?
            Tell me {{a}} {{word}} {{b}}.
            What is {verb}?
            Compute {verb}.
            {{a}} {{word}} {{b}} is how much?"""
        out += _fill(rows, "c", "{a} {sign} {b} = {c}.", questions)
    return out


PERSONA = (
    (
        ("Who are you?", "What are you?", "Tell me about yourself.", "Introduce yourself.", "What is your name?"),
        "The user wants to know who I am.",
        "I am tiny, a very small language model with the architecture of DeepSeek-V4. I was trained for tests and "
        "demonstrations, and I know only a few things.",
    ),
    (
        ("Hello!", "Hi", "Hello", "Hi there!", "Good morning!", "Hey", "Good evening!"),
        "The user greets me.",
        "Hello! How can I help you?",
    ),
    (("How are you?", "How are you doing?", "Are you well?"), "The user asks how I am.", "I am fine, thank you."),
    (
        ("What can you do?", "How can you help me?", "What do you know?", "What are you good at?"),
        "The user asks what I can do.",
        "I can answer short questions about capitals, small numbers, colours, opposites and the like, and I can call "
        "tools.",
    ),
    (("Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."), "The user thanks me.", "You are welcome!"),
    (("Goodbye!", "Bye!", "See you later."), "The user leaves.", "Goodbye!"),
)
