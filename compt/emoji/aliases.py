"""Icon names of the older sets that no published list of names knows, and the Unicode (CLDR) name of each.

'-' stands for an icon to leave out: it is cropped in its package, or shows what its name does not say.
"""

from __future__ import annotations

import re

_FXEMOJI = """
2hearts: two hearts
americasglobe: globe showing Americas
anguish: anguished face
anticlockwiseupwardsanddownwardsarrows: counterclockwise arrows button
aok: OK hand
arrowrightwardsdownwards: right arrow curving down
arrowrightwardsupwards: right arrow curving up
asiaaustraliaglobe: globe showing Asia-Australia
backwithleftwardsarrow: BACK arrow
ballotboxboldcheck: check box with check
ballottboxwithballott: ballot box with ballot
banknotedollar: dollar banknote
banknoteeuro: euro banknote
banknotepound: pound banknote
banknoteyen: yen banknote
bellcancellation: bell with slash
blackdownpointingdoublearrow: fast down button
blackdroplet: droplet
blackleftpointingarrow: reverse button
blackleftpointingdoublearrow: fast reverse button
blackpushpin: pushpin
blackquestionmark: red question mark
blackrightpointingarrow: play button
blackrightpointingdoublearrow: fast-forward button
blackrosette: rosette
blackskullcrossbones: skull and crossbones
blackuppointingdoublearrow: fast up button
blonde: person blond hair
bolt: high voltage
bookmarktab: bookmark tabs
bouquetofflowers: bouquet
bow: -
bowing: person bowing
bride: person with veil
bullhorn: loudspeaker
bunny: rabbit face
bunny-ears: people with bunny ears
bunnyside: rabbit
catside: cat
cellphone: mobile phone
chartdownwardstrend: chart decreasing
chartupwardstrend: chart increasing
chartupwardstrendyen: chart increasing with yen
chilipepper: hot pepper
chineseflag: flag of China
cjkunifiedideograph-a: Japanese reserved button
cjkunifiedideograph-b: Japanese open for business button
cjkunifiedideograph-c: Japanese prohibited button
cjkunifiedideograph-d: Japanese vacancy button
cjkunifiedideograph-e: Japanese passing grade button
cjkunifiedideograph-f: Japanese no vacancy button
cjkunifiedideograph-g: Japanese not free of charge button
cjkunifiedideograph-h: Japanese monthly amount button
cjkunifiedideograph-i: Japanese free of charge button
cjkunifiedideograph-j: Japanese application button
cjkunifiedideograph-k: Japanese discount button
clock12oclock: twelve o'clock
clock12thirty: twelve-thirty
clock1oclock: one o'clock
clock1thirty: one-thirty
clock2oclock: two o'clock
clock2thirty: two-thirty
clock3oclock: three o'clock
clock3thirty: three-thirty
clock4oclock: four o'clock
clock4thirty: four-thirty
clock5thirty: five-thirty
clock6oclock: six o'clock
clock6thirty: six-thirty
clock7oclock: seven o'clock
clockwiserightwardsleftwardscirclearrows: repeat button
clockwiserightwardsleftwardscirclearrowsone: repeat single button
closedmailboxlowered: closed mailbox with lowered flag
closedmailboxraised: closed mailbox with raised flag
confetti: confetti ball
construct: construction worker
contact: bust in silhouette
contact2: busts in silhouette
controlknob: control knobs
crying: crying face
devilhorns: smiling face with horns
diamondshapewithdotinside: diamond with a dot
dissapointedrelief: sad but relieved face
dogside: dog
doubleexclaimationmark: double exclamation mark
down: backhand index pointing down
downpointingsmallredtrisngle: downwards button
dragonhead: dragon face
dragonside: dragon
eightspokedasterix: eight-spoked asterisk
endwithleftwardsarrow: END arrow
envelopedownarrowabove: envelope with arrow
europeafricaglobe: globe showing Europe-Africa
evergreen: evergreen tree
exclaimationquestionmark: exclamation question mark
faxicon: fax machine
fishcakeswirl: fish cake with swirl
fistedhand: oncoming fist
flexbicep: flexed biceps
floppydisk2: floppy disk
folder: file folder
forkknife: fork and knife with plate
framewithtiles: framed picture
frontfacingchick: front-facing baby chick
frown: person frowning
girlgirl: women holding hands
girlguy: woman and man holding hands
guyguy: men holding hands
gma: old woman
gpa: old man
greatbritainflag: flag of United Kingdom
grineyes: grinning face with smiling eyes
grinsquint: grinning squinting face
grinsweat: grinning face with sweat
grintears: face with tears of joy
grinwide: grinning face with big eyes
guapimao: person with skullcap
halo: smiling face with halo
hampster: hamster
hands: open hands
handup: person raising hand
headmassage: person getting massage
heartarrow: heart with arrow
heartblue: -
heartgreen: green heart
heartlefttip: heart suit
heartpurple: purple heart
heartribbon: heart with ribbon
heartyellow: yellow heart
heavyexclaimationmarksymbol: red exclamation mark
heavylatincross: latin cross
heavymultiplicationsymbol: multiply
heels: high-heeled shoe
high5: raising hands
highspeedtrainbulletnose: bullet train
index: index pointing up
italianflag: flag of Italy
japaneseangrymask: goblin
kissclosedeyes: kissing face with closed eyes
kisseyes: kissing face with smiling eyes
koreaflag: flag of South Korea
leaffluttering: leaf fluttering in wind
left: backhand index pointing left
leftangerbubble: right anger bubble
leftmagnifyingglass: magnifying glass tilted left
leftwritinghand: writing hand
leopardside: leopard
lockandkey: locked with key
loudlycrying: loudly crying face
lowerleftpen: pen
lowerleftpencil: pencil
makeupbag: clutch bag
manltepiececlock: mantelpiece clock
mansshirt: t-shirt
markschaptersymbol: part alternation mark
medicalmask: face with medical mask
mensrunner: running shoe
mensshoe: man's shoe
meridianglobe: globe with meridians
monkeyhear: hear-no-evil monkey
monkeysee: see-no-evil monkey
monkeyspeak: speak-no-evil monkey
mouseside: mouse
musicascend: musical notes
musicdescend: musical note
negativesquaredlatincaptiala: A button (blood type)
negativesquaredlatincaptialb: B button (blood type)
negativesquaredlatincaptialo: O button (blood type)
neutral: neutral face
nogesture: person gesturing NO
nooneunder18symbol: no one under eighteen
notebookdecorativecover: notebook with decorative cover
okgesture: person gesturing OK
onarrowleftright: ON! arrow
onebuttonmouse: computer mouse
openfolder: open file folder
openmailboxlowered: open mailbox with lowered flag
openmailboxraised: open mailbox with raised flag
opticaldiscicon: optical disk
outbox: outbox tray
page: page facing up
pages: page with curl
perservere: persevering face
phonerightarrowleft: mobile phone with arrow
pigside: pig
pigsnout: pig nose
pinkwallet: purse
poo: pile of poo
portablestereo: radio
potablewatersystem: potable water
pout: person pouting
pouting: enraged face
present: wrapped gift
printericon: printer
racecar: racing car
raisedhandpartfingers: vulcan salute
raisedhandsfingerssplayed: hand with fingers splayed
reminder: reminder ribbon
reversehandmiddlefinger: middle finger
right: backhand index pointing right
rightmagnifyingglass: magnifying glass tilted right
rightspeaker: speaker low volume
ringingbell: bell
russianflag: flag of Russia
saggitarius: Sagittarius
sandals: woman's sandal
screamfear: face screaming in fear
silhouetteohjapan: map of Japan
sixpointedstarwithdot: dotted six-pointed star
sleuthspy: detective
smallfrown: slightly frowning face
smallsmile: slightly smiling face
smileeyes: smiling face with smiling eyes
smiletongue: face savoring food
snowmountains: snow-capped mountain
soonwithrightarrow: SOON arrow
spanishflag: flag of Spain
speaker3soundwaves: speaker high volume
speakercancellation: muted speaker
speakeronesoundwave: speaker medium volume
speechbubble: speech balloon
squaredup: UP! button
stormcloud: cloud with lightning
studiomic: studio microphone
sunraincloud: sun behind rain cloud
sunrays: sun
sweatsplash: sweat droplets
swimming: person swimming
telephonereceiver2: telephone receiver
tennisball: tennis
thoughtbaloon: thought balloon
tie: necktie
tigerside: tiger
tired: tired face
tongueout: face with tongue
tongueoutwink: winking face with tongue
topwithupwardsarrow: TOP arrow
toykotower: Tokyo tower
turban: person wearing turban
up: backhand index pointing up
uppointingsmallredtrisngle: upwards button
videocasette: videocassette
waitress: person tipping hand
waningbibbousmoon: waning gibbous moon
wave: water wave
waving: waving hand
whiteexclaimationmark: white exclamation mark
whitestar: star
whitesunsmallcloud: sun behind small cloud
winking: winking face
keyboard: musical keyboard
wiredkeyboard: keyboard
womansshirt: woman's clothes
spurtingwhale: spouting whale
"""

_OTHERS = """
asterisk: keycap *
keycap-asterisk: keycap *
keycap-pound: keycap #
anticlockwise-arrows-button: counterclockwise arrows button
division-sign: divide
down-button: downwards button
exclamation-mark: red exclamation mark
question-mark: red question mark
face-with-stuck-out-tongue-and-closed-eyes: squinting face with tongue
flag-for-black-flag: black flag
flag-for-chequered-flag: chequered flag
flag-for-crossed-flags: crossed flags
flag-for-rainbow-flag: rainbow flag
flag-for-triangular-flag: triangular flag
flag-for-white-flag: white flag
flag-for-flag-macao-sar-china: flag of Macao SAR China
flag-for-flag-st-vincent-and-grenadines: flag of St. Vincent & Grenadines
flag-for-flag-cocos-islands: flag of Cocos (Keeling) Islands
flag-for-flag-turkey: flag of Turkiye
grinning-cat-face: grinning cat
kissing-cat-face: kissing cat
laptop-computer: laptop
man-in-suit-levitating: person in suit levitating
man-with-chinese-cap: person with skullcap
man-with-skullcap: person with skullcap
minus-sign: minus
multiplication-sign: multiply
plus-sign: plus
people-with-bunny-ears-partying: people with bunny ears
pouting-face: enraged face
school-backpack: backpack
smiling-cat-face-with-heart-eyes: smiling cat with heart-eyes
smiling-face-with-open-mouth-and-closed-eyes: grinning squinting face
"""


def _read(table: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in table.strip().splitlines())


ALIASES: dict[str, str] = _read(_FXEMOJI) | _read(_OTHERS)


def unicode_name(icon: str) -> str:
    """The name to look an icon up by: its alias, 'flag of X' for 'flag-for-flag-x', or the icon's own name."""
    if icon in ALIASES:
        return ALIASES[icon]
    return re.sub(r"^flag-for-(flag-)?", "flag of ", icon)
