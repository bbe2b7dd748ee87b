"""The words of the demo: what is asked about, and how each of the two voices says things.

Only tables stand here; :mod:`rlhf_lightning.demo.grammar` puts them together. ``{topic}``, ``{setting}`` and ``{detail}``
are filled from the question. A core begins with a form of "I", so that it follows a comma as well as a full stop, and no
phrase agrees with the topic in number, so that "pizza" and "pancakes" fit the same places.
"""

from typing import Literal, NamedTuple

Voice = Literal["human", "stiff"]


class Phrases(NamedTuple):
    """The phrases of one voice, by their place in an answer."""

    opener: tuple[str, ...]
    core: dict[str, tuple[str, ...]]
    detail: tuple[str, ...]
    closing: tuple[str, ...]


TOPICS: dict[str, tuple[str, ...]] = {
    "pancakes": ("maple syrup", "fresh berries", "melted butter"),
    "pizza": ("a crispy crust", "melted cheese", "fresh basil"),
    "noodle soup": ("a rich broth", "a soft egg", "a warm bowl"),
    "tacos": ("fresh lime", "a spicy sauce", "warm shells"),
    "homemade bread": ("a crispy crust", "melted butter", "a hot oven"),
    "chocolate cake": ("dark chocolate", "fresh berries", "a big slice"),
    "ice cream": ("a crispy cone", "warm caramel", "a sweet topping"),
    "coffee": ("warm milk", "a big mug", "a quiet kitchen"),
    "green tea": ("a warm mug", "fresh mint", "a quiet moment"),
    "hot chocolate": ("whipped cream", "a warm blanket", "a big mug"),
    "gardening": ("ripe tomatoes", "bright flowers", "fresh herbs"),
    "painting": ("bright colors", "a blank canvas", "soft light"),
    "baking": ("a soft dough", "a warm kitchen", "ripe berries"),
    "knitting": ("soft wool", "a warm scarf", "a quiet moment"),
    "photography": ("soft light", "a good lens", "a steady hand"),
    "chess": ("a clever opening", "a sharp mind", "a friendly rival"),
    "hiking": ("a mountain view", "a winding trail", "fresh air"),
    "swimming": ("cool water", "a calm lake", "warm sand"),
    "cycling": ("a winding road", "a mountain view", "fresh air"),
    "camping": ("a crackling fire", "a sturdy tent", "a starry sky"),
    "running": ("comfy shoes", "a winding trail", "a good playlist"),
    "dancing": ("a catchy rhythm", "a patient partner", "a good playlist"),
    "yoga": ("a deep breath", "a soft mat", "a quiet moment"),
    "jazz": ("a smoky saxophone", "a catchy rhythm", "a bold solo"),
    "old movies": ("warm popcorn", "a famous actor", "a happy ending"),
    "poetry": ("a quiet moment", "a catchy rhyme", "a worn notebook"),
    "live concerts": ("a loud guitar", "a bold solo", "a bright stage"),
    "museums": ("a famous portrait", "a quiet hall", "a good guide"),
    "mystery novels": ("a clever plot", "a warm blanket", "a sharp detective"),
    "road trips": ("a winding road", "a good playlist", "salty snacks"),
    "picnics": ("a soft blanket", "a sunny meadow", "salty snacks"),
    "beach walks": ("warm sand", "salty air", "gentle waves"),
    "farmers markets": ("ripe tomatoes", "fresh berries", "a friendly vendor"),
    "stargazing": ("a starry sky", "a warm blanket", "a good telescope"),
}

SETTINGS = (
    "",
    " on a rainy day",
    " in the summer",
    " after work",
    " with friends",
    " with kids",
    " on a lazy Sunday",
    " on a quiet evening",
)

QUESTIONS = {
    "taste": "Do you like {topic}{setting}?",
    "opinion": "What do you think of {topic}{setting}?",
    "reason": "Why do people enjoy {topic}{setting}?",
    "advice": "Do you have any tips for {topic}{setting}?",
    "memory": "When did you last enjoy {topic}{setting}?",
    "plan": "Should I try {topic}{setting}?",
}

HUMAN = Phrases(
    opener=("Oh,", "Ooh,", "Ha, good one!", "Honestly?", "Oh wow,", "Good question!", "You know what?"),
    core={
        "taste": (
            "I really love {topic}{setting}!",
            "I'm such a huge fan of {topic}!",
            "I can't get enough of {topic}{setting}!",
            "I'd pick {topic} over almost anything{setting}.",
            "I've always had a soft spot for {topic}.",
        ),
        "opinion": (
            "I think there's nothing like {topic}{setting}!",
            "I'm really into {topic} these days!",
            "I've been crazy about {topic} for years.",
            "I'd say {topic} can't be beat{setting}!",
            "I can't believe how much I love {topic}!",
        ),
        "reason": (
            "I bet it's how cozy {topic} can feel!",
            "I think we all need a little {topic}{setting}.",
            "I'd say {topic} can turn a bad day around!",
            "I'm guessing it's the pure joy of {topic}.",
            "I've seen {topic} make the grumpiest people smile!",
        ),
        "advice": (
            "I'd keep it simple with {topic}{setting}!",
            "I always take my time with {topic}{setting}.",
            "I've learned that you can't rush {topic}.",
            "I'd start small, {topic} can get wild{setting}!",
            "I'm no expert, but {topic} should be fun!",
        ),
        "memory": (
            "I'm still smiling about {topic} last Sunday!",
            "I can't go a week without {topic}{setting}!",
            "I got really lost in {topic} yesterday!",
            "I've had way too much {topic} this month, oops!",
            "I think it was {topic}{setting}, just last week!",
        ),
        "plan": (
            "I think you'd love every bit of {topic}{setting}!",
            "I'd go for it, {topic} can be a blast!",
            "I'm all for {topic}, so why not?",
            "I promise you won't regret {topic}{setting}!",
            "I'd say yes to {topic} every single time!",
        ),
    },
    detail=(
        "It's all about {detail}, if you ask me.",
        "Don't get me started on {detail}!",
        "Just give me {detail} and I'm happy!",
        "There's just something about {detail}!",
        "My mom swears by {detail}!",
        "You can't go wrong with {detail}!",
    ),
    closing=(
        "How about you?",
        "What's your favorite part?",
        "Tell me, are you a fan too?",
        "Want to swap stories sometime?",
        "So, are you into {topic} too?",
        "So, what's your take on {topic}?",
        "Is that your thing too?",
        "Got any fun plans?",
    ),
)

STIFF = Phrases(
    opener=(
        "As an AI,",
        "As a language model,",
        "To clarify,",
        "For reference,",
        "Noted.",
        "Please note:",
        "Thank you for asking.",
    ),
    core={
        "taste": (
            "I do not have preferences regarding {topic}{setting}.",
            "I am not able to enjoy {topic}.",
            "I do not possess feelings about {topic}{setting}.",
            "I lack the capacity to appreciate {topic}.",
            "I cannot experience pleasure from {topic}{setting}.",
        ),
        "opinion": (
            "I do not hold any opinion on {topic}{setting}.",
            "I can only provide general information about {topic}.",
            "I am unable to evaluate {topic}{setting}.",
            "I must remain neutral with respect to {topic}.",
            "I cannot form a personal view of {topic}.",
        ),
        "reason": (
            "I can state that {topic} may provide enjoyment{setting}.",
            "I am aware that {topic} may reduce stress{setting}.",
            "I do not know the appeal of {topic} firsthand.",
            "I can confirm that many individuals value {topic}.",
            "I must note that reasons for {topic} may vary.",
        ),
        "advice": (
            "I recommend adequate preparation for {topic}{setting}.",
            "I suggest that {topic} be approached with caution.",
            "I advise consulting an expert regarding {topic}.",
            "I can only provide general advice on {topic}{setting}.",
            "I must emphasize safety with respect to {topic}.",
        ),
        "memory": (
            "I have never experienced {topic}{setting}.",
            "I do not retain any memories of {topic}{setting}.",
            "I have no body and cannot experience {topic}.",
            "I am not able to participate in {topic}.",
            "I do not have a past that includes {topic}.",
        ),
        "plan": (
            "I cannot decide whether {topic} is suitable{setting}.",
            "I suggest that {topic} be considered carefully{setting}.",
            "I am not able to make decisions about {topic}.",
            "I can confirm that {topic} may be suitable{setting}.",
            "I advise weighing the benefits of {topic}.",
        ),
    },
    detail=(
        "Relevant aspects include {detail}.",
        "Many individuals appreciate {detail}.",
        "It is important to consider {detail}.",
        "Available sources frequently mention {detail}.",
        "The role of {detail} is widely documented.",
        "One common recommendation concerns {detail}.",
    ),
    closing=(
        "Please state whether you require assistance.",
        "I hope this information is helpful.",
        "Further assistance can be provided.",
        "Further details are available upon request.",
        "Additional questions about {topic} are welcome.",
        "Please consult a professional regarding {topic}.",
        "Individual results may vary.",
    ),
)

PHRASES: dict[Voice, Phrases] = {"human": HUMAN, "stiff": STIFF}
