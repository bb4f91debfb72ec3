"""Vocabularies of the film reviews: films, plots, and the words of praise and blame. All of it is made up.

Words that carry a sentiment stand in pairs of lists, the good ones first. The two sets of reviews each leave out an
eighth of every list (`own`), a different one, so that a judge trained on one of them does not know all words of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def listed(text: str) -> list[str]:
    """A vocabulary written with commas; spaces and line ends around them do not count."""
    return [part for line in text.split(",") if (part := " ".join(line.split()))]


def own(items: Sequence[str], which: int) -> list[str]:
    """The seven eighths of a list that set number `which` uses."""
    return [item for i, item in enumerate(items) if i % 8 != which]


# A film's title is two words, and which splits a pair belongs to is a matter of their numbers: see `reviews.title`.
TITLE_FIRST = listed(
    "Silent, Northern, Paper, Winter, Second, Blue, Copper, Distant, Glass, Hidden, Last, Midnight, Salt, Stone, "
    "Summer, Yellow, Autumn, Borrowed, Crooked, Eleventh, Foreign, Iron, Late, Little, Marble, Narrow, Old, Orange, "
    "Painted, Red, Secret, Silver, Spare, Tall, Velvet, White, Wild, Upper, Open, Green"
)
TITLE_SECOND = listed(
    "Harbour, Letter, Window, Bridge, Orchard, Station, Garden, Lighthouse, Kitchen, Mirror, Road, Island, Hotel, "
    "Piano, Suitcase, Staircase, Uncle, Doctor, Sparrow, Horse, Painter, Widow, Soldier, Neighbour, Captain, Tailor, "
    "Lantern, Bicycle, Clock, Train, Valley, Forest, Tower, Market, Theatre, Umbrella, Circus, Ferry, Snow, Sunday, "
    "Photograph, Key, River, Attic, Compass, Engine"
)
FIRST_NAMES = listed(
    "Nora, Tomas, Edith, Jonas, Clara, Hugo, Marta, Felix, Ines, Oscar, Greta, Ivor, Selma, Ruben, Ada, Milo, Elsa, "
    "Anton, Petra, Basil"
)
LAST_NAMES = listed(
    "Fenwright, Oldacre, Hallam, Brandsma, Quillan, Marchetta, Thorsby, Vellacott, Rosendal, Pemberly, Askwith, "
    "Drummell, Kettering, Lindqvist, Ormonde, Sandoval, Tarrow, Wexcombe, Yardling, Zelenko"
)

# Neutral: nothing here is liked or disliked, and all of it is drawn without a look at the label.
NEUTRAL: dict[str, list[str]] = {
    "genre": listed(
        "crime drama, family comedy, western, ghost story, love story, spy thriller, war film, road movie, musical, "
        "courtroom drama, science fiction film, heist film, costume drama, mystery, black comedy, sports film, "
        "adventure film, school comedy, sea story, chamber piece"
    ),
    "job": listed(
        "sailor, teacher, baker, postman, nurse, detective, pianist, farmer, clockmaker, lawyer, tailor, librarian, "
        "taxi driver, fisherman, reporter, cook, boxer, priest, painter, soldier, bank clerk, photographer, "
        "lighthouse keeper, mechanic, student, chess player, gardener, widow, translator, schoolgirl"
    ),
    "kind": listed("retired, young, lonely, former, country, travelling, nervous, stubborn, homesick, old"),
    "pair": listed(
        "two sisters, two brothers, three friends, a father and his son, an aunt and her niece, a married couple, "
        "two strangers, four students, a mother and her daughters, a band of thieves, two rival cooks, an orphan and a dog"
    ),
    "who": ["a {kind} {job}", "a {job}", "a {kind} {job}", "{pair}"],
    "aim": listed(
        "find a lost letter, sell an old house, cross the border, win a local contest, bury a relative, open a small shop, "
        "solve a murder, rob a bank, save the village school, return a stolen painting, learn to swim, catch a spy, "
        "hide from the police, build a boat, run a hotel, stage a play, find a missing child, pay an old debt, "
        "spend a winter alone, drive across the country, raise a foal, translate a diary, guard a bridge, "
        "repair a piano, survive a storm, win back a farm, start again abroad, keep a promise, cook for a wedding, "
        "prove a theory"
    ),
    "place": listed(
        "in a village by the sea, in a mountain town, in a border town, on a small island, in the far north, in the capital, "
        "on a night train, in an old hotel, on a farm, in a port, in the desert, in a boarding school, on a river boat, "
        "in a suburb, in the provinces, behind the front, in a lighthouse, in a theatre, at a country fair, in the snow"
    ),
    "event": listed(
        "a letter arrives, a stranger knocks at the door, the money is gone, a storm breaks, an old friend returns, "
        "the war begins, a body is found, somebody lies, a child disappears, the train stops, the harbour freezes, "
        "the police call, the roof burns, a rival appears, a secret comes out, the summer ends"
    ),
    "plot": ["{who} [who has to|who sets out to|trying to] {aim} {place}", "{who} [trying to|who must] {aim}"],
    "year": listed(
        "1948, 1953, 1957, 1962, 1966, 1971, 1974, 1979, 1983, 1988, 1991, 1996, 2002, 2007, 2011, 2016, 2021"
    ),
    "when": listed(
        "last night, on Sunday, last week, on a rainy evening, this morning, on Friday, during the holidays, yesterday, "
        "in April, after work, on my birthday, two days ago"
    ),
    "where": listed(
        "at home, on a plane, at the cinema, in a half-empty hall, on television, at a festival, on my laptop, in a tent, "
        "at the film club, at a friend's house, in the old theatre, on a long train ride"
    ),
    "hall": listed(
        "at the cinema, in a half-empty hall, on television, at a festival, at the film club, in the old theatre, "
        "in the park, at the museum"
    ),
    "relative": listed(
        "sister, brother, mother, father, uncle, cousin, wife, husband, neighbour, flatmate, grandmother, son, daughter, "
        "colleague"
    ),
    "minutes": listed("82, 88, 93, 97, 104, 110, 116, 121, 127, 134, 142"),
    "director": [f"{first} {last}" for first in FIRST_NAMES for last in LAST_NAMES],
}

# Drawn once a review, and the same wherever it comes up again.
FACTS = ("genre", "year", "when", "where", "hall", "relative", "minutes", "director")


@dataclass(frozen=True)
class Group:
    """What a remark can be about, and what is then said of it: (good, bad) adjectives and predicates.

    A subject with a + is plural. Predicates carry {s}, {es}, {ies}, {is}, {has} and {their} where they agree with it.
    """

    subjects: list[str]
    adjectives: tuple[list[str], list[str]]
    predicates: tuple[list[str], list[str]]


PLAYERS = Group(
    listed(
        "the acting, the cast, the lead actress, the lead actor, the villain, the two leads+, the child actors+, "
        "the performances+, the supporting cast, the heroine, the minor characters+, the old father"
    ),
    (
        listed(
            "superb, convincing, moving, charming, natural, warm, believable, graceful, tender, funny, "
            "touching, radiant, subtle, excellent, wonderful, compelling, sincere, brilliant"
        ),
        listed(
            "wooden, stiff, lifeless, unconvincing, grating, bland, awkward, forced, annoying, "
            "miscast, dull, mechanical, shrill, dreadful, flat, irritating, clumsy, weak"
        ),
    ),
    (
        [
            "make{s} every scene count",
            "hold{s} the whole film together",
            "win{s} you over at once",
            "light{s} up the screen",
            "{has} real presence",
            "bring{s} out the best in the script",
            "deserve{s} a prize",
            "carr{ies} even the difficult scenes",
            "say{s} more with a look than others with a speech",
            "steal{s} every scene",
            "break{s} your heart without effort",
            "gave me goosebumps",
        ],
        [
            "{is} lost in every scene",
            "drag{s} the whole film down",
            "put{s} you off at once",
            "sink{s} every scene",
            "{has} no presence",
            "waste{s} a decent script",
            "ruin{s} even the good lines",
            "stumble{s} through the difficult scenes",
            "read{s} the lines as if from a card",
            "get{s} on your nerves",
            "never show{s} a real feeling",
            "left me cold",
        ],
    ),
)

WRITING = Group(
    listed(
        "the script, the story, the plot, the dialogue, the jokes+, the ending, the final twist, the humour, the romance, "
        "the characters+, the premise, the speeches+, the narration, the mystery"
    ),
    (
        listed(
            "clever, witty, original, gripping, thoughtful, honest, sharp, funny, surprising, moving, "
            "intelligent, fresh, inventive, delightful, satisfying, memorable, absorbing, heartfelt"
        ),
        listed(
            "predictable, silly, contrived, shallow, muddled, stale, pointless, lazy, tedious, "
            "confusing, sentimental, absurd, preachy, hollow, clumsy, forgettable, boring, childish"
        ),
    ),
    (
        [
            "kept me guessing",
            "stay{s} with you for days",
            "treat{s} the audience as adults",
            "reward{s} attention",
            "grow{s} out of real life",
            "come{s} together beautifully",
            "take{s} risks that pay off",
            "{has} something to say",
            "made me laugh out loud",
            "moved me to tears",
            "hit{s} the right note every time",
            "touch{es} a nerve",
        ],
        [
            "gave everything away",
            "fade{s} from memory within minutes",
            "treat{s} the audience as fools",
            "punish{es} attention",
            "make{s} no sense",
            "fall{s} apart completely",
            "borrow{s} from better films",
            "{has} nothing to say",
            "made me groan out loud",
            "bored me to tears",
            "miss{es} the mark every time",
            "insult{s} the viewer",
        ],
    ),
)

CRAFT = Group(
    listed(
        "the camera work, the music, the editing, the lighting, the direction, the sets+, the costumes+, the images+, "
        "the special effects+, the sound, the action scenes+, the songs+, the landscapes+, the design"
    ),
    (
        listed(
            "beautiful, elegant, precise, stunning, inventive, striking, gorgeous, assured, "
            "imaginative, splendid, vivid, haunting, stylish, masterly, lovely, impressive, magical, "
            "breathtaking"
        ),
        listed(
            "ugly, sloppy, cheap, amateurish, clumsy, drab, murky, lifeless, careless, uninspired, "
            "chaotic, crude, incompetent, bland, monotonous, poor, messy, unbearable"
        ),
    ),
    (
        [
            "{is} a joy from start to finish",
            "lift{s} even the smallest scenes",
            "create{s} a mood of {their} own",
            "{is} worth the ticket alone",
            "show{s} great care",
            "serve{s} the story at every turn",
            "bring{s} the place to life",
            "took my breath away",
            "look{s} like a labour of love",
            "could hang in a museum",
        ],
        [
            "{is} a mess from start to finish",
            "spoil{s} even the best scenes",
            "kill{s} every mood",
            "{is} not worth a ticket",
            "show{s} no care at all",
            "get{s} in the way of the story",
            "suck{s} the life out of the place",
            "gave me a headache",
            "look{s} like a school project",
            "belong{s} in a bin",
        ],
    ),
)

PACE = Group(
    listed(
        "the pace, the first half, the second half, the middle part, the last act, the opening, the long finale, "
        "the chase, the dinner scene, the flashbacks+, the quiet scenes+, the final hour"
    ),
    (
        listed(
            "gripping, brisk, tense, absorbing, exciting, perfect, confident, thrilling, captivating, "
            "engaging, magnificent, masterly, flawless, rewarding"
        ),
        listed(
            "slow, sluggish, tedious, boring, endless, uneven, dull, dreary, tiresome, repetitive, "
            "exhausting, disappointing, aimless, shapeless"
        ),
    ),
    (
        [
            "flew by",
            "kept me on the edge of my seat",
            "never waste{s} a minute",
            "build{s} to a great climax",
            "pull{s} you in",
            "could have gone on for hours",
            "held the whole hall spellbound",
            "{is} over far too soon",
        ],
        [
            "seemed to last for ever",
            "sent me to sleep",
            "waste{s} our time",
            "lead{s} nowhere",
            "push{es} you out",
            "should have been cut",
            "emptied half the hall",
            "go{es} on far too long",
        ],
    ),
)

GROUPS = (PLAYERS, WRITING, CRAFT, PACE)

QUALITIES = (
    listed(
        "charm, wit, warmth, tension, heart, style, grace, energy, imagination, feeling, atmosphere, suspense, tenderness, "
        "intelligence, depth, good humour, surprises, ideas, beauty, life"
    ),
    listed(
        "clichés, padding, noise, self-pity, clumsy symbols, repetition, boredom, confusion, preaching, vanity, nonsense, "
        "cheap tricks, pretension, shouting, false notes, dead ends, loose ends, empty talk, bad jokes, plot holes"
    ),
)
