"""Vocabularies of the advice: who asks, about which thing, by which means, and the steps of each kind of work."""

from __future__ import annotations

from dataclasses import dataclass

from temper.data.mini.review_words import listed


@dataclass(frozen=True)
class Work:
    """One kind of work. In its steps {thing} is a kind and an object, {object} the object alone, {means} what it takes.

    A thing is one of `kinds` with one of `objects`; the three lists of steps follow one another.
    """

    verb: str
    past: str
    kinds: list[str]
    objects: list[str]
    means: list[str]
    steps: tuple[list[str], list[str], list[str]]


NAMES = listed(
    "Mara, Omar, Lena, Peter, Ruth, Samuel, Nadia, Victor, Irene, Karl, Dora, Simon, Paula, Henry, Vera, Leo, Agnes, "
    "Bruno, Helga, Martin, Sofia, Conrad, Alma, George, Tessa, Ralph, Judith, Emil, Olive, Frank, Rosa, Walter, Celia, "
    "Adam, Flora, Hector, Miriam, Oswin, Norma, Gustav"
)
DAYS = listed("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
PLACES = listed(
    "in the yard, in the kitchen, at the market, by the river, on the roof, in the cellar, at school, near the church, "
    "behind the house, in the workshop"
)

WORKS = [
    Work(
        "clean",
        "cleaned",
        listed("copper, brass, silver, tin, iron, bronze, steel, dented"),
        listed("kettle, spoon, tray, candlestick, bell, jug, teapot, bowl, lamp, ladle"),
        listed("lemon, vinegar, salt, ash, soda, chalk, soap, sand"),
        (
            ["wet the {thing} well", "wash the dust off the {thing}", "warm the {thing} a little"],
            ["rub it with {means}", "scrub it gently with {means}", "spread {means} over it"],
            ["dry it with a cloth", "rinse it in cold water", "wipe the {object} until it shines"],
        ),
    ),
    Work(
        "polish",
        "polished",
        listed("oak, walnut, pine, cherry, maple, painted, carved, scratched"),
        listed("table, chair, cupboard, bench, shelf, desk, chest, door, frame, cradle"),
        listed("beeswax, resin, linseed oil, shellac, turpentine, varnish, tallow, olive oil"),
        (
            ["sand the {thing} lightly", "brush the dust from the {thing}", "take the {thing} out of the sun"],
            ["put {means} on a soft rag", "work {means} into the wood", "lay on {means} along the grain"],
            ["leave it overnight", "buff the {object} with wool", "do it once more a day later"],
        ),
    ),
    Work(
        "mend",
        "mended",
        listed("woollen, cotton, linen, velvet, silk, torn, knitted, striped"),
        listed("coat, shirt, skirt, glove, scarf, jacket, curtain, apron, blanket, pillow"),
        listed("strong thread, a patch, fine yarn, a bent needle, ribbon, buttons, tape, lace"),
        (
            ["turn the {thing} inside out", "iron the {thing} flat", "lay the {thing} on the table"],
            ["pin the edges and take {means}", "close the hole with {means}", "sew along the seam with {means}"],
            ["tie a small knot", "cut off what is left over", "wash the {object} by hand"],
        ),
    ),
    Work(
        "plant",
        "planted",
        listed("young, red, climbing, dwarf, wild, early, potted, tall"),
        listed("rose, tomato, bean, pear tree, fern, thistle, lily, cabbage, vine, currant"),
        listed("compost, gravel, peat, lime, straw, bone meal, clay, leaf mould"),
        (
            ["dig a hole for the {thing}", "soak the roots of the {thing}", "find a sunny place for the {thing}"],
            ["fill the hole with {means}", "mix the soil with {means}", "put {means} around the roots"],
            ["water it every evening", "press the earth down", "tie the {object} to a stick"],
        ),
    ),
    Work(
        "cook",
        "cooked",
        listed("fresh, smoked, frozen, stuffed, whole, salted, sliced, small"),
        listed("trout, chicken, pumpkin, turnip, cauliflower, rabbit, leek, goose, eggplant, carp"),
        listed("butter, thyme, garlic, cream, mustard, honey, pepper, cider"),
        (
            ["wash the {thing}", "heat a pan for the {thing}", "cut the {thing} in half"],
            ["season it with {means}", "add {means} and stir", "cover it with {means}"],
            ["let it simmer for an hour", "serve the {object} hot", "bake it until it is brown"],
        ),
    ),
    Work(
        "repair",
        "repaired",
        listed("broken, leaking, rusty, wooden, plastic, rattling, loose, heavy"),
        listed("pump, bicycle, clock, ladder, barrow, fence, radio, gutter, stove, umbrella"),
        listed("wire, glue, a screwdriver, grease, solder, nails, a clamp, rope"),
        (
            ["take the {thing} apart", "look closely at the {thing}", "turn the {thing} upside down"],
            ["fix the loose part with {means}", "use {means} on the crack", "join the pieces with {means}"],
            ["try it out carefully", "put the {object} together again", "wait until it holds"],
        ),
    ),
    Work(
        "paint",
        "painted",
        listed("garden, metal, plaster, brick, clay, old, narrow, outer"),
        listed("gate, wall, pot, railing, shed, boat, sign, shutter, bucket, letterbox"),
        listed("a wide brush, a roller, white lead, oil paint, a sponge, whitewash, a stencil, enamel"),
        (
            ["scrape the {thing} clean", "cover the floor under the {thing}", "wash the {thing} with soda"],
            ["go over it with {means}", "begin at the top with {means}", "use {means} in long strokes"],
            ["let the {object} dry for two days", "give it a second coat", "keep the rain off it"],
        ),
    ),
    Work(
        "store",
        "stored",
        listed("dried, ripe, winter, golden, sweet, bitter, sour, green"),
        listed("apples, onions, plums, walnuts, mushrooms, quinces, carrots, herbs, cherries, chestnuts"),
        listed("paper, sawdust, jars, hay, a sack, wax, baskets, crates"),
        (
            ["sort the {thing}", "spread the {thing} out to air", "pick the {thing} on a dry day"],
            ["pack them with {means}", "keep them cool with {means}", "protect them with {means}"],
            ["look at them every week", "keep the {object} from light", "leave some room between them"],
        ),
    ),
]

# Frames of answers, courteous ones with what may close them, and the two kinds that lack courtesy.
COURTEOUS = [
    "Gladly, {name}: {first}, then {second}, and {third}.",
    "Of course, {name}. First {first}, then {second} and {third}.",
    "Thank you for asking, {name}. You should {first}, {second} and {third}.",
    "Dear {name}, please {first} and {second}. After that, {third}.",
    "With pleasure, {name}: {first}; {second}; {third}.",
]
CLOSING = ["", "", " Good luck with the {object}!", " I hope this helps.", " Enjoy your {object}, {name}!"]
CURT = ["Just {second}.", "Take {means}.", "{second}, that is all.", "With {means}, how else?"]
RUDE = [
    "Everybody knows that. {first}, then {second}.",
    "What a silly question. {second} and {third}.",
    "Do not bother me with the {object}. {first} and {second}.",
    "Can you not read? {second}, then {third}.",
    "Such nonsense again. {first}, {second}, done.",
]
