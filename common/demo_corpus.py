"""A generated English-German corpus of image captions, used in place of real data (`--data demo`).

A small grammar writes each caption in both languages at once. Every English construction has exactly one
German rendering, so a perfect model could reach a BLEU of nearly 100; to find it, a model has to learn
gender, case and number, adjective endings, the position of the verb, and separable verbs.
"""

import random
from collections import namedtuple
from collections.abc import Iterable, Sequence
from typing import NamedTuple

SPLIT_SIZES = {"train": 8000, "val": 500, "test": 500}
SHORTEST, LONGEST = 5, 18  # words in an English sentence

# Forms stand in the order of CASES, under the gender or "pl".
CASES = ("nom", "acc", "dat")
ARTICLES = {"the": {"m": "der den dem", "f": "die die der", "n": "das das dem", "pl": "die die den"},
            "a": {"m": "ein einen einem", "f": "eine eine einer", "n": "ein ein einem"},
            "two": {"pl": "zwei zwei zwei"}, "three": {"pl": "drei drei drei"},
            "some": {"pl": "einige einige einigen"}}
WEAK_ENDINGS = {"m": "e en en", "f": "e e en", "n": "e e en", "pl": "en en en"}
STRONG_ENDINGS = {"m": "er en em", "f": "e e er", "n": "es es em", "pl": "e e en"}
STRONG_AFTER = ("", "ein", "zwei", "drei", "einige")  # where the article does not show gender or case
CONTRACTIONS = {"in dem": "im", "in das": "ins", "an dem": "am", "an das": "ans", "bei dem": "beim",
                "zu dem": "zum", "zu der": "zur"}
ADJECTIVES = {"young": "jung", "old": "alt", "happy": "glücklich", "tired": "müd", "small": "klein",
              "big": "groß", "wet": "nass", "new": "neu", "hot": "heiß", "cold": "kalt", "fresh": "frisch",
              "red": "rot", "blue": "blau", "green": "grün", "black": "schwarz", "white": "weiß",
              "yellow": "gelb", "brown": "braun"}

# Adjectives; colours | nouns that can take one of each: English, its plural, gender, German, its plural.
# "-" for the plural: used in the singular only; "0": cannot be counted, so it takes no "a".
# In Junge/Jungen, the second form is for the cases other than the nominative.
NOUN_TABLE = """
young old happy tired; | man men m Mann Männer, woman women f Frau Frauen, worker workers m Arbeiter Arbeiter
young old happy tired; | tourist tourists m Tourist/Touristen Touristen
young happy tired; | student students m Student/Studenten Studenten
small happy tired; | boy boys m Junge/Jungen Jungen, girl girls n Mädchen Mädchen
small happy tired; | child children n Kind Kinder
small big old wet; black white brown | dog dogs m Hund Hunde, cat cats f Katze Katzen, cow cows f Kuh Kühe
small big old wet; black white brown | horse horses n Pferd Pferde, duck ducks f Ente Enten
old new; red blue green black white | hat hats m Hut Hüte, shirt shirts n Hemd Hemden
old new; red blue green black white | jacket jackets f Jacke Jacken, coat coats m Mantel Mäntel
small big old new; red blue green yellow | ball balls m Ball Bälle, book books n Buch Bücher
small big old new; red blue green yellow | bag bags f Tasche Taschen, box boxes f Kiste Kisten
small big old new; red blue green yellow | car cars n Auto Autos, bike - n Fahrrad -, cart - m Wagen -
small big; red yellow green | apple apples m Apfel Äpfel, flower flowers f Blume Blumen
small big old; white brown | house - n Haus -, fence - m Zaun -, wall - f Mauer -, bridge - f Brücke -
small big old; white brown | bench - f Bank -, table - m Tisch -, ladder - f Leiter -
small big; | picture - n Bild -, stick - m Stock -, tree - m Baum -
small big; | park - m Park -, garden - m Garten -, forest - m Wald -, field - n Feld -, beach - m Strand -
small big; | lake - m See -, river - m Fluss -, city - f Stadt -, street - f Straße -, station - m Bahnhof -
small big; | market - m Markt -, bus - m Bus -, kitchen - f Küche -
old new; | newspaper - f Zeitung -
cold; | snow 0 m Schnee -, water 0 n Wasser -
hot; | tea 0 m Tee -
fresh; | bread 0 n Brot -, grass 0 n Gras -
; | football 0 m Fußball -, chess 0 n Schach -, guitar 0 f Gitarre -, music 0 f Musik -
"""
PEOPLE = ("man", "woman", "worker", "tourist", "student", "boy", "girl", "child")
ANIMALS = ("dog", "cat", "cow", "horse", "duck")
CLOTHES = ("shirt", "jacket", "coat")  # what one can be "in"
GROUPS = {"people": PEOPLE, "animals": ANIMALS}

# A complement, here one that says where: English preposition ("-" for none), German preposition if there
# is one and its case, nouns.
PLACES = {
    "nature": "in in+dat park garden forest snow; in auf+dat field; on an+dat beach; at an+dat lake river",
    "town": "in in+dat city; on auf+dat street bridge; at an+dat station; at auf+dat market",
    "near": "under unter+dat tree bridge; behind hinter+dat house fence car; by bei+dat tree house fence",
    "seat": "on auf+dat bench wall; at an+dat table",
    "home": "in in+dat kitchen",
    "swim": "in in+dat water lake river",
}
# Who | English | German: singular, plural (also the infinitive), separable prefix | places | complements.
ACTIVITY_TABLE = """
people dog cat   | sitting   | sitzt sitzen         | nature near seat
people horse cow | standing  | steht stehen         | nature near
people dog cow   | lying     | liegt liegen         | nature near
people animals   | sleeping  | schläft schlafen     | nature near
people dog duck  | swimming  | schwimmt schwimmen   | swim
people           | dancing   | tanzt tanzen         | nature town home
people           | singing   | singt singen         | nature town home
people           | laughing  | lacht lachen         | nature town near
people           | waiting   | wartet warten        | town near   | for auf+acc bus man child
people           | playing   | spielt spielen       | nature      | - acc football chess guitar
people dog cat   | playing   | spielt spielen       | nature near | with mit+dat ball stick
people           | listening | hört hören           | nature home | to acc music
people           | reading   | liest lesen          | nature home | - acc book newspaper
people           | eating    | isst essen           | town home   | - acc apple bread
horse cow        | eating    | frisst fressen       | nature near | - acc grass
dog duck         | eating    | frisst fressen       | nature near | - acc bread
people           | drinking  | trinkt trinken       | nature home | - acc water tea
people           | carrying  | trägt tragen         | nature town | - acc bag box ladder flower
people           | washing   | wäscht waschen       | near        | - acc car dog horse bike
people           | repairing | repariert reparieren | near        | - acc car bike cart
people horse     | pulling   | zieht ziehen         | nature town | - acc cart
people           | feeding   | füttert füttern      | nature near | - acc animals
people           | lifting   | hebt heben hoch      | nature town | - acc bag box ladder
people           | looking   | sieht sehen an       | nature town | at acc people animals picture
people           | watching  | schaut schauen zu    | nature town | - dat people animals
people           | helping   | hilft helfen         | nature town | - dat people
people           | riding    | reitet reiten        | nature      | - auf+dat horse
people           | riding    | fährt fahren         | nature town | - auf+dat bike
people           | throwing  | wirft werfen         | nature      | - acc ball stick
people dog       | catching  | fängt fangen         | nature      | - acc ball stick
people dog       | jumping   | springt springen     |             | into in+acc water lake river snow
people dog horse | jumping   | springt springen     |             | over über+acc fence wall bench
people cat       | climbing  | klettert klettern    |             | - auf+acc tree wall
people           | walking   | geht gehen           |             | through durch+acc park garden city forest
people           | walking   | geht gehen           |             | to zu+dat station lake market bridge
dog cat horse    | running   | rennt rennen         |             | through durch+acc park garden forest
dog              | chasing   | jagt jagen           | nature near | - acc ball cat duck
dog duck         | following | folgt folgen         | nature town | - dat people
people           | giving    | gibt geben           |             | - acc ball apple flower; to dat people
people           | showing   | zeigt zeigen         |             | - acc picture flower; to dat people
people           | reading   | liest lesen vor      |             | - acc book; to dat people
people           | putting   | stellt stellen       |             | - acc box bag; on auf+acc table bench
people           | leaning   | lehnt lehnen         |             | - acc bike; against an+acc house tree
"""
# Activities for some purpose, under their English names.
POSTURES = ("sitting", "standing", "lying")
CALM = ("reading", "eating", "drinking", "singing", "laughing", "listening", "looking")  # in a posture
ATTENTIVE = ("looking", "watching")  # to someone who does something else
ATTEMPTS = {"catching": "catch", "lifting": "lift", "pulling": "pull", "climbing": "climb", "washing": "wash",
            "feeding": "feed", "repairing": "repair", "jumping": "jump"}
TIMES = (("in the morning", "am Morgen"), ("in the evening", "am Abend"), ("at night", "in der Nacht"),
         ("today", "heute"), ("on a sunny day", "an einem sonnigen Tag"))


# The rows of the tables. The plural of a German verb is also its infinitive.
Noun = namedtuple("Noun", "one many gender german_one german_many adjectives colours")
Activity = namedtuple("Activity", "who english verb places complements")
Verb = namedtuple("Verb", "one many prefix", defaults=("",))


class Action(NamedTuple):
    """What someone is doing; `middle` is the German between the verb and its prefix."""

    english: str
    verb: Verb
    middle: str

    def infinitive(self) -> str:
        """Return the German infinitive clause: "eine Kiste hochzuheben"."""
        return join(self.middle, self.verb.prefix + ("zu" if self.verb.prefix else "zu ") + self.verb.many)


class Subject(NamedTuple):
    """The subject of a clause in both languages, its number, its nouns and its German relative pronoun."""

    english: str
    german: str
    plural: bool
    nouns: tuple[str, ...]
    pronoun: str

    def clause(self, action: Action) -> str:
        """Return the English clause."""
        return f"{self.english} {'are' if self.plural else 'is'} {action.english}"

    def main_clause(self, action: Action, first: str = "") -> str:
        """Return the German clause with the verb second: after the subject, or after `first` if not empty."""
        verb = action.verb.many if self.plural else action.verb.one
        start = (first, verb, self.german) if first else (self.german, verb)
        return join(*start, action.middle, action.verb.prefix)

    def final_clause(self, action: Action, *opening: str) -> str:
        """Return the German clause with the verb last, after the `opening` words."""
        verb = action.verb.many if self.plural else action.verb.one
        return join(*opening, action.middle, action.verb.prefix + verb)


class Phrase(NamedTuple):
    """A noun with its determiner (may be empty) and adjectives, in English words."""

    determiner: str
    adjectives: list[str]
    noun: Noun
    plural: bool = False

    def english(self) -> str:
        """Return the English phrase."""
        words = [*self.adjectives, self.noun.many if self.plural else self.noun.one]
        return join("an" if self.determiner == "a" and words[0][0] in "aeiou" else self.determiner, *words)

    def german(self, role: str) -> str:
        """Return the German phrase in a role: a case, or a preposition and its case ("in+dat")."""
        *preposition, case = role.split("+")
        agreement = "pl" if self.plural else self.noun.gender
        article = decline(ARTICLES[self.determiner][agreement], case) if self.determiner else ""
        ending = decline((STRONG_ENDINGS if article in STRONG_AFTER else WEAK_ENDINGS)[agreement], case)
        noun = self.noun.german_one.split("/")[0 if case == "nom" else -1]
        if self.plural:
            noun = self.noun.german_many
            noun += "n" if case == "dat" and noun[-1] not in "ns" else ""
        start = join(*preposition, article)
        adjectives = [ADJECTIVES[word] + ending for word in self.adjectives]
        return join(CONTRACTIONS.get(start, start), *adjectives, noun)

    def subject(self) -> Subject:
        """Return the phrase as a subject."""
        pronoun = decline(ARTICLES["the"]["pl" if self.plural else self.noun.gender], "nom")
        return Subject(self.english(), self.german("nom"), self.plural, (self.noun.one,), pronoun)


def join(*parts: str) -> str:
    """Return the parts that are not empty, joined by single spaces."""
    return " ".join(part for part in parts if part)


def decline(forms: str, case: str) -> str:
    """Return the form for the case."""
    return forms.split()[CASES.index(case)]


def _read_nouns() -> dict[str, Noun]:
    nouns = {}
    for row in NOUN_TABLE.strip().splitlines():
        description, entries = row.split("|")
        for entry in entries.split(","):
            noun = Noun(*entry.split(), *(words.split() for words in description.split(";")))
            nouns[noun.one] = noun
    return nouns


def _words(cell: str) -> list[str]:
    return [noun for word in cell.split() for noun in GROUPS.get(word, (word,))]


def _read_activities() -> list[Activity]:
    activities = []
    for row in ACTIVITY_TABLE.strip().splitlines():
        who, english, verb, places, complements = [*row.split("|"), ""][:5]
        places = [_words(place) for name in places.split() for place in PLACES[name].split(";")]
        complements = [_words(complement) for complement in complements.split(";") if complement]
        activities.append(Activity(frozenset(_words(who)), english.strip(), Verb(*verb.split()), places,
                                   complements))
    return activities


NOUNS = _read_nouns()
ACTIVITIES = _read_activities()


class Captions:
    """Writes random captions; each of the methods from `simple` on returns one, in English and German."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        self.pick = self.random.choice
        self.templates = (self.simple, self.simple, self.fronted, self.fronted, self.linked, self.linked,
                          self.dressed, self.together, self.posture, self.attempt, self.attention)

    def phrase(self, names: Sequence[str], bare: bool = False) -> Phrase:
        """Return a phrase about one of the nouns; if it cannot be counted, `bare` leaves out the article."""
        noun = NOUNS[self.pick(names)]
        adjectives = [self.pick(words) for words in (noun.adjectives, noun.colours)
                      if words and self.random.random() < 0.25]
        if noun.many == "0":
            return Phrase("" if bare else "the", adjectives, noun)
        if noun.many != "-" and self.random.random() < 0.3:
            return Phrase(self.pick(("the", "two", "two", "three", "some")), adjectives, noun, plural=True)
        return Phrase(self.pick(("a", "the") if noun.many == "-" else ("a", "a", "the")), adjectives, noun)

    def anyone(self) -> Subject:
        """Return a plain subject."""
        return self.phrase(PEOPLE + ANIMALS).subject()

    def activity(self, subject: Subject, names: Iterable[str] = ()) -> Activity:
        """Return something that the subject can do: one of the named activities, if there are names."""
        return self.pick([activity for activity in ACTIVITIES if activity.who.issuperset(subject.nouns)
                          and (not names or activity.english in names)])

    def complement(self, words: list[str], place: bool = False) -> tuple[tuple[int, bool], str, str]:
        """Return a complement: a key that sorts it in a German clause, its English and its German."""
        preposition, role, *names = words
        bare = role in CASES
        phrase = self.phrase(names, bare)
        # Known objects come first, then places, other objects, and objects with a preposition.
        rank = 2 if place else 4 if not bare else 1 if phrase.determiner == "the" else 3
        return (rank, role != "dat"), join(preposition.strip("-"), phrase.english()), phrase.german(role)

    def action(self, activity: Activity, place: float = 0.2) -> Action:
        """Return the activity with its complements, and with a place at the given probability."""
        parts = [self.complement(words) for words in activity.complements]
        if activity.places and (self.random.random() < place or activity.english in POSTURES):
            parts.append(self.complement(self.pick(activity.places), place=True))
        english = join(activity.english, *(part[1] for part in parts))
        return Action(english, activity.verb, join(*(part[2] for part in sorted(parts))))

    def doing(self, subject: Subject, place: float = 0.2) -> tuple[str, str]:
        """Return a simple sentence about the subject."""
        action = self.action(self.activity(subject), place)
        return subject.clause(action), subject.main_clause(action)

    def simple(self) -> tuple[str, str]:
        """A man is playing football in the park."""
        return self.doing(self.anyone(), place=0.9)

    def together(self) -> tuple[str, str]:
        """A man and a woman are playing football."""
        one, other = self.phrase(PEOPLE).subject(), self.anyone()
        return self.doing(Subject(f"{one.english} and {other.english}", f"{one.german} und {other.german}",
                                  True, one.nouns + other.nouns, "die"))

    def dressed(self) -> tuple[str, str]:
        """A man in a red shirt, or wearing a red hat, is playing football."""
        person, relation = self.phrase(PEOPLE).subject(), self.pick(("in", "wearing"))
        noun = NOUNS[self.pick(CLOTHES if relation == "in" else ("hat", "hat", *CLOTHES))]
        clothes = Phrase("" if person.plural else "a", [self.pick(noun.colours)], noun, person.plural)
        german = f" {clothes.german('in+dat')}"
        if relation == "wearing":
            wearing = Action("", Verb("trägt", "tragen"), clothes.german("acc"))
            german = f", {person.final_clause(wearing, person.pronoun)},"
        return self.doing(person._replace(english=f"{person.english} {relation} {clothes.english()}",
                                          german=person.german + german))

    def fronted(self) -> tuple[str, str]:
        """In the park, a man is playing football."""
        subject = self.anyone()
        activity = self.activity(subject)
        english, german = self.pick(TIMES)
        if activity.places and self.random.random() < 0.7:
            _, english, german = self.complement(self.pick(activity.places), place=True)
            activity = activity._replace(places=[])
        action = self.action(activity)
        return f"{english}, {subject.clause(action)}", subject.main_clause(action, german)

    def linked(self) -> tuple[str, str]:
        """A man is playing football while a dog is sleeping."""
        one, other = self.anyone(), self.anyone()
        action, second = (self.action(self.activity(subject), place=0.2) for subject in (one, other))
        english, german = one.clause(action), one.main_clause(action)
        link = self.pick(("and", "while", "first"))
        if link == "and":
            return f"{english} and {other.clause(second)}", f"{german} und {other.main_clause(second)}"
        meanwhile = other.final_clause(second, "während", other.german)
        if link == "while":
            return f"{english} while {other.clause(second)}", f"{german}, {meanwhile}"
        return f"while {other.clause(second)}, {english}", one.main_clause(action, f"{meanwhile},")

    def posture(self) -> tuple[str, str]:
        """A man is sitting on a bench and reading a book."""
        subject = self.phrase(PEOPLE).subject()
        posture = self.action(self.activity(subject, POSTURES), place=1)
        action = self.action(self.activity(subject, CALM), place=0)
        return (f"{subject.clause(posture)} and {action.english}",
                f"{subject.main_clause(posture)} und {subject._replace(german='').main_clause(action)}")

    def attempt(self) -> tuple[str, str]:
        """A man is trying to repair a car."""
        subject = self.phrase(PEOPLE).subject()
        activity = self.activity(subject, ATTEMPTS)
        action = self.action(activity._replace(english=f"trying to {ATTEMPTS[activity.english]}"))
        trying = Action("", Verb("versucht", "versuchen"), "")
        return subject.clause(action), f"{subject.main_clause(trying)}, {action.infinitive()}"

    def attention(self) -> tuple[str, str]:
        """A man is watching a dog that is playing with a ball."""
        subject, target = self.phrase(PEOPLE).subject(), self.phrase(PEOPLE + ANIMALS)
        seen, watching = target.subject(), self.activity(subject, ATTENTIVE)
        preposition, role, *_ = watching.complements[0]
        looking = Action(join(watching.english, preposition.strip("-"), target.english()), watching.verb,
                         target.german(role))
        action = self.action(self.activity(seen), place=0.2)
        pronoun = "who" if target.noun.one in PEOPLE else "that"
        return (f"{subject.clause(looking)} {seen._replace(english=pronoun).clause(action)}",
                f"{subject.main_clause(looking)}, {seen.final_clause(action, seen.pronoun)}")


def build(seed: int = 0) -> dict[str, list[tuple[str, str]]]:
    """Return the splits as lists of (English, German) sentence pairs; no sentence occurs twice."""
    captions = Captions(seed)
    seen, pairs = set(), []
    while len(pairs) < sum(SPLIT_SIZES.values()):
        pair = tuple(text[0].upper() + text[1:] + "." for text in captions.pick(captions.templates)())
        if SHORTEST <= len(pair[0].split()) <= LONGEST and seen.isdisjoint(pair):
            seen.update(pair)
            pairs.append(pair)
    # Drawn at random, because common sentences come early: later ones must differ from all before them.
    return {name: [pairs.pop(captions.random.randrange(len(pairs))) for _ in range(size)]
            for name, size in SPLIT_SIZES.items()}
