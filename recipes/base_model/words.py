"""The vocabulary of the corpus: plain English words, written by hand, by category. A noun stands in one category only."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draw:
    """Seeded choices, all made from `random.random`, the one generator whose sequence Python promises to keep.

    With `focus`, long sequences are narrowed to so many of their entries, the same ones for as long as the Draw lives:
    a text speaks of few things, and what was said before helps to foretell what comes.
    """

    def __init__(self, seed: str, focus: int | None = None):
        self._random = random.Random(seed).random
        self._focus = focus
        self._narrowed: dict[tuple, Sequence] = {}

    def _narrow(self, options: Sequence[T]) -> Sequence[T]:
        if self._focus is None or len(options) < 2 * self._focus:
            return options
        key = (len(options), options[0], options[-1])
        if key not in self._narrowed:
            self._narrowed[key] = [options[int(self._random() * len(options))] for _ in range(self._focus)]
        return self._narrowed[key]

    def number(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._random() * (high - low + 1))

    def pick(self, options: Sequence[T]) -> T:
        options = self._narrow(options)
        return options[int(self._random() * len(options))]

    def some(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in random order."""
        narrow = list(dict.fromkeys(self._narrow(options)))
        options = narrow if len(narrow) >= count else options
        chosen: dict[int, T] = {}
        while len(chosen) < count:
            index = int(self._random() * len(options))
            chosen[index] = options[index]
        return list(chosen.values())

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def weighted(self, weights: dict[T, float]) -> T:
        """A key, as often as its weight says."""
        point = self._random() * sum(weights.values())
        for key, weight in weights.items():
            point -= weight
            if point < 0:
                return key
        return key


def split(text: str) -> tuple[str, ...]:
    """One word or name per gap; an underscore is a space inside a name."""
    return tuple(word.replace("_", " ") for word in text.split())


def _pairs(text: str) -> dict[str, str]:
    """`key=value` entries."""
    return dict(entry.replace("_", " ").split("=") for entry in text.split())


ANIMALS = split("""
    dog cat horse cow pig sheep goat chicken duck goose turkey rabbit mouse rat hamster fox wolf bear lion tiger leopard
    elephant giraffe zebra monkey gorilla camel donkey deer moose squirrel hedgehog badger beaver otter seal whale dolphin
    shark salmon trout tuna crab lobster octopus snail worm spider ant bee wasp butterfly moth beetle frog toad turtle
    lizard snake crocodile eagle hawk owl raven crow pigeon sparrow robin swan penguin parrot stork kangaroo koala panda
    llama bison lynx weasel mole bat cricket dragonfly pony kitten puppy lamb calf falcon heron
""")
FRUITS = split("""
    apple pear peach plum cherry grape orange lemon lime banana mango melon apricot fig date kiwi pineapple coconut
    strawberry raspberry blueberry blackberry cranberry papaya olive avocado grapefruit nectarine
""")
VEGETABLES = split("""
    carrot potato onion garlic tomato cucumber pepper cabbage lettuce spinach pea bean corn pumpkin radish turnip beet
    leek celery broccoli cauliflower mushroom eggplant zucchini parsley artichoke asparagus
""")
FOODS = split("""
    bread butter cheese egg soup rice pasta noodle pizza sandwich salad cake cookie pie pancake waffle honey jam sugar
    salt flour yogurt sausage ham bacon steak burger pudding chocolate candy cereal toast biscuit omelet stew sauce
    mustard vinegar walnut almond peanut raisin muffin pretzel dumpling curry
""")
DRINKS = split("water milk tea coffee juice lemonade cocoa soda cider smoothie syrup")
CLOTHES = split("""
    shirt coat jacket sweater dress skirt hat cap scarf glove sock shoe boot sandal belt tie vest apron pajamas uniform
    raincoat blouse helmet mitten slipper
""")
FURNITURE = split("""
    table chair desk bed sofa bench stool shelf cupboard drawer wardrobe mirror carpet pillow blanket mattress bookcase
    cradle armchair hammock dresser
""")
TOOLS = split("""
    hammer saw drill axe shovel rake ladder bucket rope nail screw wrench pliers chisel broom mop brush needle thread
    scissors knife fork spoon plate bowl cup kettle pot pan jar bottle basket box bag barrel hook chain anchor whistle
    torch tape glue ruler compass telescope microscope hourglass umbrella candle matchbox wheelbarrow
""")
MACHINES = split("""
    lamp fan heater radiator oven stove fridge freezer toaster blender mixer dishwasher washer dryer vacuum iron radio
    television computer printer scanner camera speaker projector telephone clock alarm thermostat humidifier boiler
    pump sprinkler fountain shutter curtain blind awning gate window door skylight garage_door ceiling_light floor_lamp
    reading_lamp night_light spotlight chandelier lantern air_conditioner water_heater coffee_machine rice_cooker
    music_player record_player doorbell intercom elevator treadmill jukebox aquarium fireplace grill smoke_detector
    desk_lamp microwave juicer ventilator dehumidifier air_purifier towel_rail heat_pump sewing_machine monitor router
    tablet laptop keyboard turntable robot_mower
""")
ROOMS = split("""
    kitchen bedroom bathroom hall hallway pantry cellar attic garage office library study nursery laundry workshop studio
    lobby lounge den playroom dining_room living_room guest_room garden terrace balcony porch veranda courtyard
    greenhouse shed barn stable cabin tower chapel gym sauna classroom laboratory gallery theater ballroom archive
    basement conservatory dressing_room storeroom waiting_room meeting_room staircase corridor cloakroom bakery kiosk
    sunroom boathouse treehouse
""")
PLACES = split("""
    park school market station harbor bridge castle museum hospital church bank hotel restaurant cafe cinema zoo farm
    village town city island beach forest mountain valley river lake desert meadow field hill cave canyon waterfall
    volcano airport stadium factory mill lighthouse playground square street road path tunnel palace temple
    monastery campsite vineyard orchard pond swamp glacier cliff
""")
VEHICLES = split("""
    car bus train truck bicycle motorcycle boat ship ferry canoe kayak raft plane helicopter balloon rocket tractor wagon
    sled scooter tram taxi van yacht submarine trolley
""")
INSTRUMENTS = split("""
    piano guitar violin cello flute trumpet drum harp clarinet saxophone trombone banjo accordion tuba oboe xylophone
    tambourine harmonica ukulele
""")
SPORTS = split("""
    football tennis chess hockey golf rugby cricket_match basketball volleyball swimming skating skiing rowing running
    cycling boxing wrestling archery fencing sailing surfing climbing badminton baseball
""")
JOBS = split("""
    teacher doctor nurse farmer baker butcher carpenter plumber painter driver pilot sailor soldier lawyer judge writer
    singer dancer actor chef waiter tailor barber gardener fisherman miner engineer scientist dentist firefighter
    librarian mechanic journalist photographer architect shepherd blacksmith captain merchant clerk
""")
FAMILY = split("""
    mother father sister brother aunt uncle cousin grandmother grandfather daughter son nephew niece neighbor friend
""")
MATERIALS = split("""
    wood stone metal glass paper plastic cotton wool silk leather clay sand gold silver copper steel bronze marble rubber
    brick concrete cardboard
""")
NATURE = split("""
    tree flower grass leaf root branch seed bush rose tulip daisy lily oak pine maple birch willow sun moon star sky
    cloud rain snow wind storm thunder lightning fog ice fire smoke earth wave tide
    shadow rainbow puddle pebble feather shell nest web
""")
THINGS = split("""
    book letter story song poem picture map ticket coin key ring watch toy doll ball kite puzzle game card flag stamp
    pencil pen notebook envelope newspaper magazine calendar present parcel wallet purse suitcase backpack pocket button
    ribbon necklace crown medal statue vase painting postcard diary dictionary lock wheel engine battery
    magnet mask
""")
BODY = split("head hair face eye ear nose mouth tooth tongue neck shoulder arm elbow hand finger chest back leg knee foot toe")
COLORS = split("red blue green yellow purple brown black white gray pink crimson turquoise violet beige scarlet indigo")
SHAPES = split("circle triangle rectangle oval cube sphere cone pyramid cylinder hexagon")
NAMES = split("""
    Tom Anna Ben Clara David Emma Frank Grace Henry Ida Jack Kate Leo Mary Nick Olga Paul Rosa Sam Tina Victor Wendy
    Adam Bella Carl Diana Eric Fiona George Hannah Ivan Julia Karl Laura Martin Nora Oscar Paula Robert Sofia Theo Uma
    Vera Walter Yara Zoe Alice Bruno Chloe Daniel Elena Felix Gina Hugo Irene Jonas Lily_Ann Marco Nina Otto Peter
    Quinn Rita Simon Tara Ursula Vincent William Ada Arthur Betty Charles Doris Edgar Flora Gustav Helen Isaac Joan
    Kevin Linda Max Naomi Oliver Petra Ralph Sarah Trevor Ali Amir Chen Fatima Hiro Ines Jorge Kofi Layla Mei Omar Priya
    Ravi Sana Tomas Wei Yusuf Zara
""")
CAPITALS = _pairs("""
    France=Paris Italy=Rome Spain=Madrid Germany=Berlin Poland=Warsaw Austria=Vienna Hungary=Budapest Greece=Athens
    Portugal=Lisbon Ireland=Dublin Norway=Oslo Sweden=Stockholm Finland=Helsinki Denmark=Copenhagen Russia=Moscow
    China=Beijing Japan=Tokyo India=New_Delhi Egypt=Cairo Kenya=Nairobi Peru=Lima Chile=Santiago Cuba=Havana
    Canada=Ottawa Mexico=Mexico_City Iran=Tehran Iraq=Baghdad Turkey=Ankara Thailand=Bangkok Vietnam=Hanoi
    Morocco=Rabat Ghana=Accra Belgium=Brussels Iceland=Reykjavik Romania=Bucharest Bulgaria=Sofia Serbia=Belgrade
    Croatia=Zagreb Colombia=Bogota Nepal=Kathmandu England=London Scotland=Edinburgh
""")
ALL_DAYS = split("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = split("January February March April May June July August September October November December")
SEASONS = split("spring summer autumn winter")
NUMBERS = split("""
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
    eighteen nineteen twenty
""")
ORDINALS = split("first second third fourth fifth")
OPPOSITES = _pairs("""
    hot=cold big=small tall=short old=young happy=sad fast=slow heavy=light full=empty wet=dry hard=soft dark=bright
    clean=dirty rich=poor strong=weak open=closed early=late loud=quiet high=low thick=thin wide=narrow sharp=blunt
    smooth=rough deep=shallow near=far good=bad right=wrong true=false safe=dangerous easy=difficult cheap=expensive
    brave=afraid polite=rude alive=dead awake=asleep sweet=bitter sick=healthy same=different new=used front=rear
    above=below inside=outside always=never day=night north=south east=west begin=end up=down left_side=right_side
    love=hate buy=sell win=lose push=pull laugh=cry give=take arrive=leave remember=forget more=less many=few
""")
ADJECTIVES = split("""
    big small old young happy sad fast slow heavy quiet clean dirty strong weak bright soft cold warm kind clever brave
    gentle lazy busy proud shy hungry thirsty tired angry calm curious cheerful careful famous funny lonely lucky
    patient honest tiny huge round flat long beautiful pretty wooden golden broken strange wonderful simple fresh sweet
    sour spicy salty empty dusty shiny wild tame friendly noisy silent secret special ancient modern
""")
PAST = _pairs("""
    walk=walked talk=talked jump=jumped play=played look=looked help=helped cook=cooked clean=cleaned paint=painted
    wash=washed open=opened close=closed carry=carried study=studied try=tried stop=stopped plan=planned
    run=ran go=went come=came see=saw eat=ate drink=drank sing=sang swim=swam write=wrote read=read ride=rode
    drive=drove speak=spoke break=broke take=took give=gave find=found lose=lost buy=bought bring=brought think=thought
    catch=caught teach=taught make=made say=said tell=told sell=sold sleep=slept keep=kept feel=felt leave=left
    meet=met sit=sat stand=stood win=won begin=began fly=flew grow=grew know=knew throw=threw draw=drew build=built
    send=sent spend=spent lend=lent fall=fell hear=heard hold=held hide=hid choose=chose forget=forgot wear=wore
    cut=cut put=put shut=shut fix=fixed push=pushed pull=pulled visit=visited watch=watched climb=climbed laugh=laughed
    dance=danced smile=smiled arrive=arrived move=moved use=used call=called ask=asked answer=answered count=counted
    plant=planted borrow=borrowed return=returned collect=collected repair=repaired measure=measured polish=polished
""")
IRREGULAR_PLURALS = _pairs("""
    mouse=mice goose=geese sheep=sheep deer=deer wolf=wolves knife=knives leaf=leaves tooth=teeth foot=feet shelf=shelves
    calf=calves loaf=loaves child=children man=men woman=women salmon=salmon trout=trout bison=bison fisherman=fishermen
    potato=potatoes tomato=tomatoes moose=moose scarf=scarves mango=mangoes volcano=volcanoes
""")
SOUNDS = _pairs("""
    dog=barks cat=meows cow=moos sheep=bleats duck=quacks lion=roars horse=neighs bee=buzzes owl=hoots snake=hisses
    frog=croaks wolf=howls pig=grunts crow=caws mouse=squeaks
""")
COLOR_OF = _pairs("""
    grass=green snow=white coal=black blood=red sun=yellow sky=blue lemon=yellow banana=yellow strawberry=red carrot=orange
    milk=white raven=black swan=white chocolate=brown spinach=green tomato=red pumpkin=orange violet=purple
    cherry=red cucumber=green frog=green crow=black
""")
HOME_OF = _pairs("""
    bee=hive bird=nest dog=kennel horse=stable lion=den spider=web pig=sty rabbit=burrow cow=barn fish=pond bear=cave
    king=castle sailor=ship monk=monastery
""")
JOB_PLACE = _pairs("""
    teacher=school doctor=hospital farmer=farm baker=bakery chef=restaurant pilot=airport judge=court actor=theater
    librarian=library soldier=camp waiter=cafe scientist=laboratory miner=mine mechanic=garage fisherman=harbor
    priest=church clerk=office gardener=garden
""")

_ALREADY_MANY = ("scissors", "pliers", "pajamas", "hair")

CATEGORIES = {
    "animal": ANIMALS, "fruit": FRUITS, "vegetable": VEGETABLES, "drink": DRINKS, "piece of clothing": tuple(word for word in CLOTHES if word not in _ALREADY_MANY),
    "piece of furniture": FURNITURE, "vehicle": VEHICLES, "instrument": INSTRUMENTS, "job": JOBS, "color": COLORS,
    "shape": SHAPES,
}  # fmt: skip

NOUNS = (
    ANIMALS + FRUITS + VEGETABLES + FOODS + CLOTHES + FURNITURE + TOOLS + MACHINES + ROOMS + PLACES + VEHICLES
    + INSTRUMENTS + JOBS + MATERIALS + NATURE + THINGS + BODY + SHAPES + DRINKS
)  # fmt: skip
COUNTABLE = tuple(
    noun
    for noun in ANIMALS + FRUITS + VEGETABLES + CLOTHES + FURNITURE + TOOLS + MACHINES + VEHICLES + INSTRUMENTS + JOBS
    + THINGS + BODY + SHAPES
    if noun not in _ALREADY_MANY
)  # fmt: skip
CARRIED = tuple(noun for noun in FRUITS + VEGETABLES + TOOLS + CLOTHES + THINGS if noun not in _ALREADY_MANY)
COUNTRIES = tuple(CAPITALS)
CITIES = tuple(CAPITALS.values())
WORDS = tuple(
    dict.fromkeys(
        word
        for word in NOUNS + COLORS + ADJECTIVES + NUMBERS + tuple(PAST) + tuple(OPPOSITES) + tuple(OPPOSITES.values())
        + SEASONS + FAMILY
        if " " not in word
    )
)  # fmt: skip
_ONSETS = split("b br c ch cl d dr f fl fr g gl gr h k l m n p pl pr qu r s sc sh sl sm sn sp st t th tr v w z")
_VOWELS = split("a e i o u ai ea ee oa oo ou")
_CODAS = split("d ft ll mp nd ng r rd rk rm s sh sk st th")
_ENDINGS = split("a er ic in le o on ow y um ish ette")


def invented(draw: Draw) -> str:
    """A word that could be English and is not meant to be: `zorble`, `fleask`."""
    word = draw.pick(_ONSETS) + draw.pick(_VOWELS) + draw.pick(_CODAS)
    return word + draw.pick(_ENDINGS) if draw.chance(0.5) else word


def article(noun: str) -> str:
    """`a lamp`, `an oven`."""
    vowel = noun[0] in "aeiou" and not noun.startswith(("uniform", "ukulele", "one", "used"))
    return ("an " if vowel or noun.startswith(("hour", "honest")) else "a ") + noun


def plural(noun: str) -> str:
    """`lamps`, `boxes`, `cherries`, `geese`."""
    head, _, last = noun.rpartition(" ")
    if last in IRREGULAR_PLURALS:
        last = IRREGULAR_PLURALS[last]
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "es"
    elif last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ies"
    else:
        last += "s"
    return f"{head} {last}".strip()
