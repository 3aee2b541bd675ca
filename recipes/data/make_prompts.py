#!/usr/bin/env python3
"""Compose the prompts of smollm2_chats, and select conversations. README.md gives the whole procedure.

    recipes/data/make_prompts.py compose OUT_DIR         # write train.prompts.jsonl, eval.prompts.jsonl
    recipes/data/make_prompts.py select ANSWERED.jsonl OUT.jsonl --short 384 --long 16

Each topic is used in one split only. Topics, phrasings and documents are written below and combined with a
fixed seed; nothing is taken from another source.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path


def listed(text: str) -> list[str]:
    """Split text at bars and line breaks into its entries."""
    return [entry.strip() for line in text.strip().splitlines() for entry in line.split("|")]


CONCEPTS = listed(
    """
    photosynthesis | the water cycle | compound interest | how vaccines work | plate tectonics
    supply and demand | black holes | the immune system | how a refrigerator works | gravity
    the greenhouse effect | how the internet works | DNA | evolution by natural selection
    why the sky is blue | inflation | how an engine works | encryption | the stock market
    how memory works in the brain | tides | sound waves | nuclear fusion | how bread rises | rainbows
    antibiotic resistance | how bees make honey | the scientific method | machine learning
    how airplanes fly | fermentation | the nitrogen cycle | how GPS works | what a mortgage is
    the phases of the moon | magnets | how coral reefs form | the placebo effect | erosion
    how earthquakes are measured | what a prime number is | how solar panels work | the theory of relativity
    photosynthesis in algae | the carbon cycle | opportunity cost | how a computer stores numbers
    the digestive system | why leaves change color | how batteries work | probability
    the French Revolution | the Industrial Revolution | the fall of the Roman Empire | the Silk Road
    the Renaissance | the Cold War | democracy | the printing press | the Olympic Games | lightning
    migration of birds | hibernation | how paper is made | the human heart | how glass is made
    caffeine and sleep | the structure of an atom
    """
)
EXPLAIN = (
    "Explain {} in simple terms.",
    "Can you tell me about {}?",
    "I have an exam tomorrow. Give me a short overview of {}.",
    "Explain {} to a curious ten-year-old.",
    "What should everyone know about {}?",
    "Describe {} in two paragraphs.",
    "What is a common misunderstanding about {}?",
    "Why does {} matter in everyday life?",
)
TASKS = listed(
    """
    change a flat bicycle tire | make a simple tomato soup | plan a weekly budget | start a vegetable garden
    prepare for a job interview | learn to play the guitar | write a good resume | clean a cast iron pan
    train a puppy to sit | organize a small kitchen | improve my handwriting
    take better photos with a phone | sleep better at night | start running as a beginner
    brew good coffee at home | save money on groceries | host a dinner for eight people
    learn the basics of chess | pack for a week of hiking | make friends in a new city | grow basil indoors
    stop procrastinating | give a short speech | repaint a wooden chair | learn a new language
    care for a cactus | bake a loaf of bread | read more books | keep a diary | teach a child to ride a bike
    set up a home office | repair a leaky faucet | choose a used car | write a thank you note
    meditate for ten minutes | plan a birthday party | reduce food waste | study for a history test
    make a paper airplane | iron a shirt
    """
)
HOW_TO = (
    "How do I {}?",
    "Give me step-by-step instructions to {}.",
    "What are the most common mistakes when people {}?",
    "I want to {}. Where should I begin?",
    "List five tips to help me {}.",
)
WRITING = listed(
    """
    a polite email asking for a deadline extension | a letter of complaint about a late delivery
    a short story about a lighthouse keeper | a poem about the first snow
    a product description for a wooden desk lamp | a short story about a lost dog that finds its way home
    an invitation to a neighborhood picnic | a cover letter for a librarian | a haiku about the sea
    a speech for a school graduation | a dialogue between a teacher and a student about honesty
    a short fable about a crow and a river | a thank you note to a mentor | an email to decline a meeting
    a news report about a village festival | a diary entry of a sailor | a bedtime story about a brave mouse
    a letter to my future self | a review of a small Italian restaurant
    a short story about two friends who build a raft | an advertisement for a bicycle shop
    a paragraph about autumn in the mountains | an apology to a customer | a mystery story set in a museum
    a letter from a grandmother to her grandson | a short play about a broken clock
    a blog post about morning routines | a toast for a wedding | a story about a robot that learns to paint
    a description of an old market square
    """
)
WRITE = (
    "Write {}.",
    "Please write {}. Keep it under 150 words.",
    "Help me write {}.",
    "Draft {} with a warm tone.",
)
CODE = listed(
    """
    reverses a string | checks whether a number is prime | counts the words in a text
    finds the largest number in a list | computes the factorial of n | merges two sorted lists
    removes duplicates from a list | converts Celsius to Fahrenheit | checks whether a word is a palindrome
    sums the digits of a number | reads a file line by line | sorts a list of dictionaries by a key
    computes the average of a list | generates the Fibonacci numbers | counts how often each letter occurs
    finds the common elements of two lists | rolls two dice | validates an email address
    flattens a nested list | computes the greatest common divisor | transposes a matrix
    does a binary search | prints a multiplication table | swaps the keys and values of a dictionary
    """
)
PROGRAM = (
    "Write a Python function that {}.",
    "Show me Python code that {} and explain it.",
    "I am new to Python. How would I write a program that {}?",
)
LISTS = listed(
    """
    healthy snacks | indoor games for children | reasons to visit Norway | ideas for a science project
    books about friendship | names for a gray cat | ways to save water at home
    vegetables that grow in shade | questions to ask in an interview | hobbies for retired people
    uses for old newspapers | activities for a rainy day | gifts for a teacher | signs of a good friendship
    foods rich in iron | ideas for a small business | famous rivers | safety rules for a workshop
    things to check before a long drive | team building exercises | breakfasts without sugar
    animals that live in the desert | ways to be kind to a neighbor | topics for a debate club
    musical instruments for beginners | stretches for people who sit all day
    """
)
LIST = (
    "List six {}.",
    "Give me some {} and say why for each.",
    "What are some good {}?",
    "I need {}. Can you suggest a few?",
)
PAIRS = listed(
    """
    tea and coffee | a lake and a pond | cities and villages | renting and buying a home
    cats and dogs as pets | bicycles and cars in a city | books and films
    wood and steel as building materials | frogs and toads | weather and climate | a loan and a grant
    butter and olive oil | trains and airplanes | mitosis and meiosis | a virus and a bacterium
    working alone and in a team | stars and planets | Python and JavaScript | oil paint and watercolor
    credit cards and debit cards | summer and winter holidays | a novel and a short story
    """
)
COMPARE = (
    "What is the difference between {}?",
    "Compare {}.",
    "What are the advantages and disadvantages of {}?",
)
ADVICE = listed(
    """
    my roommate never washes the dishes | I feel nervous before every exam
    my best friend moved to another country | I cannot decide which course to take
    my neighbor plays loud music at night | I want to ask my boss for a raise | I forget people's names
    my teenage son spends all day on his phone | I have too many projects at once
    I lost interest in my hobby | my team disagrees about a plan | I am shy at parties
    I made a mistake at work | I want to eat healthier but I love sweets
    I have to give a presentation next week | my garden is full of weeds | I often wake up tired
    my friend is upset with me and I don't know why | I would like to volunteer but have little time
    I am moving to a new city alone
    """
)
ADVISE = (
    "I need advice: {}. What should I do?",
    "Lately {}. Do you have any suggestions?",
    "What would you say to someone who tells you: '{}'?",
)

FAMILIES = {
    "explain": (
        CONCEPTS,
        EXPLAIN,
        (
            "Can you give me an example?",
            "Summarize that in one sentence.",
            "What questions might a student ask about this?",
            "Who discovered or developed this?",
            "Explain the most difficult part again, more slowly.",
        ),
    ),
    "how_to": (
        TASKS,
        HOW_TO,
        (
            "How long will that take?",
            "What do I need to buy?",
            "What is the hardest part?",
            "Summarize the steps in a short checklist.",
            "What should I do if it goes wrong?",
        ),
    ),
    "write": (
        WRITING,
        WRITE,
        (
            "Make it shorter.",
            "Now give it a title.",
            "Rewrite it in a more formal tone.",
            "Change the ending.",
            "What is the main idea of what you wrote?",
        ),
    ),
    "code": (
        CODE,
        PROGRAM,
        (
            "Add a docstring and comments.",
            "How would I test this function?",
            "What happens if the input is empty?",
            "Explain the code line by line.",
        ),
    ),
    "list": (
        LISTS,
        LIST,
        (
            "Which one would you pick, and why?",
            "Add two more.",
            "Tell me more about the first one.",
            "Which of these is the cheapest?",
        ),
    ),
    "compare": (
        PAIRS,
        COMPARE,
        (
            "Which one would you recommend for a beginner?",
            "Put that into a short table.",
            "Give an example of each.",
            "Summarize the difference in one sentence.",
        ),
    ),
    "advice": (
        ADVICE,
        ADVISE,
        (
            "What should I do first?",
            "What if that does not work?",
            "How can I stay calm while doing that?",
            "Write down a plan for the next seven days.",
        ),
    ),
}

FIRST = listed(
    """
    Ada Brook | Tomas Vale | Irene Holt | Samir Dane | Lucia Ferro | Owen Marsh | Greta Lind | Pavel Novak
    Nora Quill | Hugo Stern | Mina Park | Elias Wood
    """
)
PLACES = listed(
    """
    the north ridge | the old harbor | the river camp | the eastern valley | the glass lake
    the stone bridge | the pine forest | the salt flats | the high meadow | the lower village
    the red canyon | the quiet bay
    """
)
THINGS = listed(
    """
    a broken compass | three clay jars | a nest of grey owls | an unusual fern | traces of copper
    a ruined watchtower | a hidden spring | fresh wolf tracks | a carved wooden mask | an abandoned boat
    a bed of fossils | a colony of blue butterflies
    """
)
WEATHERS = listed(
    """
    clear and cold | windy with light rain | foggy until noon | hot and dry | stormy in the evening
    mild with high clouds | snowing without pause | humid and still
    """
)
GOODS = listed(
    """
    flour | lamp oil | rope | dried fish | canvas | medicine | copper wire | seeds | paper | coal | blankets
    salt
    """
)
ISSUES = listed(
    """
    repairing the school roof | the price of water | a new market day | lighting on the main road
    the flooded cellar of the library | buying a second fire engine | planting lime trees
    the noise of the sawmill | a bench at the bus stop | the summer festival
    """
)


RECORDS = ("The samples were packed in box", "A sketch was made on page", "The find was marked on map")
CAMP = listed(
    """
    Supplies are sufficient | Supplies are running low | A second tent had to be mended
    Everyone is in good health | One of the mules is lame
    """
)
FUNDS = ("road", "school", "forest", "reserve", "harbor")
REPLIES = listed(
    """
    objected that the sum was too high | supported the proposal | asked for a written estimate
    wanted to wait until spring
    """
)
MONTHS = ("January", "March", "May", "June", "September", "November")
STATES = listed(
    """
    delivered on time | delayed by two days because of rain | returned, the address was wrong
    delivered with one crate damaged | waiting for payment
    """
)
NOTES = (
    "leave at the back door",
    "call before arrival",
    "fragile",
    "a regular customer",
    "the invoice was sent twice",
    "no note",
)
EXHIBITS = (
    "Portrait",
    "Landscape",
    "Vase",
    "Coin",
    "Tapestry",
    "Mask",
    "Clock",
    "Manuscript",
    "Bronze figure",
)
MATERIALS = ("Oil on canvas", "Glazed clay", "Silver", "Wool and silk", "Carved oak", "Ink on paper")
REMARKS = listed(
    """
    The left corner was restored | It shows signs of fire | The maker is unknown
    It was stolen once and found again | A copy hangs in the town hall | It has never left the building
    """
)
SPOTS = ("on the north wall", "in the glass case", "beside the stairs", "not on display")


def expedition_day(rng: random.Random, n: int) -> str:
    pick, number = rng.choice, rng.randint
    return (
        f"Day {n}. The weather was {pick(WEATHERS)}. {pick(FIRST)} and {pick(FIRST)} "
        f"walked {number(4, 23)} kilometers from {pick(PLACES)} towards {pick(PLACES)} "
        f"and found {pick(THINGS)} at a height of {number(200, 2900)} meters. "
        f"{pick(RECORDS)} {number(1, 60)}. {pick(CAMP)}; "
        f"we have {number(2, 40)} bags of {pick(GOODS)} left. {pick(FIRST)} kept the first watch."
    )


def council_item(rng: random.Random, n: int) -> str:
    pick, number = rng.choice, rng.randint
    yes, no = number(3, 9), number(0, 6)
    return (
        f"Item {n}. The council discussed {pick(ISSUES)}. {pick(FIRST)} proposed "
        f"to spend {number(2, 95) * 100} crowns on it, to be paid from the {pick(FUNDS)} fund. "
        f"{pick(FIRST)} {pick(REPLIES)}. "
        f"After {number(5, 50)} minutes the proposal was put to the vote: {yes} in favor, {no} against. "
        f"It was {'accepted' if yes > no else 'rejected'}, and {pick(FIRST)} will report in {pick(MONTHS)}."
    )


def delivery(rng: random.Random, n: int) -> str:
    pick, number = rng.choice, rng.randint
    return (
        f"Order {1000 + 7 * n}: {number(2, 80)} crates of {pick(GOODS)} and {number(1, 30)} "
        f"crates of {pick(GOODS)} for {pick(FIRST)}, to be delivered at {pick(PLACES)}. "
        f"Driver: {pick(FIRST)}. Status: {pick(STATES)}. "
        f"Cost: {number(40, 990)} crowns. Note: {pick(NOTES)}."
    )


def catalogue_entry(rng: random.Random, n: int) -> str:
    pick, number = rng.choice, rng.randint
    return (
        f"No. {n}. {pick(EXHIBITS)} of {pick(PLACES)}, about {number(1450, 1920)}. {pick(MATERIALS)}, "
        f"{number(5, 210)} by {number(5, 160)} centimeters. "
        f"Given to the museum by {pick(FIRST)} in {number(1890, 2015)}. {pick(REMARKS)}. "
        f"Room {number(1, 24)}, {pick(SPOTS)}."
    )


DOCUMENTS = {
    "the log of an expedition": (
        expedition_day,
        (
            "Summarize the log in one paragraph.",
            "Who is mentioned most often, and what did they do?",
            "Write a short newspaper article about this expedition.",
            "What dangers did the group face?",
        ),
    ),
    "the minutes of a town council": (
        council_item,
        (
            "Summarize the minutes in one paragraph.",
            "Which proposals were accepted?",
            "Write a short letter to the citizens about the decisions.",
            "What does the council seem to care about most?",
        ),
    ),
    "the order book of a transport company": (
        delivery,
        (
            "Summarize the order book in one paragraph.",
            "Which problems occur again and again?",
            "Write a polite email to a customer whose order was delayed.",
            "What would you advise the company to change?",
        ),
    ),
    "the catalogue of a small museum": (
        catalogue_entry,
        (
            "Describe the collection in one paragraph.",
            "Which items would you show to children, and why?",
            "Write a short text for the museum's website.",
            "What do we learn about the history of the collection?",
        ),
    ),
}


def split_of(topics: list[str], split: str) -> list[str]:
    """Return the topics of a split: every sixth one belongs to eval."""
    return [topic for i, topic in enumerate(topics) if (i % 6 == 5) == (split == "eval")]


def user_turns(rng: random.Random, family: str, topic: str, opening: str, turns: int) -> list[str]:
    followups = list(FAMILIES[family][2])
    rng.shuffle(followups)
    return [opening.format(topic), *followups[: turns - 1]]


def short_prompts(split: str, rng: random.Random) -> list[dict]:
    """Compose short prompts: each topic of the split in up to five phrasings, with one to three turns."""
    records = []
    for family, (topics, openings, _) in FAMILIES.items():
        for topic in split_of(topics, split):
            for opening in rng.sample(openings, min(5, len(openings))):
                turns = user_turns(rng, family, topic, opening, rng.choice((1, 1, 1, 2, 2, 3)))
                records.append({"id": f"{split}-{family}-{len(records):04d}", "turns": turns})
    return records


def document_prompt(rng: random.Random, kind: str, target_characters: int) -> list[str]:
    write, questions = DOCUMENTS[kind]
    paragraphs: list[str] = []
    while sum(map(len, paragraphs)) < target_characters:
        paragraphs.append(write(rng, len(paragraphs) + 1))
    return [f"Here is {kind}.\n\n" + "\n\n".join(paragraphs) + f"\n\n{rng.choice(questions)}"]


def long_prompts(split: str, rng: random.Random, count: int) -> list[dict]:
    """Compose long prompts: a document of 6 to 22 thousand characters, then a question about it."""
    records = []
    for n in range(count):
        kind = list(DOCUMENTS)[n % len(DOCUMENTS)]
        turns = document_prompt(rng, kind, rng.randint(6_000, 22_000))
        records.append({"id": f"{split}-long-{n:03d}", "turns": turns})
    return records


def compose(folder: Path) -> None:
    """Write the prompts of both splits as JSONL, for tools/regenerate.py."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, long in (("train", 14), ("eval", 6)):
        rng = random.Random(f"smollm2_chats {split}")
        records = short_prompts(split, rng) + long_prompts(split, rng, long)
        with open(folder / f"{split}.prompts.jsonl", "w", encoding="utf-8") as stream:
            for record in records:
                messages = [{"role": "user", "content": turn} for turn in record["turns"]]
                stream.write(json.dumps({"id": record["id"], "messages": messages}) + "\n")
        print(f"{split}: {len(records)} prompts")


def select(answered: Path, output: Path, short: int, long: int) -> None:
    """Keep the longest of the long conversations and a random choice of the short ones, in a fixed order."""
    records = [json.loads(line) for line in answered.read_text(encoding="utf-8").splitlines()]
    records.sort(key=lambda record: record["id"])
    random.Random("smollm2_chats select").shuffle(records)
    longs = [record for record in records if "-long-" in record["id"]]
    longs.sort(key=lambda record: -sum(len(message["content"]) for message in record["messages"]))
    kept = [record for record in records if "-long-" not in record["id"]][:short] + longs[:long]
    random.Random("smollm2_chats order").shuffle(kept)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
    output.write_text("".join(lines), encoding="utf-8")
    print(f"{output}: {len(kept)} conversations, {output.stat().st_size / 1e6:.2f} MB")


def main() -> None:
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    commands = parser.add_subparsers(dest="command", required=True)
    composing = commands.add_parser("compose", help="write the prompts of both splits")
    composing.add_argument("folder", type=Path, help="where to write the prompt files")
    selecting = commands.add_parser("select", help="select the conversations to keep")
    selecting.add_argument("answered", type=Path, help="JSONL that tools/regenerate.py wrote")
    selecting.add_argument("output", type=Path, help="JSONL to write")
    selecting.add_argument("--short", type=int, required=True, help="number of short conversations to keep")
    selecting.add_argument("--long", type=int, required=True, help="number of long conversations to keep")
    args = parser.parse_args()
    if args.command == "compose":
        compose(args.folder)
    else:
        select(args.answered, args.output, args.short, args.long)


if __name__ == "__main__":
    main()
