"""Tests of the generated demo corpus: its German grammar against tables written by hand, and its splits."""

import hashlib
import re
from collections import Counter

import pytest

from common.demo_corpus import NOUNS, SPLIT_SIZES, Action, Activity, Captions, Phrase, Verb, build


@pytest.fixture(scope="module")
def corpus():
    return build(seed=0)


@pytest.fixture(scope="module")
def pairs(corpus):
    return [pair for split in corpus.values() for pair in split]


def digest(corpus):
    return hashlib.sha256(repr(corpus).encode()).hexdigest()


def tokens(pairs, side):
    return Counter(word for pair in pairs for word in re.findall(r"\w+", pair[side]))


def phrase(english):
    """Return the phrase for "a|small brown|dog" or, in the plural, "two|small|dog|pl"."""
    determiner, adjectives, noun, *plural = english.split("|")
    return Phrase(determiner, adjectives.split(), NOUNS[noun], bool(plural))


@pytest.mark.parametrize(("what", "nominative", "accusative", "dative"), [
    ("a|small|dog", "ein kleiner Hund", "einen kleinen Hund", "einem kleinen Hund"),
    ("a|old|woman", "eine alte Frau", "eine alte Frau", "einer alten Frau"),
    ("a|tired|girl", "ein müdes Mädchen", "ein müdes Mädchen", "einem müden Mädchen"),
    ("the|small|dog", "der kleine Hund", "den kleinen Hund", "dem kleinen Hund"),
    ("the|white|cow", "die weiße Kuh", "die weiße Kuh", "der weißen Kuh"),
    ("the|new|bike", "das neue Fahrrad", "das neue Fahrrad", "dem neuen Fahrrad"),
    ("the|happy|man|pl", "die glücklichen Männer", "die glücklichen Männer", "den glücklichen Männern"),
    ("two|small|dog|pl", "zwei kleine Hunde", "zwei kleine Hunde", "zwei kleinen Hunden"),
    ("some|red|car|pl", "einige rote Autos", "einige rote Autos", "einigen roten Autos"),
    ("|blue|hat|pl", "blaue Hüte", "blaue Hüte", "blauen Hüten"),
    ("|hot|tea", "heißer Tee", "heißen Tee", "heißem Tee"),
    ("|fresh|bread", "frisches Brot", "frisches Brot", "frischem Brot"),
    ("a|big red|box", "eine große rote Kiste", "eine große rote Kiste", "einer großen roten Kiste"),
    ("the||boy", "der Junge", "den Jungen", "dem Jungen"),
    ("a||student", "ein Student", "einen Studenten", "einem Studenten"),
    ("three||girl|pl", "drei Mädchen", "drei Mädchen", "drei Mädchen"),
    ("the||apple|pl", "die Äpfel", "die Äpfel", "den Äpfeln"),
])
def test_noun_phrase_is_declined(what, nominative, accusative, dative):
    assert [phrase(what).german(case) for case in ("nom", "acc", "dat")] == [nominative, accusative, dative]


@pytest.mark.parametrize(("what", "english"), [
    ("a|small|dog", "a small dog"), ("a|old|dog", "an old dog"), ("a||apple", "an apple"),
    ("two||child|pl", "two children"), ("|hot|tea", "hot tea"),
])
def test_english_phrase(what, english):
    assert phrase(what).english() == english


@pytest.mark.parametrize(("what", "role", "german"), [
    ("the||park", "in+dat", "im Park"),
    ("the||water", "in+acc", "ins Wasser"),
    ("the||lake", "in+acc", "in den See"),
    ("the|big|beach", "an+dat", "am großen Strand"),
    ("the||house", "an+acc", "ans Haus"),
    ("the||fence", "bei+dat", "beim Zaun"),
    ("the||lake", "zu+dat", "zum See"),
    ("the|old|bridge", "zu+dat", "zur alten Brücke"),
    ("the||kitchen", "in+dat", "in der Küche"),
    ("a||park", "in+dat", "in einem Park"),
    ("two|small|dog|pl", "mit+dat", "mit zwei kleinen Hunden"),
])
def test_preposition_governs_its_case_and_contracts(what, role, german):
    assert phrase(what).german(role) == german


MAN, MEN = phrase("a|old|man").subject(), phrase("two||man|pl").subject()
PLAYING = Action("playing football", Verb("spielt", "spielen"), "Fußball")
LIFTING = Action("lifting a box", Verb("hebt", "heben", "hoch"), "eine Kiste")


@pytest.mark.parametrize(("subject", "action", "first", "german"), [
    (MAN, PLAYING, "", "ein alter Mann spielt Fußball"),
    (MEN, PLAYING, "", "zwei Männer spielen Fußball"),
    (MAN, PLAYING, "im Park", "im Park spielt ein alter Mann Fußball"),
    (MEN, LIFTING, "", "zwei Männer heben eine Kiste hoch"),
    (MAN, LIFTING, "heute", "heute hebt ein alter Mann eine Kiste hoch"),
])
def test_main_clause_has_the_verb_second(subject, action, first, german):
    assert subject.main_clause(action, first) == german


@pytest.mark.parametrize(("subject", "action", "opening", "german"), [
    (MAN, PLAYING, ("während", MAN.german), "während ein alter Mann Fußball spielt"),
    (MEN, LIFTING, ("während", MEN.german), "während zwei Männer eine Kiste hochheben"),
    (MAN, LIFTING, ("der",), "der eine Kiste hochhebt"),
])
def test_subordinate_clause_has_the_verb_last(subject, action, opening, german):
    assert subject.final_clause(action, *opening) == german


@pytest.mark.parametrize(("what", "pronoun"), [
    ("a||boy", "der"), ("a||cow", "die"), ("a||girl", "das"), ("two||girl|pl", "die"),
])
def test_relative_pronoun_agrees_with_the_noun(what, pronoun):
    assert phrase(what).subject().pronoun == pronoun


@pytest.mark.parametrize(("action", "german"), [
    (PLAYING, "Fußball zu spielen"), (LIFTING, "eine Kiste hochzuheben"),
])
def test_infinitive_clause_has_zu_between_prefix_and_verb(action, german):
    assert action.infinitive() == german


@pytest.mark.parametrize(("subject", "english"), [
    (MAN, "an old man is playing football"), (MEN, "two men are playing football"),
])
def test_english_verb_agrees_with_the_subject(subject, english):
    assert subject.clause(PLAYING) == english


@pytest.mark.parametrize(("english", "german"), [
    ("reading the newspaper in the kitchen", "die Zeitung in der Küche"),
    ("reading a newspaper in the kitchen", "in der Küche eine Zeitung"),
])
def test_only_a_definite_object_precedes_the_place(english, german):
    captions = Captions(seed=0)
    activity = Activity({"man"}, "reading", Verb("liest", "lesen"), [["in", "in+dat", "kitchen"]],
                        [["-", "acc", "newspaper"]])
    actions = [captions.action(activity, place=1) for _ in range(100)]
    assert {action.middle for action in actions if action.english == english} == {german}


@pytest.mark.parametrize(("template", "english", "german"), [
    ("dressed", r".+ wearing .+ (is|are) .+", r".+, (der|die|das) .+ (trägt|tragen), .+"),
    ("dressed", r"a \w+ in a \w+ shirt is .+", r"eine? \w+ in einem \w+en Hemd .+"),
    ("linked", r"while .+, .+ (is|are) .+", r"während .+, \w+ (ein|eine|der|die|das|zwei|drei|einige)\b.*"),
    ("linked", r".+ (is|are) .+ while .+", r"[^,]+, während .+"),
    ("attempt", r".+ (is|are) trying to .+", r".+ (versucht|versuchen), .+ (zu \w+n|hochzuheben)"),
    ("attention", r".+ (is|are) .+ (who|that) (is|are) .+", r"[^,]+, (der|die|das) .+"),
])
def test_template_renders_its_english_construction(template, english, german):
    captions = Captions(seed=0)
    sentences = [getattr(captions, template)() for _ in range(100)]
    chosen = [pair for pair in sentences if re.fullmatch(english, pair[0])]
    assert chosen and all(re.fullmatch(german, pair[1]) for pair in chosen)


@pytest.mark.parametrize(("english", "german"), [
    ("is sleeping", "schläft"), ("are sleeping", "schlafen"), ("is following", "folgt"),
    ("are following", "folgen"), ("is trying", "versucht"), ("are trying", "versuchen"),
])
def test_german_verb_agrees_in_number_with_the_english_one(pairs, english, german):
    assert {pair for pair in pairs if english in pair[0]} == {
        pair for pair in pairs if re.search(rf"\b{german}\b", pair[1])}


@pytest.mark.parametrize(("english", "german"), [
    (r".+ while a [\w ]+ is sleeping\.", r".+, während eine? [\w ]+ schläft\."),
    (r".+ while the [\w ]+ are [\w ]+ing\.", r".+, während die [\w ]+en\."),
    (r".+ while [\w ]+ woman is [\w ]+\.", r".+, während [\w ]+ Frau [\w ]+t\."),
    (r"While [\w ]+ is swimming, a .+", r"Während [\w ]+ schwimmt, \w+t eine? .+"),
    (r"In the park, a .+ is .+", r"Im Park \w+t eine? .+"),
    (r"At night, two .+ are .+", r"In der Nacht \w+n zwei .+"),
    (r"A .+ is sitting .+ and singing\.", r"Eine? .+ sitzt .+ und singt\."),
    (r"A [\w ]+ and a [\w ]+ are sleeping\.", r"Eine? [\w ]+ und eine? [\w ]+ schlafen\."),
    (r".+ watching a (\w+ )*dog that is .+", r".+ einem (\w+en )*Hund zu, der .+t\."),
    (r".+ giving an? (\w+ )*flower to a .+", r".+ eine[mr] \w+ (\w+ )*eine (\w+e )*Blume\b.*"),
])
def test_construction_is_rendered_the_same_way_throughout(pairs, english, german):
    chosen = [pair for pair in pairs if re.fullmatch(english, pair[0])]
    assert chosen and all(re.fullmatch(german, pair[1]) for pair in chosen)


def test_the_same_seed_gives_the_same_corpus(corpus):
    assert digest(build(seed=0)) == digest(corpus)


def test_another_seed_gives_another_corpus(corpus):
    assert digest(build(seed=1)) != digest(corpus)


def test_splits_have_their_sizes(corpus):
    assert {name: len(split) for name, split in corpus.items()} == SPLIT_SIZES


@pytest.mark.parametrize("side", [0, 1])
def test_no_sentence_occurs_twice(pairs, side):
    assert len({pair[side] for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("side", [0, 1])
def test_sentences_start_with_a_capital_and_end_with_one_full_stop(pairs, side):
    assert all(re.fullmatch(r"[A-Z][^.]+\.", pair[side]) for pair in pairs)


@pytest.mark.parametrize("side", [0, 1])
def test_words_are_separated_by_single_spaces(pairs, side):
    assert not [pair for pair in pairs if re.search(r"\s\s|\s[.,]|,\S|^\s", pair[side])]


def test_german_never_leaves_a_contraction_out(pairs):
    assert not [german for _, german in pairs if re.search(r"\b(in|an|bei|zu) dem\b|\b(in|an) das\b", german)]


@pytest.mark.parametrize("side", [0, 1])
def test_every_test_word_occurs_in_train(corpus, side):
    assert tokens(corpus["test"], side).keys() <= tokens(corpus["train"], side).keys()


def test_every_english_word_is_frequent_in_train(corpus):
    assert min(tokens(corpus["train"], 0).values()) >= 10


def test_english_sentences_have_five_to_eighteen_words(pairs):
    lengths = [len(english.split()) for english, _ in pairs]
    assert min(lengths) == 5 and max(lengths) == 18
