"""Genres of the demo corpus: texts with choices, `[a|b]`, and slots, `{name}`, which `pipeline/demo.py` fills."""

GENRES = [
    # a thing is lost and found
    """[{When}, {name} wanted {use}, but the {material} {thing} was [gone|missing|nowhere to be seen].
    |Once upon a time {name} owned a {material} {thing} and [loved it dearly|needed it {use}]. {When}, it was gone.
    |In the morning, {name} reached for the {material} {thing}, but it was no longer there.
    |"Who has seen my {material} {thing}?" asked {name} {when}.]
    [{Weather}, and {effect}.|]
    [{He} searched {spot} and found [only dust|nothing but a button|a very surprised spider].
    |First {he} looked {spot}, then at {place}, but [without luck|in vain].
    |{Name2} came to help and looked {spot}, where there was [nothing but cobwebs|only an old glove].]
    ["When did you [use|see] it last?" asked {name2}. {Name} [thought hard|blushed|closed {his} eyes] and [could not
    say|remembered {place}|remembered the evening before].
    |They turned the whole house upside down.|]
    [At last|In the end|Just before {he} gave up], the {thing} [turned up|was found] {spot2}[, covered with flour
    |, wrapped in a towel|, wet but unharmed|].
    [The [puppy|kitten|magpie|goat] had hidden it there.|{Name2} had borrowed it and forgotten to say so.
    |Somebody had left it there to dry.|{Name}'s {kin} had put it there for safety.]
    [From that day on, {name} put it back in its place every evening.
    |Now {he} was able {use}, and [all was well|{he} did].|{Name} laughed and shared {dish} with {name2}.
    |Since then the {thing} has had a hook of its own beside the door.]""",
    # something breaks and is mended
    """[{When}, {trouble} {broke}.|In the morning, {weather}, and to make matters worse {trouble} {broke}.
    |Once upon a time in {town}, {trouble} {broke}, and [nobody knew what to do|everybody had a different idea].
    |The old people of {town} still [tell|speak] of the day when {trouble} {broke}.]
    [{Name} [was there first and|rolled up {his} sleeves and|took a deep breath and] {wrong}.
    |{Name}, who [never gave up easily|liked difficult things|lived nearby], {wrong}.]
    [Then {name2} [came along|arrived] with [a {material} {thing}|a good idea|a {coat} {animal} on a lead].
    |{Name2} watched for a while and [smiled|nodded|began to think].
    |The {trade} {name2} heard about it and came running.]
    ["We must find the [cause|reason]," said {name2}.|"Two heads are better than one," said {name2}.|]
    [Together they|Side by side the two of them|With a little patience, {name} and {name2}] {right}[, and|. Soon
    |. An hour later|. Before supper] {after}.
    [{Name} never forgot that day.|"That was easy," said {name}, and both of them laughed.
    |{Name}'s {kin} cooked {dish} for everyone.|"{Moral}," said {name2} on the way home.]""",
    # a wish comes true
    """[Once upon a time there lived in {town} a young {trade} called {name}, who wanted {wish}.
    |{Name} had one [great|secret] wish: {wish}.|All {name} ever wanted was {wish}.
    |In the morning, {name} woke up and decided {wish}.]
    [But|Unfortunately,] {obstacle}.
    ["You will never do it," [laughed|said] {name2}.|"Let it be," said {his} {kin}. "There is {dish} for dinner."
    |Some people shook their heads, but {name2} [believed in {him}|lent {him} a {material} {thing}].|]
    [So {name}|But {name} did not give up. {He}|"Just wait," thought {name}, who] {deed}.
    [It took [a whole winter|seven weeks|longer than expected].|{Weather}, and {effect}, but that did not matter.|]
    [{When}, the great moment came: {name}|At last {he}|When [spring|autumn|summer] came, {name}] {result}.
    [Even {name2} clapped.|"{Moral}," said {his} {kin}.|Nobody in {town} laughed any more.
    |That evening the whole family ate {dish}.]""",
    # a fable
    """[Once upon a time a {animal} and a {animal2} lived [near {place}|side by side|in the same valley].
    |The old {animal} and the young {animal2} were neighbours.
    |A {coat} {animal} lived in {home}[, not far from {place}|].]
    [The {animal2} often came to visit.|They both loved {food2}.|{Weather}, and {effect}.|]
    [{When}, the|One day the|It is said that the] {animal} {fault}.
    [Many passed by, but only the {animal2} stopped. It|The {animal2} heard of it and
    |The {animal2}, who was {coat2} and wise,]
    {act}.
    [Everybody waited to see what would happen.|"Do not [worry|be sad]," said the {animal2}.|]
    [So the|In the end the|And really, the] {animal} {outcome}.
    [Since then they have shared {food}.|The two of them are friends to this day.|The birds still sing about it.|]
    [This shows that|And the lesson is:|Remember:] {lesson}.""",
    # she opened something
    """She opened the [box|drawer|parcel|suitcase|cupboard|trunk] [slowly|with trembling fingers|without a sound].
    [It had stood {spot} for years.|Her {kin} had sent it from {town}.|{Weather}, and she had nothing else to do.]
    Inside [lay|was] a {material} {thing}[, wrapped in old paper,|, as good as new,|] and a note: ["{Moral}."
    |"For {girl}, {use}."|"Do not forget {place}."]
    ["How lovely!" said {girl}.|{Girl} read it twice.|{Girl} could hardly believe her eyes.]
    [She showed it to {girl2}, who knew a story about it.|She ran to {place} to tell {girl2}.
    |She took it with her {when}.]
    [From then on, she used it {use}.|Later they ate {dish} and talked about old times.
    |Years later she gave the {thing} to her own children.|She has kept the note to this day.]""",
    """She opened the [window|door|curtain] and looked out: {weather}, and {effect}.
    ["A good day {use}," said {girl}.|{Girl} took the {material} {thing} and went outside.
    |{Girl} smiled and put on her coat.]
    [On the way to {place} she met {girl2}, who was carrying {dish}.
    |A {coat} {animal} [followed|greeted] her to {place}.|At {place}, {girl2} was already waiting.]
    ["{Question}" asked {girl2}. "{Answer}," said {girl}.|They talked about {goods} and about the {trade} of {town}.
    |"Have you heard that {trouble} {broke}?" asked {girl2}.]
    [When the bells rang, they walked home.|In the evening they were tired but happy.
    |They promised to meet again tomorrow.]""",
    # a trade
    """{Name} is [the only|the best|the youngest] {trade} in {town}. [Every day|Six days a week|Summer and winter],
    {he} {work}.
    [The {shop} stands near {place}.|{His} {shop} is small but tidy.|{He} learned it from {his} {kin}.]
    [{He} never works without {tool}.|On the wall hangs an old picture of {place}.
    |A {coat} {animal} keeps {him} company.]
    People come [from {town2}|from far away|in every weather] to buy {goods}.
    ["What is the secret?" asked {name2} {when}. "[Patience|Good light|A calm hand|An early start]," {name} answered.
    |{Name2} [helps {him}|visits {him}] on Saturdays and brings {dish}.|"{Moral}," {he} likes to say.]
    [In the evening {he} [locks the door|sweeps the floor] and goes home [content|tired but happy].|]""",
    # a place
    """For {name}, {scene} is the [finest|most peaceful|most exciting] place in [the world|{town}].
    [There {he} sees|What {he} likes best are] {see1}, {see2} and {see3}.
    [{Sound}, and the air smells of {smell}.|The air smells of {smell}, and [in the background|somewhere] {sound}.]
    [{Name2} the {trade} sometimes comes along with {dish}.|{When}, {he} found a {material} {thing} there.
    |A {coat} {animal} has made its home there.|{He} goes there with {his} {kin} [every Sunday|after school].]
    ["[Listen|Look|Wait]," {he} [whispers|says] to {name2}, "[this is better than {dish}|nothing ever changes here|here
    I can think]."
    |In {town2}, where {name2} lives, there is nothing like it.|]
    [{He} always stays until it gets dark.|{He} would not exchange it for a palace.
    |And each time {he} discovers something new.]""",
    # how to do something
    """[Do you want to|Would you like to|{Name2} asked me how to] {task}? You need {needs}.
    [{Step1}. {Step2}. {Step3}. Finally, {step4}.|First, {step1}. {Step2}. Next, {step3}, and then {step4}.
    |{Step1}, then {step2}. After that, {step3}. {Step4}.]
    [Remember: {tip}.|{Name}, the {trade} of {town}, adds: {tip}.|My {kin} always says: {tip}.
    |One piece of advice: {tip}.]
    [When {name} tried it {when}, it worked at once.|{Name} learned it [from {his} {kin}|in {town}] {when}.
    |It is just the thing for a [rainy|quiet|long] [afternoon|evening].|Afterwards you have earned {dish}.]""",
    # a question
    """"{Question}" asked {name} [{when}|at dinner|on the way to {place}|while {weather}].
    [{Name2} put down the {material} {thing}.|{His} {kin} looked up from {dish}.
    |The {trade} {name2} [laughed|thought about it].|]
    "{Answer}," [was the answer|said {name2}].
    ["And what do {animals} eat?" asked {name}. "{Food}," said {name2}, "and they {habit}."
    |"Then I know why {animals} {habit}," said {name}. "[Perhaps|Not quite]," {name2} replied.
    |{Name} wrote it down [in a notebook|on the wall {spot}].]
    [They walked on in silence.|"You know everything!" said {name}.|"{Moral}," {name2} added.
    |That night {name} explained it to {his} {kin}.]""",
    # in a shop
    """"Good [morning|afternoon|evening]," said {name}, [entering|and stepped into] the {shop} of the {trade}. "Do
    you have {goods}?"
    ["Of course," said {name2}.|"The best in {town}," said {name2}.|"Only today," said {name2}.]
    ["What do they cost?" "[Three|Five|Nine|Twelve] coins," {he2} answered.
    |{He2} put {tool} aside and wiped {his2} hands.|]
    [{Name} searched {his} pockets, but found only a {material} {thing}.|{Name} counted the money twice.
    |"I need them for my {kin}," {name} explained.]
    ["Then pay [tomorrow|next week]," said {name2} [kindly|with a smile].|"Take some {dish} as well," said {name2}.
    |"Look outside," said {name2}. {Weather}, and {effect}.]
    [{Name} thanked {him2} and walked home past {place}.|They talked until it was time to close.
    |Since that day, the two of them have been friends.]""",
    # a letter
    """Dear {name2}, [thank you for your letter.|how are you?|I have been in {town} for a week now.
    |greetings from {town}!]
    [Imagine: {when}|Just think: {when}|You will not believe it, but {when}], {trouble} {broke}. [At first
    |Of course] I {wrong}.
    Then [my {kin}|the {trade}|a neighbour] [came to help|had an idea], we {right}, and {after}.
    [Today {weather}, and {effect}.|Otherwise it is quiet here.|I have also seen a {coat} {animal} near {place}.]
    [Please bring the {material} {thing} when you come, {use}.|Do you still want {wish2}?
    |There will be {dish} when you visit us.]
    [With love|Best wishes|Yours|See you soon], {name}""",
    # a day
    """In the morning, {weather}, and {effect}. [{Name} put on {his} boots and walked
    |So {name} set out early and went] to {place}
    with a {material} {thing} [under {his} arm|in {his} bag].
    [On the way {he} met a {coat} {animal} that was looking for {food}.|Halfway {he} shared {dish} with a {animal}.]
    [At noon|A little later] {he} visited {name2}, the {trade}, and [bought {goods}|learned how one {work}
    |admired {tool}].
    [They sat in the sun and told stories.|"{Question}" asked {name2}, but {name} had no answer.
    |They remembered the day when {trouble} {broke}.]
    In the evening {he} was [tired but happy|glad to be home], and {his} {kin} had made {dish2}.""",
    # a master and an apprentice
    """The old {trade} of {town} was [famous for {goods}|a quiet man|a woman of few words|known in the whole country].
    {When}, young {name} knocked at the door of the {shop} and asked, "May I learn from you?"
    ["First show me your hands," said the master.|"Can you get up early?" asked the master.
    |The old eyes looked {him} up and down.]
    [For a year {he} only swept the floor.|{He} burned {his} fingers and made a hundred mistakes.
    |At first nothing succeeded.]
    ["{Moral}," the master said every evening.|Then {he} was allowed to hold {tool}.
    |{His} {kin} sent {dish} to cheer {him} up.]
    [Today it is {name} who {work}.|Now people from {town2} ask for {name} when they want {goods}.]""",
    # an old thing
    """The old {thing} had [lain|stood|waited] {spot} for many years, and nobody [cared about it|remembered it] any
    more.
    {When}, {name} found it and wiped off the dust. [It was still beautiful.|"You can still be useful," {he} said.]
    [{Name2} offered [ten|twenty|thirty] coins for it, but {name} shook {his} head.
    |"Throw it away," said {name2}, but {name} refused.|The {trade} polished it until it shone.]
    [{He} needed something {use}, and now {he} had it.|{He} took it to {place} and showed it to {his} {kin}.]
    ["{Moral}," said {name}.|A year later nobody in {town} would have done without it.
    |Since that day it has never gathered dust again.]""",
    # an animal
    """[{Animals} love {food}, and they {habit}.|The {animal} loves {food} and lives in {home}.
    |A {animal} needs little: {food} and {home}.]
    [{Name} once [watched|met] one near {place}.|{When}, {name} discovered one behind the house.
    |The {trade} {name} used to keep one.]
    [It was {coat} and not at all afraid.|It looked hungry, so {he} gave it some {dish}.
    |{Weather}, and it was [shivering|looking for shelter].]
    ["Do you know that {animals2} {habit2}?" asked {name2}.|{Name2} held {his2} breath.|"Quiet," whispered {name2}.]
    [The {animal} waited for a moment and [vanished|ran off] towards {place2}.
    |After a while it [fell asleep|came closer].]
    [{Name} never saw it again, but [thought of it often|drew a picture of it].
    |Since then it has come back every [spring|evening].]""",
    # a journey
    """[{When}, {name}|Once upon a time {name}|The old road was empty when {name}] travelled from {town} to {town2}
    [by train|on foot|on a cart|by bicycle] [to sell {goods}|to see {scene}|with a {material} {thing} for {his} {kin}].
    [{Weather}, and {effect}.|The way was long, but {he} sang to pass the time.]
    [Near {place}, a {coat} {animal} [blocked the way|sat in the road].|Halfway, {he} got lost and had to ask a {trade}.
    |At {place}, {he} met {name2}, who was going the same way.]
    [They shared {dish} and [became friends|talked about {goods2}].
    |"Keep to the left," said a voice, "and do not stop before dark."|{He} rested for an hour and ate {dish}.]
    [Late in the evening {he} saw the lights of {town2}.|When {he} arrived at last, {name2} opened the door.]
    ["{Moral}," thought {name}.|{He} slept better than ever before.|The next morning {he} was ready {use2}.]""",
]
