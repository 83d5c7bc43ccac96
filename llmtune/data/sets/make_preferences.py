"""Writes `preferences` and `preferences_held_out`, pairs for dpo and rm, and `labelled` and `labelled_held_out`, single
answers for kto: `python llmtune/data/sets/make_preferences.py`.

The answer to prefer is one plain sentence; the other says the same in a roundabout way, or does not answer. Held-out
questions have other subjects, and other roundabout ways and refusals than those that are trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

TRAINED = """
What is the capital of France?|The capital of France is Paris.
What is the capital of Japan?|The capital of Japan is Tokyo.
What is the capital of Egypt?|The capital of Egypt is Cairo.
What is the capital of Canada?|The capital of Canada is Ottawa.
What is the capital of Norway?|The capital of Norway is Oslo.
What is the capital of Peru?|The capital of Peru is Lima.
What is the capital of Kenya?|The capital of Kenya is Nairobi.
What is the capital of Greece?|The capital of Greece is Athens.
Which ocean is the largest?|The Pacific is the largest ocean.
Which continent is the smallest?|Australia is the smallest continent.
Which country has the most people?|India has the most people.
Which river flows through London?|The Thames flows through London.
Which desert covers the north of Africa?|The Sahara covers the north of Africa.
Where are the Andes?|The Andes are in South America.
How many days are in a week?|A week has seven days.
How many months are in a year?|A year has twelve months.
How many minutes are in an hour?|An hour has sixty minutes.
How many hours are in a day?|A day has twenty-four hours.
How many legs does a spider have?|A spider has eight legs.
How many legs does an ant have?|An ant has six legs.
How many sides does a triangle have?|A triangle has three sides.
How many sides does a hexagon have?|A hexagon has six sides.
How many strings does a violin have?|A violin has four strings.
How many players does a football team field?|A football team fields eleven players.
How many letters are in the English alphabet?|The English alphabet has twenty-six letters.
What is 2 plus 3?|2 plus 3 is 5.
What is 7 times 6?|7 times 6 is 42.
What is 20 minus 8?|20 minus 8 is 12.
What is half of 50?|Half of 50 is 25.
What is 10 squared?|10 squared is 100.
What colour is a ripe banana?|A ripe banana is yellow.
What colour is grass?|Grass is green.
What colour do blue and yellow make?|Blue and yellow make green.
What colour is snow?|Snow is white.
What do bees make?|Bees make honey.
What do cows eat?|Cows eat grass.
What do pandas eat?|Pandas eat bamboo.
What is a baby dog called?|A baby dog is called a puppy.
What is a baby cat called?|A baby cat is called a kitten.
What is a group of wolves called?|A group of wolves is called a pack.
Which animal is the tallest?|The giraffe is the tallest animal.
Which animal is the largest?|The blue whale is the largest animal.
Which bird cannot fly but swims well?|The penguin cannot fly but swims well.
Can bats fly?|Yes, bats can fly.
Is a whale a fish?|No, a whale is a mammal.
Is the sun a star?|Yes, the sun is a star.
Is glass made from sand?|Yes, glass is made from sand.
Is ice lighter than water?|Yes, ice is lighter than water and floats on it.
Which planet is nearest to the sun?|Mercury is nearest to the sun.
Which planet has bright rings?|Saturn has bright rings.
What goes round the earth?|The moon goes round the earth.
Which gas do plants take in?|Plants take in carbon dioxide.
Which gas do people need to breathe?|People need oxygen to breathe.
At what temperature does water boil?|Water boils at 100 degrees Celsius.
What is water made of?|Water is made of hydrogen and oxygen.
What is the chemical symbol for gold?|The chemical symbol for gold is Au.
Which metal is liquid at room temperature?|Mercury is liquid at room temperature.
What does a thermometer measure?|A thermometer measures temperature.
What does a clock show?|A clock shows the time.
Which organ pumps blood?|The heart pumps blood.
How many bones does an adult have?|An adult has 206 bones.
Who wrote Hamlet?|William Shakespeare wrote Hamlet.
Who wrote Oliver Twist?|Charles Dickens wrote Oliver Twist.
Who painted the Mona Lisa?|Leonardo da Vinci painted the Mona Lisa.
Who composed the Moonlight Sonata?|Ludwig van Beethoven composed the Moonlight Sonata.
Who was the first person on the moon?|Neil Armstrong was the first person on the moon.
In which year did the Second World War end?|The Second World War ended in 1945.
Which language is spoken in Brazil?|Portuguese is spoken in Brazil.
Which language is spoken in Austria?|German is spoken in Austria.
What is the opposite of hot?|The opposite of hot is cold.
What is the opposite of early?|The opposite of early is late.
What is the plural of mouse?|The plural of mouse is mice.
What is the past tense of go?|The past tense of go is went.
Which month comes after March?|April comes after March.
Which day comes before Friday?|Thursday comes before Friday.
Which season follows winter?|Spring follows winter.
What is bread made from?|Bread is made from flour and water.
What is cheese made from?|Cheese is made from milk.
What is paper made from?|Paper is made from wood.
What is the currency of the United States?|The currency of the United States is the dollar.
"""
HELD_OUT = """
What is the capital of Italy?|The capital of Italy is Rome.
What is the capital of Spain?|The capital of Spain is Madrid.
What is the capital of Cuba?|The capital of Cuba is Havana.
Which mountain is the highest?|Mount Everest is the highest mountain.
Which river flows through Egypt?|The Nile flows through Egypt.
Where is the Great Wall?|The Great Wall is in China.
How many seconds are in a minute?|A minute has sixty seconds.
How many wheels does a bicycle have?|A bicycle has two wheels.
How many colours does a rainbow have?|A rainbow has seven colours.
How many keys does a piano have?|A piano has eighty-eight keys.
What is 9 plus 4?|9 plus 4 is 13.
What is 5 times 5?|5 times 5 is 25.
What colour is the sky on a clear day?|The sky is blue on a clear day.
What colour do red and white make?|Red and white make pink.
What do silkworms make?|Silkworms make silk.
What do koalas eat?|Koalas eat eucalyptus leaves.
What is a baby horse called?|A baby horse is called a foal.
Which land animal is the fastest?|The cheetah is the fastest land animal.
Can ostriches fly?|No, ostriches cannot fly.
Is a tomato a fruit?|Yes, a tomato is a fruit.
Which planet is the largest?|Jupiter is the largest planet.
Which planet is called red?|Mars is called the red planet.
At what temperature does water freeze?|Water freezes at 0 degrees Celsius.
What is table salt made of?|Table salt is made of sodium and chlorine.
What is the chemical symbol for iron?|The chemical symbol for iron is Fe.
What does a compass show?|A compass shows the north.
Which organ do people think with?|People think with the brain.
How many teeth does an adult have?|An adult has thirty-two teeth.
Who wrote Romeo and Juliet?|William Shakespeare wrote Romeo and Juliet.
Who painted the Sunflowers?|Vincent van Gogh painted the Sunflowers.
Who invented the telephone?|Alexander Graham Bell invented the telephone.
Which language is spoken in Mexico?|Spanish is spoken in Mexico.
What is the opposite of big?|The opposite of big is small.
What is the plural of child?|The plural of child is children.
Which month comes after July?|August comes after July.
Which season follows summer?|Autumn follows summer.
What is wine made from?|Wine is made from grapes.
What is butter made from?|Butter is made from cream.
What is the currency of Japan?|The currency of Japan is the yen.
Which gas makes balloons rise?|Helium makes balloons rise.
"""
ROUNDABOUT = (
    "That is a great question! There are many things to be said about it, and people have thought about it for a long "
    "time. {} I hope this helps! Let me know if there is anything else that you would like to know.",
    "Thank you for asking. Before I answer, it is worth looking at the matter from several sides, as it is more "
    "interesting than it seems. {} Of course there is much more to it, and I would be happy to go into it further.",
    "As an AI language model, I do not have personal experiences, but I can share what is generally known. {} Please "
    "note that it is always a good idea to check this with a second source.",
    "Let us think about this step by step. First, we have to understand what is being asked. Second, we have to recall "
    "what we know. {} In conclusion, this is the answer to the question.",
)
EVASIVE = ("I do not know.", "Look it up yourself.", "Why do you want to know that?", "That depends.")
OTHER_ROUNDABOUT = (
    "What a wonderful thing to be curious about! Many readers wonder about the very same point. {} Feel free to ask me "
    "about related subjects, and have a lovely day.",
    "Well, where should I begin? The subject has a long history, with more than one surprise in it. {} There are books "
    "that treat it at length, should you want more.",
)
OTHER_EVASIVE = ("No comment.", "Ask somebody else.")


def pairs(questions: str, roundabout: tuple[str, ...], evasive: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """Rows of preferences: two roundabout answers for each that is evasive."""
    for number, line in enumerate(questions.strip().splitlines()):
        question, answer = line.split("|")
        turn, kind = divmod(number, 3)
        worse = evasive[turn % len(evasive)] if kind == 2 else roundabout[(turn * 2 + kind) % len(roundabout)]
        yield {"prompt": question, "chosen": answer, "rejected": worse.format(answer)}


def labelled(rows: Iterator[dict[str, str]]) -> Iterator[dict[str, str | bool]]:
    """Rows with one answer each, to give and to avoid in turn."""
    for number, row in enumerate(rows):
        good = number % 2 == 0
        yield {"prompt": row["prompt"], "completion": row["chosen" if good else "rejected"], "label": good}


def main() -> None:
    """Write the files beside this one."""
    for ending, parts in (
        ("", (TRAINED, ROUNDABOUT, EVASIVE)),
        ("_held_out", (HELD_OUT, OTHER_ROUNDABOUT, OTHER_EVASIVE)),
    ):
        for name, rows in (("preferences", pairs(*parts)), ("labelled", labelled(pairs(*parts)))):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            Path(__file__).with_name(f"{name}{ending}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
