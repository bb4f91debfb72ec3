"""How film reviews are put: the frames of the first set, and what frames are.

In a frame {N} is a subject with its verb forms {is}, {s}, {does}, …; {x} and {y} are adjectives and {q} a quality; the
other names are of `review_words.NEUTRAL`. A direct frame says of {N} what its adjective says, a negating one the
contrary, so praise may be built of words of blame («never dull») and blame of words of praise («hardly convincing»).
Some direct frames hold a negation of their own («could not be more moving»), so that the sign is not a matter of one
word. A having frame says that the film has a quality, a lacking one that it has not.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Frames:
    """Pairs are (good, bad). A head and its tail make the first sentence; the review's `opening` is the head.

    `plots` bring people and places; where the first sentence has done that, `events` go on from there.
    """

    heads: list[tuple[str, list[str]]]
    plots: list[str]
    events: list[str]
    asides: list[str]
    direct: list[str]
    negating: list[str]
    having: list[str]
    lacking: list[str]
    reactions: tuple[list[str], list[str]]
    verdicts: tuple[list[str], list[str]]
    mixed: list[str]
    turning: list[str]
    going_on: list[str]


SEEN = ["with my {relative}.", "{where}.", "with my {relative} {where}.", "without knowing anything about it."]

FIRST = Frames(
    heads=[
        ("{T} is a {genre}", ["from {year}.", "by {director}.", "about {plot}.", "of {minutes} minutes."]),
        (
            "{T} is the [first|second|latest] film",
            ["by {director}.", "by {director}, made in {year}.", "I saw {where} this year."],
        ),
        ("I watched {T} {when}", SEEN),
        ("I saw {T}", ["{when} {where}.", "{where} {when}.", "with my {relative} {when}."]),
        ("{when}, I saw {T}", SEEN),
        ("{when}, we watched {T}", SEEN),
        ("My {relative} [chose|picked] {T}", ["{when}.", "for [our|the] film evening.", "and I came along."]),
        (
            "{T} came out in {year}",
            ["and was directed by {director}.", "as a {genre}.", "and runs for {minutes} minutes."],
        ),
        ("{director} [directed|made|wrote] {T}", ["in {year}.", "after a career on the stage.", "as a {genre}."]),
        ("In {T} we meet {who}", ["who must {aim}.", "who will {aim} {place}."]),
        ("The {genre} {T} [begins|opens] {place}", ["and follows {who}.", "on the day when {event}.", "in {year}."]),
        ("Set {place}, {T} is about", ["{who}.", "{who} trying to {aim}.", "{who} and what happens when {event}."]),
        ("{T} tells the story of", ["{plot}.", "{who} {place}.", "{plot}."]),
        ("{T} was [shown|screened] {hall}", ["{when}.", "and I went with my {relative}."]),
        (
            "A [friend|colleague] lent me {T}",
            ["{when}.", "and I watched it {where}.", "because I collect [films|stories] of this kind."],
        ),
        ("It rained, so we watched {T}", SEEN),
        (
            "Before {T} I had seen",
            ["[two|three|four] films by {director}.", "nothing by {director}.", "only one other {genre}."],
        ),
        ("{T} runs for {minutes} minutes", ["and was made in {year}.", "and is set {place}.", "and tells of {who}."]),
        ("In {year} {director} made {T}", ["with a small crew.", "as a {genre}.", "from a novel."]),
        ("I bought a ticket for {T}", ["{when}.", "because of {director}.", "and went with my {relative}."]),
    ],
    plots=[
        "it [follows|is about|tells of] {plot}",
        "it [follows|is about|tells of] {who}",
        "{who} will have to {aim}",
        "the story is set {place}, where {event}",
        "the film starts {place} and ends {place}",
        "the hero is a {kind} {job} who wants to {aim}",
        "{who} must {aim} before {event}",
    ],
    events=[
        "[one day|one night|early on|after an hour] {event}",
        "everything [changes|is different] when {event}",
        "it begins when {event}",
        "it ends when {event}",
        "soon {event}",
    ],
    asides=[
        "the [hall|cinema] was half full",
        "it has subtitles",
        "my {relative} came along",
        "it was shot {place}",
        "I knew the [book|novel] already",
        "it runs for {minutes} minutes",
        "the director is {director}",
        "I had seen the trailer",
    ],
    direct=[
        "{N} {is} {x}",
        "{N} {is} {x} and {y}",
        "{N} {is} [really|truly|rather|quite] {x}",
        "I found {N} [really|truly|rather] {x}",
        "{N} feel{s} {x}",
        "{N} remain{s} {x} to the last scene",
        "{N} turned out to be {x}",
        "{N} struck me as {x}",
        "{N} could not be more {x}",
        "nobody will deny that {N} {is} {x}",
        "we all thought {N} {x}",
    ],
    negating=[
        "{N} {is} never {x}",
        "{N} {is} not {x} for a moment",
        "{N} {is} [far from|anything but] {x}",
        "there is nothing {x} about {N}",
        "nobody could call {N} {x}",
        "I did not find {N} {x}",
        "{N} {is} hardly {x}",
        "{N} {does} not feel {x}",
    ],
    having=[
        "it has [plenty of|a lot of|no shortage of] {q}",
        "it is full of {q}",
        "I noticed [plenty of|a lot of] {q} in it",
        "it is not without {q}",
        "every scene adds more {q}",
    ],
    lacking=[
        "it has no {q}",
        "there is no trace of {q} in it",
        "it does without {q}",
        "you will find no {q} here",
        "hardly a scene has any {q}",
    ],
    reactions=(
        [
            "I [loved|enjoyed|savoured] every minute",
            "I never looked at my watch",
            "I did not want it to end",
            "I left the cinema smiling",
            "I laughed and cried",
            "I was glued to the screen",
            "my {relative} and I talked about it all night",
            "I have already seen it twice",
            "I forgot the time",
            "the hall clapped at the end",
            "I could not look away",
            "I would not change a thing",
            "it made my week",
            "I am still thinking about it",
            "for once I was not bored",
        ],
        [
            "I [hated|regretted|endured] every minute",
            "I kept looking at my watch",
            "I could not wait for it to end",
            "I left the cinema angry",
            "I yawned and sighed",
            "I nearly fell asleep",
            "my {relative} and I walked out",
            "I will never see it again",
            "I felt every minute of it",
            "half the hall left before the end",
            "I had to look away",
            "I would change everything",
            "it ruined my evening",
            "I have already forgotten it",
            "for once I was not amused",
        ],
    ),
    verdicts=(
        [
            "[warmly|highly] recommended",
            "go and see it",
            "do not miss it",
            "one of the best films of the year",
            "[eight|nine|ten] out of ten",
            "a small masterpiece",
            "[take|bring] the whole family",
            "it deserves a bigger audience",
            "worth every penny",
            "I want to see it again",
            "a triumph for {director}",
            "you will not regret it",
            "see it while you can",
            "a real treat",
            "what a lovely film",
        ],
        [
            "[strongly|firmly] not recommended",
            "stay at home",
            "give it a miss",
            "one of the worst films of the year",
            "[one|two|three] out of ten",
            "a small disaster",
            "[spare|save] your family this",
            "it deserves to be forgotten",
            "not worth a penny",
            "I want my money back",
            "a failure for {director}",
            "you will regret it",
            "avoid it while you can",
            "a real chore",
            "what a waste of time",
        ],
    ),
    mixed=["although {other}, {main}", "{other}, but {main}", "{main}, even if {other}", "while {other}, {main}"],
    turning=["still, ", "however, ", "then again, ", "on the other hand, ", "but ", ""],
    going_on=["also, ", "and ", "besides, ", "", "", "", "", ""],
)
