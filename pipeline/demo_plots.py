"""Plots, questions and instructions of the demo corpus: tables as in `pipeline/demo_words.py`."""

# What, what went wrong with it, what did not help, what did, how it ended.
TROUBLES = """the wheel of the cart | cracked on a stone | tied it up with string, but the knot slipped \
| carved a new spoke from an ash branch | the cart rolled on as if nothing had happened
the roof of the barn | began to leak | put a bucket under the hole, but it was full within an hour \
| nailed fresh shingles over the gap | not one drop came through
the bell in the tower | refused to ring | pulled the rope with both hands, but nothing moved \
| chased a family of pigeons out of the tower | the bell sang across the whole valley
the rowing boat | took in water | scooped it out with a cup, but the water rose faster \
| pressed warm tar into the crack | the boat floated like a duck
the clock in the hall | stopped at noon | shook it, but the hands stayed where they were \
| brushed the dust out of the tiny wheels | it ticked louder than ever
the garden gate | got stuck | pushed with one shoulder, but the hinge only groaned \
| rubbed a little oil into the hinge | the gate swung open at the touch of a finger
the dragon kite | was caught in a tall birch | threw a stick at it, but the stick got stuck as well \
| leaned two ladders together | the kite climbed higher than the church
the stove | filled the kitchen with smoke | opened all the windows, but everybody kept coughing \
| pulled an old nest out of the chimney | the fire burned bright and clean
the footbridge | was washed away | tried to jump across, but landed in the mud \
| laid a pine trunk over the stream | even the mule crossed without fear
the flock | escaped through a hole in the hedge | ran after the sheep, but they only ran faster \
| rattled a pail of oats | all the sheep came trotting home
the well | ran dry | lowered a longer rope, but the bucket came up empty \
| dug a channel from the spring on the hill | clear water splashed into the trough
the lock of the cellar | jammed | banged on the door, but that only woke the baby \
| smeared the key with candle wax | the lock opened with a soft click
the water mill | stood still | waited for more rain, but the sky stayed blue \
| cleared the branches out of the mill stream | the great stones turned again
the scarecrow | lost its head in a gale | stood in the field for an hour, but got cold feet \
| sewed a new head from a flour sack | the crows stayed away all summer
the lamp of the lighthouse | went out | lit a candle, but the draught blew it out \
| cleaned the wick and filled the tank | three ships found their way into port
the school piano | was out of tune | played more softly, but the children held their ears \
| tightened every string with a small wrench | the songs sounded sweet again
the tent | collapsed in the night | held up the pole, but soon felt too tired \
| drove the pegs deep into the ground | they slept until the birds woke them
the billy goat | climbed onto the roof | shouted at it, but the goat just went on chewing \
| put a cabbage at the foot of the ladder | the goat came down for breakfast
the pump | froze | kicked it, but only hurt a toe \
| poured hot water over the handle | the water ran again with a gurgle
the bag of letters | fell into a puddle | waved the letters in the air, but the ink began to run \
| hung them on a line beside the stove | every word could be read
the dough | did not rise | waited another hour, but it lay there like a stone \
| carried it to a warm corner | it swelled over the rim like a cloud
the little train | could not go on | looked for the guard, but nobody came \
| rolled a fallen tree off the rails | the engine whistled and everyone cheered
the fence | blew over | propped it up with a broom, but the broom broke \
| set new posts in holes filled with gravel | the cows stayed where they belonged
the swing | came loose | made a bigger knot, but it opened again \
| fetched a strong chain from the smithy | the children flew up to the leaves
the puppet | lost an arm | tried to glue it, but the glue would not dry \
| whittled a new arm out of lime wood | the puppet waved at the whole audience
the snowman | began to melt | fanned it with a hat, but it shrank even more \
| packed it in fresh snow from the shady side of the house | it kept smiling until March"""
# What somebody wanted, what stood in the way, what they did about it, what came of it.
WISHES = """to learn to swim | the deep water was frightening | practised every evening close to the shore \
| swam across the whole lake
to bake a birthday cake | there was no sugar in the house | sweetened the dough with honey \
| carried the cake to the table, still warm
to see the sea | it lay three days away | saved every coin in a jar and set out on foot | stood barefoot in the waves
to sing in the choir | {his} voice trembled in front of people | sang to the cows until the fear was gone \
| sang all alone on the feast day
to win the summer race | the others had longer legs | ran up the hill each day before breakfast \
| crossed the line first
to play the trumpet | the neighbours complained about the noise | practised on the far side of the meadow \
| played at a wedding, where even the neighbours danced
to grow the largest pumpkin | snails ate the young leaves | collected the snails at night by the light of a torch \
| needed two friends to lift the pumpkin
to read the strange book in the attic | its letters were foreign and crooked | learned five of them a day \
| read the first chapter aloud to the family
to catch a trout | the hook stayed empty all morning | sat still and listened to the water \
| pulled out a fish as long as an arm
to paint the mountain | the light changed every minute | came back each day at the same hour \
| hung the picture over the fireplace
to build a raft | {he} had never held a saw | asked for advice and carried planks for a month \
| drifted out to the island
to tame the wild pony | it shied at every step | left an apple at the fence each evening | rode home without a bridle
to find the source of the river | the path ended among thorns | followed the sound of falling water \
| drank from the place where the river is born
to spend a night in the forest | every rustle sounded like a wolf | learned the voice of each bird and beast \
| slept until the sun was high
to write to the queen | half of the words were hard to spell | copied them from a dictionary \
| received an answer with a scarlet seal
to learn to whistle | only air came out | tried it again on every walk | whistled so well that a blackbird answered
to open a small shop | there was only one table to begin with | sold buttons and thread at the fair \
| wrote {his} own name over a door
to skate on the pond | {he} fell at every turn | pushed an old chair over the ice | skated a perfect circle
to cross the hanging bridge | {he} felt dizzy halfway | looked at the far bank and counted the steps \
| waved from the other side
to knit a pair of mittens | one always came out larger | counted each stitch aloud \
| gave the mittens away for Christmas
to learn the names of the stars | clouds covered the sky for weeks | studied an old chart instead \
| could name every light above the chimney
to nurse the injured sparrow | it would not eat | kept it warm in a box of wool | watched it fly over the roofs"""
# What one animal did, what the other did, what came of it, what it teaches.
FABLES = """had a thorn in its foot | pulled the thorn out with great care | shared its supper every evening \
| a small kindness is never forgotten
boasted of being the fastest of all | proposed a race to the river | fell asleep on the way and lost \
| slow steps also reach the goal
wanted to keep the whole meadow for itself | moved away without a word | felt lonely before the week was over \
| a shared meadow has more sun
was frightened by a thunderstorm | told one story after another | forgot to be afraid \
| fear grows small in good company
had eaten its winter food by December | opened its own larder | brought back twice as much in spring \
| what is given in winter returns in summer
laughed at everybody who looked different | bit through the net in which it was trapped \
| never laughed at others again \
| the one you mock today may help you tomorrow
had lost its way in the fog | called from a hill until the fog lifted \
| found the way home and told everyone about it \
| a friend is better than a map
told lies about its neighbours | asked for the truth in front of everybody | turned scarlet and apologised \
| a lie has a short breath
was too proud to ask for help | waited nearby and said nothing | asked at last and was done in a minute \
| asking costs less than pride
dreamed of flying | led it up to the top of a tower | saw the whole land and came down content \
| the best view is worth one climb
could not sleep because of the noise | taught the young ones a quieter game \
| slept so deeply that it missed breakfast \
| polite words close loud mouths
found a shiny coin and hid it | found nothing but offered a walnut | gave the coin away for a good meal with company \
| nobody can eat gold
planned to steal the farmer's plums | shook its head and stayed at home | came back hungry, wet and ashamed \
| honest food tastes best"""
# Question and answer.
QUESTIONS = """Why do leaves fall in autumn? \
| A tree drinks less in winter, so it lets its leaves go and saves its strength
Why is the sea salty? | Rivers wash salt out of the rocks and carry it to the sea, where it stays
Why does bread rise? | Yeast eats a little of the sugar in the flour and fills the dough with bubbles
Why do we see lightning before thunder? | Light travels much faster than sound, so the flash arrives first
How do bees make honey? | They gather nectar from flowers and fan it with their wings until it is thick
Why does ice float? | Water grows a little when it freezes, so ice is lighter than the water around it
Why do stars twinkle? | The air above us is never still, and it bends their light to and fro
Where does rain come from? | The sun warms the sea, the water rises as vapour, and the clouds carry it over the land
Why do cats purr? | Mostly because they are happy, but sometimes to calm themselves
How does a candle burn? | The flame melts the wax, the wick drinks it, and the heat turns it into burning gas
Why is the sky blue? | The air scatters blue light more than red light, so it reaches us from everywhere
Why do birds fly south? | Insects are rare in winter, so the birds follow the food and the warmth
What makes a rainbow? | Each drop of rain splits the sunlight into its colours and sends them back to us
How does a compass know the north? | Its needle is a small magnet, and the earth itself is a very large one
Why does the moon change its shape? \
| We see only the part that the sun is shining on, and that part changes each night
Why do onions make us cry? | Cutting them sets free a sharp gas, and tears wash it out of our eyes
How do trees drink? | Their roots take up water, and thin pipes under the bark lift it to the leaves
Why do mirrors show our face? | They are so smooth that the light comes back in good order
Why is snow white? | A flake has so many tiny edges that it throws back every colour at once
How do spiders walk on their webs? | They step on the dry threads and avoid the sticky ones"""
# What to do, what it takes, four steps, advice.
HOWTOS = """make mint tea | a kettle, a pot and [fresh|dried] mint \
| boil the water [until the lid rattles|over a low flame] \
| put [two|three] spoons of leaves into the pot | pour the water over them and wait for [four|five|six] minutes \
| strain the tea and [sweeten it with honey|add a slice of lemon] | never boil the leaves, or the tea turns bitter
plant beans | a spade, a string and a handful of beans | dig a row [as deep as a finger|one hand wide] \
| lay the beans [one step apart|along the string] | cover them with [loose soil|dark compost] \
| water them [every evening|whenever the ground is dry] | wait until the last frost is over
light a fire | dry twigs, some bark and one match | build a [small tent|little tower] of twigs over the bark \
| leave a gap [for the air|on the side of the wind] | light the bark [from below|with a steady hand] \
| add [thicker branches|a log] when the flames are high | keep a bucket of water near you
fix a puncture | a patch, some glue and a pump | take the tyre off [with two spoons|carefully] \
| hold the tube under water and look for [bubbles|the leak] \
| dry it, [rub it with sandpaper|clean it] and glue the patch on \
| pump up the tyre [and listen|and spin the wheel] | press the patch for a full minute
cook a vegetable soup | carrots, leeks, potatoes and a large pot \
| wash the vegetables and [cut them small|chop them] \
| fry the leeks [in butter|in a little oil] until they are soft | add the rest and cover it with [water|broth] \
| let it simmer for [half an hour|forty minutes] | add the salt at the end
wash a woollen jumper | cool water, mild soap and a towel | dissolve the soap in [cool|hardly warm] water \
| press the jumper [gently|again and again], but never wring it | rinse it [twice|until the water is clear] \
| roll it in a towel and dry it [lying flat|in the shade] | heat makes wool shrink
build a bird box | six boards, nails and a drill | saw the boards [to size|along the lines] \
| drill a hole [as wide as a plum|in the front board] | nail the sides together and [hinge the lid|screw on the lid] \
| hang it [out of reach of cats|facing east] | use no paint inside
press flowers | a heavy book and two sheets of paper | pick the flowers [on a dry day|around noon] \
| spread them [between the sheets|face down on the paper] | close the book and [put bricks on it|weigh it down] \
| wait for [two|three] weeks | thin petals keep their colour best
bake flat bread | flour, water, salt and a hot pan | mix [three cups|a bowl] of flour with salt and water \
| knead the dough [for ten minutes|until it is smooth] | roll it out [thinly|with a bottle] \
| bake each side [for two minutes|until brown spots appear] | let the dough rest under a cloth
read a map | a map and a compass | turn the map [until north is up|with the compass] \
| look for [a church or a bridge|something that you can also see] \
| follow [the thin lines|the blue line of the river] with a finger \
| count [the crossings|your steps] as you go | stop as soon as something does not fit
polish shoes | a brush, a soft cloth and some wax | brush off the [dry mud|dust] \
| rub in the wax [in small circles|sparingly] \
| let it dry for [a quarter of an hour|ten minutes] | shine them [with the cloth|until you see your face] \
| old wax is better than too much wax
make a paper boat | one sheet of paper | fold the sheet [in half|down the middle] \
| turn both corners [down|to the centre] \
| fold up the [two edges|brims] and open the hat | pull the points apart [slowly|with both hands] \
| wax on the bottom keeps it dry"""
