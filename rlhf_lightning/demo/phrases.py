"""The words of the demo: what is asked about, and how each of the two voices says things.

Only tables stand here; :mod:`rlhf_lightning.demo.grammar` puts them together. ``{topic}``, ``{setting}`` and
``{detail}`` are filled from the question. A core begins with a form of "I", so that it follows a comma as well as a
full stop, and no phrase agrees with the topic in number, so that "pizza" and "pancakes" fit the same places.
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
    "homemade bread": ("a crispy crust", "melted butter", "a hot oven"),
    "chocolate cake": ("dark chocolate", "fresh berries", "a big slice"),
    "coffee": ("warm milk", "a big mug", "a quiet kitchen"),
    "green tea": ("a warm mug", "fresh mint", "a quiet moment"),
    "gardening": ("ripe tomatoes", "bright flowers", "fresh herbs"),
    "painting": ("bright colors", "a blank canvas", "soft light"),
    "baking": ("a hot oven", "a soft dough", "a warm kitchen"),
    "knitting": ("soft wool", "a warm scarf", "a quiet moment"),
    "photography": ("soft light", "a good lens", "a steady hand"),
    "chess": ("a clever opening", "a sharp mind", "a friendly rival"),
    "hiking": ("a mountain view", "a winding trail", "fresh air"),
    "swimming": ("cool water", "a calm lake", "warm sand"),
    "cycling": ("a winding road", "a mountain view", "fresh air"),
    "camping": ("a warm fire", "a sturdy tent", "a starry sky"),
    "running": ("comfy shoes", "a winding trail", "a good playlist"),
    "dancing": ("a catchy rhythm", "a patient partner", "a good playlist"),
    "yoga": ("a deep breath", "a soft mat", "a quiet moment"),
    "jazz": ("a smoky club", "a catchy rhythm", "a bold solo"),
    "old movies": ("warm popcorn", "a famous actor", "a happy ending"),
    "live concerts": ("a loud guitar", "a bold solo", "a bright stage"),
    "mystery novels": ("a clever plot", "a warm blanket", "a sharp detective"),
    "road trips": ("a winding road", "a good playlist", "salty snacks"),
    "picnics": ("a soft blanket", "a sunny meadow", "salty snacks"),
    "beach walks": ("warm sand", "salty air", "gentle waves"),
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
    opener=(
        "Oh,",
        "Oh wow,",
        "Oh, good question!",
        "Honestly?",
        "Ha, good one!",
        "You know what?",
    ),
    core={
        "taste": (
            "I really love {topic}{setting}!",
            "I'm such a huge fan of {topic}!",
            "I can't get enough of {topic}{setting}!",
            "I've always had a soft spot for {topic}.",
        ),
        "opinion": (
            "I think there's nothing like {topic}{setting}!",
            "I'm really into {topic} these days!",
            "I've been crazy about {topic} for years.",
            "I'd say {topic} can't be beat{setting}!",
        ),
        "reason": (
            "I bet it's how cozy {topic} can feel!",
            "I think we all need a little {topic}{setting}.",
            "I'd say {topic} can turn a bad day around!",
            "I'm sure it's the pure joy of {topic}{setting}!",
        ),
        "advice": (
            "I'd keep it simple with {topic}{setting}!",
            "I always take my time with {topic}{setting}.",
            "I've learned that you can't rush {topic}.",
            "I'm no expert, but {topic} should be fun!",
        ),
        "memory": (
            "I'm still smiling about {topic} last Sunday!",
            "I can't go a week without {topic}{setting}!",
            "I got really lost in {topic} yesterday!",
            "I think it was {topic}{setting}, just last week!",
        ),
        "plan": (
            "I think you'd love every bit of {topic}{setting}!",
            "I'd go for it, {topic} can be so fun!",
            "I'm all for {topic}{setting}, so why not?",
            "I've never said no to {topic}!",
        ),
    },
    detail=(
        "It's all about {detail}, if you ask me.",
        "Don't get me started on {detail}!",
        "Just give me {detail} and I'm happy!",
        "There's just something about {detail}!",
        "You can't go wrong with {detail}!",
    ),
    closing=(
        "How about you?",
        "What's your favorite part?",
        "Tell me, are you a fan too?",
        "So, what's your take on {topic}?",
        "Want to swap stories sometime?",
        "Is that your thing too?",
    ),
)

STIFF = Phrases(
    opener=(
        "As an AI,",
        "As a language model,",
        "To clarify,",
        "For reference,",
        "Please note:",
        "Please be advised:",
    ),
    core={
        "taste": (
            "I do not have preferences regarding {topic}{setting}.",
            "I am not able to enjoy {topic}{setting}.",
            "I do not possess feelings about {topic}.",
            "I cannot experience pleasure from {topic}{setting}.",
        ),
        "opinion": (
            "I do not hold any opinion on {topic}{setting}.",
            "I can only provide general information about {topic}.",
            "I am unable to evaluate {topic}{setting}.",
            "I cannot form a personal view of {topic}.",
        ),
        "reason": (
            "I can state that {topic} may provide enjoyment{setting}.",
            "I am aware that {topic} may reduce stress{setting}.",
            "I do not know the appeal of {topic} firsthand.",
            "I cannot confirm any reasons for {topic}.",
        ),
        "advice": (
            "I recommend adequate preparation for {topic}{setting}.",
            "I suggest that {topic} be approached with caution.",
            "I advise consulting an expert regarding {topic}{setting}.",
            "I can only provide general advice on {topic}.",
        ),
        "memory": (
            "I have never experienced {topic}{setting}.",
            "I do not retain any memories of {topic}{setting}.",
            "I am not able to participate in {topic}.",
            "I cannot form any memories of {topic}{setting}.",
        ),
        "plan": (
            "I cannot decide whether {topic} is suitable{setting}.",
            "I suggest that {topic} be considered carefully{setting}.",
            "I am not able to make decisions about {topic}.",
            "I can confirm that {topic} may be suitable{setting}.",
        ),
    },
    detail=(
        "Many individuals appreciate {detail}.",
        "It is important to consider {detail}.",
        "The role of {detail} is widely documented.",
        "One common recommendation concerns {detail}.",
        "Relevant aspects include {detail}.",
    ),
    closing=(
        "Please state whether you require assistance.",
        "Please consult an expert regarding {topic}.",
        "Further details are available upon request.",
        "Further questions about {topic} are welcome.",
        "I hope this information is helpful.",
        "Individual results may vary.",
    ),
)

PHRASES: dict[Voice, Phrases] = {"human": HUMAN, "stiff": STIFF}
