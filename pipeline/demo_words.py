"""Words of the demo corpus: tables whose rows hold what belongs together, columns separated by ` | `.

Columns are inserted into the genres of `pipeline/demo.py`, which name them; `[a|b]` inside a column is a choice.
"""

GIRLS = """Ada | Alma | Anna | Bella | Clara | Dora | Edith | Ella | Emma | Flora | Greta | Hanna | Ida | Iris | Jane
Julia | Lena | Lily | Lucy | Mara | Mina | Nora | Olga | Paula | Rosa | Ruth | Sara | Tilda | Vera | Wanda | Zoë
Chloé"""
BOYS = """Adam | Albert | Anton | Arthur | Ben | Bruno | Carl | Conrad | Daniel | Edgar | Emil | Felix | Finn | Fred
Gus | Henry | Hugo | Ivan | Jacob | Jonas | Leo | Martin | Nils | Oscar | Otto | Paul | Peter | Simon | Theo | Tom
Victor | Walter | José | René"""
# Name and pronouns.
PEOPLE = "\n".join(
    [f"{name} | she | her | her" for name in GIRLS.replace("\n", " | ").split(" | ")]
    + [f"{name} | he | him | his" for name in BOYS.replace("\n", " | ").split(" | ")]
)
TOWNS = """Elmford | Stonebridge | Millbrook | Ashwell | Fernhill | Oakham | Greywater | Larkfield | Thornby
Willowdale | Saltmouth | Birchley | Hazelton | Mossburn | Ravenscar | Foxholm | Appleby | Windmere | Sandwick
Kingsbarrow | Heatherton | Redcliff | Marshside | Cloverton"""
PLACES = """the old mill | the harbour | the market square | the station | the stone bridge | the school \
| the castle ruin
the lake | the village well | the orchard | the lighthouse | the river bend | the vineyard | the quarry | the chapel
the ferry | the forest clearing | the town library | the railway crossing | the windmill | the fish market \
| the inn"""
KIN = """grandmother | grandfather | mother | father | aunt | uncle | brother | sister | cousin | godmother \
| teacher"""
DISHES = """apple pie | plum cake | onion soup | fresh bread with butter | potato salad | roast chicken | rice pudding
lentil stew | gingerbread | fish soup | vegetable pie | noodle soup | baked cheese | cinnamon cake | cherry tart
poppy seed cake | pumpkin soup | mushroom stew | toast with jam | cold ham | cabbage and sausage | fried trout"""
MORALS = """Slow water also reaches the sea | Every knot was once a straight rope \
| Whoever asks is never lost for long
A good plan fits on a small piece of paper | Many hands make the evening longer | The first step wears out no shoes
What you mend yourself you never lose | A kind word costs nothing and buys a lot | Luck likes people who get up early
Nobody is too small to help | Small keys open large doors | You learn the song by singing it | Rain also ends
Look twice before you give up once | The longest winter has a last day | A shared load is half a load
Curious people never grow old | Good things need a little time | Even masters began with mistakes"""
SPOTS = """under the stairs | behind the stove | in the hayloft | beneath the kitchen table \
| between the sacks of flour
in the garden shed | on top of the cupboard | under a pile of leaves | behind the water barrel \
| in a corner of the barn
behind the woodpile | below the window bench | at the bottom of the garden | inside the hollow pear tree
behind a row of books | at the back of the cart | in the tall grass near the gate | on the shelf above the door
in the potato cellar | behind the washing | below the balcony | behind the curtain | beside the rabbit hutch"""
WHEN = """one [cold|grey|foggy] [morning|evening] in [October|November|January] \
| on a [bright|warm|windy] day in [May|June]
last [autumn|winter|spring|summer] | early on [Monday|Tuesday|Thursday|Saturday] \
| one [quiet|rainy|stormy] [night|afternoon]
on the [first|last] day of [March|April|September|the holidays] | shortly before [dinner|supper|midnight|sunrise]"""
# Thing, what it is made of or looks like, what it is for.
THINGS = """key | iron | to open the garden gate
lantern | brass | to light the path home
kettle | copper | to boil water for tea
ladder | wooden | to reach the highest apples
basket | willow | to carry eggs to the market
blanket | woollen | to keep warm at night
umbrella | striped | to stay dry on the way to school
kite | paper | to play above the meadow
fiddle | polished | to make music at the wedding
compass | silver | to find the way through the fog
whistle | tin | to call the sheep
spade | heavy | to dig the potato beds
needle | bone | to mend the sails
hammer | steel | to repair the fence
map | faded | to look for the hidden spring
drum | painted | to lead the parade
bell | bronze | to call the children to supper
scarf | knitted | to stay warm on the sleigh
bucket | dented | to fetch water from the well
broom | straw | to sweep the yard
notebook | leather | to write down the songs of the birds
pencil | blue | to draw the ships
saddle | embroidered | to ride to the next village
rope | hemp | to tie up the boat
sledge | red | to race down the hill
telescope | long | to watch the stars
teapot | china | to serve the guests
purse | velvet | to pay for the bread
jar | glass | to keep the honey
wheelbarrow | rusty | to move the firewood
net | fine | to catch river fish
candle | thick | to read after dark
axe | sharp | to split the logs
pillow | soft | to rest after the long walk
flute | slender | to play for the dancers
ring | golden | to please the bride"""
# One, many, looks, food, home, habit.
ANIMALS = """fox | foxes | red | mice and berries | a den under the roots | hunt at dusk
hedgehog | hedgehogs | prickly | beetles and worms | a heap of dry leaves | sleep through the winter
owl | owls | grey | mice and moths | a hollow beech | fly without a sound
squirrel | squirrels | quick | nuts and seeds | a round nest of twigs | bury their treasures in autumn
rabbit | rabbits | brown | clover and carrots | a burrow in the bank | drum on the ground when danger is near
badger | badgers | broad | roots and grubs | a deep tunnel | clean their rooms every week
otter | otters | sleek | fish and crabs | a hole by the river | slide down muddy slopes for fun
deer | deer | shy | grass and buds | a thicket of hazel | listen with large ears
bear | bears | heavy | honey and salmon | a cave in the rocks | scratch their backs on trees
mouse | mice | tiny | grain and crumbs | a gap behind the wall | nibble at everything
cat | cats | black | milk and sardines | an attic full of boxes | purr when they are content
dog | dogs | shaggy | bones and biscuits | a kennel in the yard | bark at strangers
goat | goats | stubborn | thistles and bark | a stable of planks | climb where nobody else can
donkey | donkeys | patient | oats and straw | a shed beside the road | stop when the load is too great
hen | hens | speckled | corn and beetles | a coop on stilts | scratch in the dust all day
duck | ducks | white | weeds and snails | a bed of reeds | dive with their tails in the air
crow | crows | clever | seeds and cherries | a nest in the poplar | remember every face
stork | storks | tall | frogs and lizards | a wheel on the chimney | fly south in August
frog | frogs | green | flies and gnats | a pond with lilies | sing when rain is coming
turtle | turtles | slow | lettuce and berries | a sandy hollow | carry their houses with them
hare | hares | nervous | herbs and turnips | a furrow in the field | run in sharp turns
beaver | beavers | busy | bark and water plants | a lodge of mud and branches | build dams across streams
swallow | swallows | restless | flies and midges | a nest of clay under the roof | cross the sea twice a year
mole | moles | velvety | worms and larvae | a chamber below the lawn | feel their way with pink noses"""
# Who, where, what they sell, what they do, with what.
TRADES = """baker | bakery | dark bread and sweet rolls | kneads the dough before sunrise | a wooden bowl
smith | smithy | horseshoes and hinges | beats the glowing iron on the anvil | a heavy hammer
tailor | workshop | coats and waistcoats | cuts the cloth along a chalk line | a pair of sharp scissors
carpenter | yard | tables and benches | planes the boards until they are smooth | a fine saw
potter | studio | bowls and jugs | turns the wet clay on the wheel | a loop of wire
miller | mill | flour and bran | pours the grain between the stones | a broad shovel
fisher | hut | herring and crabs | casts the nets beyond the rocks | a curved knife
gardener | greenhouse | roses and seedlings | waters the beds before the heat comes | a pair of clippers
shoemaker | shop | boots and sandals | stitches the soles with waxed thread | a small awl
weaver | loft | cloth and ribbons | sends the shuttle through the threads | an old loom
beekeeper | shed | honey and beeswax | lifts the combs out of the hives | a veil and a pipe
printer | cellar | posters and calendars | sets the letters line by line | a tray of lead type
glassblower | glassworks | bottles and marbles | blows bubbles of liquid glass | an iron pipe
shepherd | cabin | wool and cheese | leads the flock to the upper pasture | a crooked staff
clockmaker | parlour | watches and clocks | oils the tiny wheels under a lens | a pair of tweezers
cook | kitchen | soups and stews | tastes every pot twice | a long ladle
barber | salon | haircuts and gossip | sharpens the razor on a strap | a steel comb
farmer | barn | milk and potatoes | feeds the cows in the dark | a fork and a pail
painter | attic | portraits and signs | mixes blue and ochre on a board | a thin brush
bookbinder | back room | albums and diaries | sews the pages and glues the spines | a jar of paste
cooper | warehouse | barrels and tubs | bends the staves into an iron hoop | a mallet
saddler | stall | belts and harnesses | punches holes into the leather | a row of needles"""
# What it was like, and what followed from it.
WEATHER = """rain was drumming on the roofs | the lanes were full of puddles
snow had fallen all night | every fence wore a white cap
a thick fog lay over the fields | nobody could see farther than ten steps
the sun was shining from a cloudless sky | the stones were warm to the touch
a strong wind was blowing from the west | hats rolled across the square
thunder was growling behind the hills | the horses stamped in their boxes
frost had painted flowers on the windows | breath hung in the air like smoke
a soft drizzle was falling | the leaves were gleaming
the heat lay heavy on the land | even the flies were tired
hail had rattled down at noon | petals lay scattered on the ground
mist was rising from the river | the boats looked like sleeping birds
the moon stood large and yellow over the trees | the path was as clear as by day
a rainbow stood over the valley | children ran outside to count the colours
dark clouds were gathering | the swallows flew low over the grass
the storm had just passed | broken branches covered the road
dew was glittering on the webs of the spiders | shoes got wet in the meadow"""
# Scene, three things to see, a sound, a smell.
SCENES = """the market | pyramids of oranges | striped awnings | women with heavy bags | sellers praise their plums \
| fresh parsley and smoked ham
the harbour | ropes as thick as arms | gulls on wooden posts | rusty anchors | masts creak in the wind | salt and tar
the forest | ferns between the trunks | beams of dusty light | a carpet of moss | a woodpecker hammers \
| resin and mushrooms
the classroom | maps on the wall | rows of little desks | a globe on the cupboard | chalk squeaks | ink and wet coats
the railway station | suitcases in a row | a clock with a white face | porters in caps | a loudspeaker mumbles \
| coffee and hot metal
the village kitchen | onions on a string | pans above the hearth | a cat on the windowsill | the soup bubbles \
| thyme and bread
the library | shelves up to the ceiling | green reading lamps | a ladder on wheels | pages rustle \
| paper and floor polish
the mountain hut | boots in front of the door | bunks with checked blankets | a barrel of rainwater | cowbells ring \
| hay and wood smoke
the flower shop | buckets of tulips | ribbons of every colour | ferns in the window | water drips \
| lilies and damp earth
the toy shop | dolls with painted cheeks | a tin railway | wooden horses | a music box plays | varnish and sugar
the winter garden | palms in tubs | a pond with goldfish | iron chairs | a canary sings | oranges and warm soil
the attic | trunks with brass locks | a cracked mirror | portraits without frames | beams groan | dust and lavender
the beach | shells in long lines | footprints near the water | a boat turned upside down | waves hiss \
| seaweed and sun"""
